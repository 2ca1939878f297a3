"""Comparing an answer with a gold answer: pure string functions, bounded in time by `MAX_ANSWER_CHARS`.

Nothing here calls a symbolic engine, so all of it may run in the main process on hostile text. `compare_math` decides
what can be decided exactly (equal text, choice letters, rational numbers) and returns None for the rest, which
`verify.py` gives to math-verify in a worker process. Deciding rationals here also removes math-verify's false positives
for tiny fractions.

How answers are read: `1,234`, `1{,}234`, `1\\,234`, `1 234` and `1_000` have thousands separators, `1,23` and `1.234,5`
are not numbers; a unit, a degree sign, a currency sign and a final full stop are dropped; `50%` equals 50 and 0.5;
`x=3` equals 3 and `3 or 5` is the set {3, 5} (math-verify).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from soar.types import Verdict

MAX_COMPLETION_CHARS = 100_000
MAX_ANSWER_CHARS = 2_000
MAX_NUMBER_CHARS = 400

MARK = re.compile(r"<ans>|(?<![a-z])answer\s*(?:\*\*|__)?\s*:", re.IGNORECASE)
END_OF_TURN = re.compile(r"<(?:eos|pad|/s|\|im_end\||\|endoftext\||\|eot_id\||\|end_of_text\|)>")
BOX = re.compile(r"\\f?boxed(?![a-zA-Z])|\\fbox(?![a-zA-Z])")
BARE_BOX = re.compile(r"[^\s{}$\\.,;]+")


def extract(completion: str, answer_style: str) -> str | None:
    """The answer that a completion commits to, or None.

    `boxed`: content of the last complete `\\boxed{...}` (the innermost of nested ones; `\\fbox{7}` and `\\boxed 7`
    count). Boxes before it are ignored, so ten boxes are one answer. `marker`: the first line after the last `<ans>` or
    `Answer:`, or the content of a box in it. Only the last MAX_COMPLETION_CHARS characters are read. An empty answer is
    None.
    """
    text = completion[-MAX_COMPLETION_CHARS:]
    if answer_style == "boxed":
        return _last_box(text)
    if answer_style == "marker":
        return _after_mark(text)
    raise ValueError(f"answer_style = {answer_style!r}: expected boxed or marker")


def _last_box(text: str) -> str | None:
    starts = [match.end() for match in BOX.finditer(text)]
    budget = 2 * len(text) + 1_000  # unclosed boxes make every one before them be read to the end
    for start in reversed(starts):
        content, cost = _box_content(text, start)
        if content is not None:
            return content.strip() or None
        budget -= cost
        if budget < 0:
            return None
    return None


def _box_content(text: str, start: int) -> tuple[str | None, int]:
    """Content of the box whose command ends at `start`, and how many characters were read to find it."""
    begin = start
    while begin < len(text) and text[begin] in " \t":
        begin += 1
    if text[begin : begin + 1] != "{":
        bare = BARE_BOX.match(text, begin, begin + MAX_ANSWER_CHARS)
        return (bare.group() if bare else None), begin - start + 1
    depth = 0
    position = begin
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[begin + 1 : position], position - begin
        position += 1
    return None, position - begin


def _after_mark(text: str) -> str | None:
    marks = [match.end() for match in MARK.finditer(text)]
    if not marks:
        return None
    tail = END_OF_TURN.split(text[marks[-1] :], maxsplit=1)[0].strip()
    line = tail.split("\n", 1)[0].strip().strip("*_").strip()
    return (_last_box(line) if "box" in line else None) or line or None


REPLACEMENTS = {
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\times", "\u00b7": r"\cdot", "\u03c0": r"\pi",
    "\u221e": r"\infty", "\u00b0": r"^\circ", "\u200b": "", "\u200c": "", "\u200d": "", "\u2060": "", "\ufeff": "",
    "\u202a": "", "\u202b": "", "\u202c": "", "\u202d": "", "\u202e": "", "\u2066": "", "\u2067": "", "\u2068": "",
    "\u2069": "", "\u200e": "", "\u200f": "", "\u2044": "/", "\x00": "",
}  # fmt: skip
TABLE = str.maketrans(REPLACEMENTS)
FRACTION_CHARACTER = re.compile("[\u00bc-\u00be\u2150-\u215e]")
NEGATIVE_SPACE = re.compile(r"\\!")
SPACING = re.compile(r"\\[,;: ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|~")
FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
DOLLARS = re.compile(r"^\\?\$+|\\?\$+$|^\\\(|\\\)$|^\\\[|\\\]$")


@lru_cache(maxsize=8192)
def normalize(answer: str) -> str:
    """One spelling for one answer: spacing commands, `\\text`, `\\dfrac`, outer `$`, Unicode minus and fractions.

    It changes no value. Whitespace is reduced to single spaces; a final full stop is dropped.
    """
    text = answer.translate(TABLE)
    if not text.isascii():
        text = FRACTION_CHARACTER.sub(_spell_fraction, text)
        text = unicodedata.normalize("NFKC", text)
    text = SPACING.sub(" ", NEGATIVE_SPACE.sub("", text))
    text = FRAC.sub(r"\\frac", text)
    text = TEXT.sub(r" \1 ", text)
    text = " ".join(text.split())
    text = DOLLARS.sub("", text).strip()
    return text if text.endswith("..") else text.removesuffix(".").rstrip()


def _spell_fraction(match: re.Match[str]) -> str:
    value = Fraction(unicodedata.numeric(match.group())).limit_denominator(100)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@dataclass(frozen=True)
class Number:
    """An exact rational read from text. decimal: written with a decimal point; percent: followed by a per cent sign."""

    value: Fraction
    decimal: bool = False
    percent: bool = False


UNIT = (
    r"(?:inch|inches|foot|feet|yards?|miles?|meters?|metres?|degrees?|dollars?|cents?|hours?|minutes?|seconds?|days?|"
    r"weeks?|months?|years?|units?|square units?|points?|people|students?|ways?|grams?|pounds?)"
)
DIGITS = r"(?:\d{1,3}(?:(?:,|\{,\}|_| )\d{3})+|\d+)"
DECIMAL = rf"(?:{DIGITS}(?:\.\d*)?|\.\d+)"
EXPONENT = r"(?:\{\s*(?P<p10>[+-]?\d{1,3})\s*\}|(?P<q10>\d))"
POWER = rf"(?:[eE](?P<e10>[+-]?\d{{1,3}})|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*{EXPONENT})"
TAIL = rf"\s*(?P<percent>\\?%|percent)?\s*(?:\^\s*\{{?\s*\\circ\s*\}}?|{UNIT}(?:\s*\^\s*\{{?[23]\}}?)?)?"
NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*\\?\$?\s*(?:"
    r"(?P<whole>\d+)?\s*\\frac\s*(?:\{\s*(?P<n>-?\d+)\s*\}|(?P<n1>\d))\s*(?:\{\s*(?P<d>-?\d+)\s*\}|(?P<d1>\d))"
    r"|(?P<a>\d+)\s*/\s*(?P<b>\d+)"
    r"|(?P<mixed>\d+) (?P<c>\d+)/(?P<e>\d+)"
    rf"|(?P<decimal>{DECIMAL})(?:{POWER})?"
    rf"){TAIL}"
)


@lru_cache(maxsize=8192)
def read_number(answer: str) -> Number | None:
    """An integer, decimal, fraction or mixed number; None for everything else and for more than MAX_NUMBER_CHARS.

    Sign, thousands separators, currency, unit, per cent sign and a power of ten (`1e5`, `3\\times10^4`) are read.
    """
    text = normalize(answer)
    if len(text) > MAX_NUMBER_CHARS or not text.isascii() or not any(char.isdigit() for char in text):
        return None
    match = NUMBER.fullmatch(text)
    value = None if match is None else _value(match)
    if match is None or value is None:
        return None
    if match["sign"] == "-":
        value = -value
    decimal = match["decimal"] is not None and "." in match["decimal"]
    return Number(value, decimal, match["percent"] is not None)


def _value(match: re.Match[str]) -> Fraction | None:
    """The unsigned value of a NUMBER match; None for a zero denominator or a negative part of a mixed number."""
    if match["decimal"] is not None:
        value = Fraction(re.sub(r"\{,\}|[,_ ]", "", match["decimal"]).removesuffix("."))
        return value * Fraction(10) ** int(match["e10"] or match["p10"] or match["q10"] or 0)
    if match["a"] is not None:
        whole, n, d = 0, int(match["a"]), int(match["b"])
    elif match["mixed"] is not None:
        whole, n, d = int(match["mixed"]), int(match["c"]), int(match["e"])
    else:
        whole, n, d = int(match["whole"] or 0), int(match["n"] or match["n1"]), int(match["d"] or match["d1"])
    if d == 0 or (whole and (n < 0 or d < 0)):
        return None
    return whole + Fraction(n, d)


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def compare_numbers(answer: Number, gold: Number) -> bool | None:
    """Whether two rationals are equal; None where a decimal meets a fraction that no decimal can write (0.333 and 1/3).

    A per cent sign on one side only: 50% equals 50 and 0.5, since gold answers drop the sign.
    """
    if answer.value == gold.value:
        return True
    if answer.percent != gold.percent:
        with_sign, without = (answer, gold) if answer.percent else (gold, answer)
        if with_sign.value / 100 == without.value:
            return True
    if (answer.decimal and not _terminates(gold.value)) or (gold.decimal and not _terminates(answer.value)):
        return None
    return False


CHOICE = re.compile(r"\(([A-J])\)(?:.*)|([A-J])(?:[.):].*)?", re.DOTALL)
BARE_CHOICE = re.compile(r"\(([A-J])\)|([A-J])[.)]?")


def read_choice(answer: str, bare: bool = False) -> str | None:
    """The letter of a multiple-choice answer: `B`, `(B)`, `B.`, `\\text{(B)}`, and unless `bare` `B) 42`; else None."""
    match = (BARE_CHOICE if bare else CHOICE).fullmatch(normalize(answer))
    return None if match is None else match[1] or match[2]


ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}")
LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
FUNCTIONS = frozenset(
    [
        "sqrt",
        "sinh",
        "cosh",
        "tanh",
        "coth",
        "arcsin",
        "arccos",
        "arctan",
        "asin",
        "acos",
        "atan",
        "frac",
        "infty",
        "floor",
        "ceil",
        "cdot",
        "times",
        "alpha",
        "beta",
        "gamma",
        "theta",
        "lambda",
        "sigma",
        "omega",
        "delta",
    ]
)
NO_VALUE = frozenset(
    [
        "nan",
        "n/a",
        "na",
        "none",
        "null",
        "nil",
        "yes",
        "no",
        "true",
        "false",
        "inf",
        "zoo",
        "undefined",
        "unknown",
        "dne",
        "error",
    ]
)


def has_words(answer: str) -> bool:
    """Whether an answer holds words rather than mathematics: four letters in a row that are no command and no function
    name, or a short word that stands for no value (`nan`, `N/A`, `yes`)."""
    text = normalize(answer)
    if text.casefold() in NO_VALUE:
        return True
    return any(run.casefold() not in FUNCTIONS for run in LETTERS.findall(ENVIRONMENT.sub(" ", text)))


def _verdict(equal: bool) -> Verdict:
    return Verdict.CORRECT if equal else Verdict.WRONG


def _too_long(answer: str, gold: str) -> bool:
    return len(answer) > MAX_ANSWER_CHARS or len(gold) > MAX_ANSWER_CHARS


def compare_exact(answer: str, gold: str) -> Verdict:
    """Equal text, up to whitespace."""
    return _verdict(answer == gold or answer.split() == gold.split())


def compare_choice(answer: str, gold: str) -> Verdict:
    """Equal choice letters; equal normalised text where the gold answer is no letter."""
    if _too_long(answer, gold):
        return _verdict(answer == gold)
    letter = read_choice(gold)
    if letter is None:
        return _verdict(normalize(answer) == normalize(gold))
    return _verdict(read_choice(answer) == letter)


LOOSE_NUMBER = re.compile(rf"[+-]?\\?\$?(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?(?:\s*\\?%)?")


def compare_number(answer: str, gold: str) -> Verdict:
    """Equal rational values. An answer with words is read by its last number (`it is 42 apples`).

    UNSCORABLE when the gold answer is no number.
    """
    if _too_long(answer, gold):
        return _verdict(answer == gold)
    wanted = read_number(gold)
    if wanted is None:
        return Verdict.UNSCORABLE
    found = read_number(answer)
    if found is None:
        numbers = LOOSE_NUMBER.findall(normalize(answer))
        found = read_number(numbers[-1]) if numbers else None
    return _verdict(found is not None and compare_numbers(found, wanted) is True)


def _brackets(text: str) -> str | None:
    """`set` for a text that is one `\\{...\\}`, `tuple` for one `(...)` or `[...]`-like text, else None."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set"
    return "tuple" if text[:1] in ("(", "[") and text[-1:] in (")", "]") else None


def compare_math(answer: str, gold: str) -> Verdict | None:
    """The verdict where it can be decided exactly without a symbolic engine, else None.

    Decided here: equal normalised text, choice letters, two rationals, a set against a tuple or interval, and answers
    too long to be parsed.
    """
    if answer == gold:
        return Verdict.CORRECT
    if _too_long(answer, gold):
        return Verdict.WRONG
    a, g = normalize(answer), normalize(gold)
    if a == g:
        return Verdict.CORRECT
    if not a:
        return Verdict.WRONG
    wanted, found = read_number(gold), read_number(answer)
    if wanted is not None and found is not None:
        equal = compare_numbers(found, wanted)
        return None if equal is None else _verdict(equal)
    letter, chosen = read_choice(gold, bare=True), read_choice(answer, bare=True)
    if letter is not None and chosen is not None:
        return _verdict(letter == chosen)
    kinds = {_brackets(a), _brackets(g)}
    return Verdict.WRONG if kinds == {"set", "tuple"} else None


COMPARERS = {"exact": compare_exact, "number": compare_number, "choice": compare_choice}
