"""Texts with answers: what a completion commits to, its spelling, the letter of a choice, and numbers that are spelled out.

Pure string functions, bounded in time by `MAX_ANSWER_CHARS`, that may run in the main process on hostile text.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from soar.files import asset

MAX_COMPLETION_CHARS = 100_000  # of a text that a model wrote, a teacher or a student
MAX_ANSWER_CHARS = 2_000
LEXICON = asset("answers")
WORDS = {key: frozenset(text.split()) for key, text in LEXICON.items() if isinstance(text, str)}
PATTERNS = {name: re.compile(text) for name, text in LEXICON["pattern"].items()}
RULES = {key: [(re.compile(r["find"]), r.get("put", "")) for r in rules] for key, rules in LEXICON["rules"].items()}
NUMERALS, TENS, SCALES = LEXICON["numerals"].split(), LEXICON["tens"].split(), LEXICON["scales"]
GREEK = {chr(i): unicodedata.name(chr(i), "").replace("LAMDA", "LAMBDA").split() for i in range(0x391, 0x3CA)}
LETTERS = {c: f"\\{w[-1].title() if 'CAPITAL' in w else w[-1].lower()} " for c, w in GREEK.items() if w}
SHARES = {c: unicodedata.normalize("NFKC", c).split("\u2044") for c in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
FRACTIONS = {c: rf"\frac{{{over}}}{{{under}}}" for c, (over, under) in SHARES.items()}
TABLE = str.maketrans({**LEXICON["unicode"], **LETTERS, **FRACTIONS})


def extract(completion: str, answer_style: str) -> str | None:
    """The answer that a completion commits to, or None.

    `boxed`: content of the last `\\boxed{...}`, or of several joined by `and`, `or`, commas. `marker`: the first line after
    the last `<ans>`, `Answer:` or `final answer is`, or a box in it. What follows the end of the turn, or begins a new
    question, is not read, nor an unfinished `<think>`, nor more than MAX_COMPLETION_CHARS.
    """
    if answer_style not in ("boxed", "marker"):
        raise ValueError(f"answer_style = {answer_style!r}: expected boxed or marker")
    text = PATTERNS["end_of_turn"].split(completion[-MAX_COMPLETION_CHARS:].lstrip(), maxsplit=1)[0]
    start = PATTERNS["box" if answer_style == "boxed" else "mark"].search(text)
    if start is None or still_thinks(text):
        return None
    turn = PATTERNS["next_turn"].search(text, start.end())
    text = text[: turn.start()] if turn else text
    if answer_style == "boxed":
        return _last_box(text)
    tail = PATTERNS["mark"].split(text)[-1]
    line = tail.lstrip(": *_\n\t").split("\n", 1)[0].strip().strip("*_").strip()
    return (_last_box(line) if "box" in line else None) or line or None


def still_thinks(text: str) -> bool:
    """Whether a text ends inside a think block: it holds no answer then."""
    return text.rfind("<think>") > text.rfind("</think>")


def _last_box(text: str) -> str | None:
    """Content of the last box, or of the last ones with nothing but commas, `and` or `or` between them."""
    matches, opened, closing = list(PATTERNS["box"].finditer(text)), list[int](), dict[int, int]()
    for brace in PATTERNS["brace"].finditer(text, matches[0].end()) if matches else ():
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            closing[opened.pop()] = brace.end()
    boxes, first = list[str](), len(text)
    for match in reversed(matches):
        begin = match.end()
        if begin in closing:
            content, end = text[begin + 1 : closing[begin] - 1], closing[begin]
        elif bare := PATTERNS["bare_box"].match(text, begin, begin + MAX_ANSWER_CHARS):
            content, end = bare[0], bare.end()
        elif boxes:
            break
        else:
            continue  # it is not closed: the one before it counts
        if boxes and not PATTERNS["between_boxes"].fullmatch(text, end, first):
            break
        boxes, first = [content.strip(), *boxes], match.start()
    return ", ".join(boxes) or None


def normalize(answer: str) -> str:
    """One spelling for one answer: spacing commands, `\\text`, `\\dfrac`, outer `$`, Unicode minus and fractions.

    It changes no value. White space becomes single spaces, a final full stop goes. Above MAX_ANSWER_CHARS: as it is.
    """
    return _normalize(answer) if len(answer) <= MAX_ANSWER_CHARS else answer


def spell_unicode(text: str) -> str:
    """Mathematical Unicode as LaTeX (minus, fractions, roots, powers, full-width digits), without what is invisible."""
    text = PATTERNS["invisible"].sub("", text).translate(TABLE)
    return text if text.isascii() else unicodedata.normalize("NFKC", rewrite(text, "script")).translate(TABLE)


def rewrite(text: str, rules: str) -> str:
    """The text after all substitutions of `rules`, in their order, a run of blanks as one: patterns are cubic in them."""
    for pattern, replacement in RULES[rules]:
        text = pattern.sub(replacement, text)
        if "  " in text:
            text = PATTERNS["blanks"].sub(" ", text)
    return text


@lru_cache(maxsize=8192)
def _normalize(answer: str) -> str:
    text = " ".join(rewrite(spell_unicode(answer), "spelling").split())
    text = text if text.endswith("..") else text.removesuffix(".").rstrip()
    text = PATTERNS["dollars"].sub("", text).strip()
    return text if text.endswith("..") else text.removesuffix(".").rstrip()


def split_choice(answer: str) -> tuple[str | None, str]:
    """Letter and text of a choice, `("B", "12")` for `\\textbf{(B) }12`; (None, answer) for what is none."""
    if (match := PATTERNS["choice"].fullmatch(normalize(answer))) is None:
        return None, answer
    return match[1] or match[3], (match[2] or match[4] or "").strip()


def read_letters(answer: str) -> frozenset[str] | None:
    """The letters of an answer to a question with several right choices: `A, C`, `A and C`, `AC`; else None."""
    text = normalize(answer)
    if not PATTERNS["letters_list"].fullmatch(text):
        return None
    letters = re.findall("[A-J]", text)
    return frozenset(letters) if len(set(letters)) == len(letters) else None


def mark_up(answer: str) -> str:
    """The answer without fonts, colours, spacing, boxes and dollar signs; words of `\\text` stand between \\x01 and \\x02.

    It tells words from letters: `5\\text{ m}` is five metres, `5m` five times m. Above MAX_ANSWER_CHARS: as it is.
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    return rewrite(" ".join(spell_unicode(answer).split()), "rewrite").strip()


def spelled(text: str) -> Fraction | None:
    """The number that words say, `twenty-one`, `two hundred and five`, `two thirds`; None for other words."""
    words, total, group = re.sub(r"-|\band\b", " ", text.casefold()).split(), 0, 0
    parts = LEXICON["parts"].get(words[-1].removesuffix("s")) if len(words) > 1 else None
    if parts:
        share = spelled(" ".join(words[:-1]))
        return None if share is None or share.denominator > 1 else share / parts
    for place, word in enumerate(words):
        # What may follow is less than the last digit's worth: 21 is said as 20 and 1, and no 1 follows 1
        room = 100 if group % 100 == 0 else 10 if group % 10 == 0 and group % 100 >= 20 else 0
        small = NUMERALS.index(word) if word in NUMERALS else 10 * TENS.index(word) + 20 if word in TENS else room
        if small < room and (small or place == 0 == len(words) - 1):
            group += small
        elif word in ("hundred", "dozen") and 0 < group < 100:
            group *= SCALES[word]
        elif SCALES.get(word, 0) > 100 and 0 < group < 1_000:
            total, group = total + group * SCALES[word], 0
        else:
            return None
    return Fraction(total + group) if words else None
