"""Reading answers: what a completion commits to, and which number, list or choice letter a text stands for.

Pure string functions, bounded in time by `MAX_ANSWER_CHARS`, that may run in the main process on hostile text. How
answers are read: `1,234`, `1{,}234`, `1\\,234`, `1 234` and `1_000` have thousands separators, `1,23` and `1.234,5` are
not numbers; a unit, a degree sign, a currency sign and a final full stop are dropped.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_COMPLETION_CHARS = 100_000
MAX_ANSWER_CHARS = 2_000
MAX_NUMBER_CHARS = 400

MARK = re.compile(r"<ans>|(?<![a-z])answer(?: is)?\s{0,3}(?:\*\*|__)?\s{0,3}:", re.IGNORECASE)
END_OF_TURN = re.compile(r"<(?:eos|pad|/s|\|im_end\||\|endoftext\||\|eot_id\||\|end_of_text\|)>")
BOX = re.compile(r"\\f?boxed(?![a-zA-Z])|\\fbox(?![a-zA-Z])")
TOTAL = re.compile(r"\s{0,3}(-?[0-9]{1,30})(?![0-9]|[.,][0-9]|[A-Za-z_/!^%])")  # what a step of a working comes to
TOTALS = re.compile(r"-?[0-9]{1,30}(?:, -?[0-9]{1,30}){0,999}")  # how a gold answer is written
BARE_BOX = re.compile(r"[^\s{}$\\.,;]+")


def extract(completion: str, answer_style: str) -> str | None:
    """The answer that a completion commits to, or None.

    `boxed`: content of the last complete `\\boxed{...}` (the innermost of nested ones; `\\fbox{7}` and `\\boxed 7`
    count). Boxes before it are ignored, so ten boxes are one answer. `marker`: the first line after the last `<ans>` or
    `Answer:`, or the content of a box in it. `line`: what stands behind the last `=` of the first line, or the whole line
    without one. `totals`: the whole numbers behind every `=` of the first line (`12, 20`), None where one has none. Only
    the last MAX_COMPLETION_CHARS characters are read (the first, for `line` and `totals`). An empty answer is None.
    """
    text = completion[-MAX_COMPLETION_CHARS:]
    if answer_style == "boxed":
        return _last_box(text)
    if answer_style == "marker":
        return _after_mark(text)
    if answer_style in ("line", "totals"):
        line = END_OF_TURN.split(completion[:MAX_COMPLETION_CHARS], maxsplit=1)[0].split("\n", 1)[0]
        return _totals(line) if answer_style == "totals" else line.rpartition("=")[2].strip() or None
    raise ValueError(f"answer_style = {answer_style!r}: expected boxed, marker, line or totals")


def _totals(line: str) -> str | None:
    found = [TOTAL.match(piece) for piece in line.split("=")[1:]]
    return ", ".join(str(int(match[1])) for match in found if match) if found and all(found) else None


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


INVISIBLE = re.compile("[\x00\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]")
TABLE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": r"\times", "\u00b7": r"\cdot", "\u03c0": r"\pi",
    "\u221e": r"\infty", "\u00b0": r"^\circ", "\u2044": "/",
})  # fmt: skip
FRACTION_CHARACTER = re.compile("[\u00bc-\u00be\u2150-\u215e]")
SUPERSCRIPT = re.compile("[\u00b2\u00b3\u00b9\u2070-\u207f]+")
SUBSCRIPT = re.compile("[\u2080-\u209c]+")
SHORT_SCRIPT = re.compile(r"([\^_])\{(\w)\}")
ROOT = re.compile("\u221a(\\d+|[a-zA-Z])")
NEGATIVE_SPACE = re.compile(r"\\!")
SPACING = re.compile(r"\\[,;: ]|\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|~")
FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
DOLLARS = re.compile(r"^\\?\$+|\\?\$+$|^\\\(|\\\)$|^\\\[|\\\]$")


def normalize(answer: str) -> str:
    """One spelling for one answer: spacing commands, `\\text`, `\\dfrac`, outer `$`, Unicode minus and fractions.

    It changes no value. Whitespace is reduced to single spaces; a final full stop is dropped. A text of more than
    MAX_ANSWER_CHARS characters is returned as it is.
    """
    return _normalize(answer) if len(answer) <= MAX_ANSWER_CHARS else answer


def spell_unicode(text: str) -> str:
    """Mathematical Unicode as LaTeX (minus, fractions, roots, powers, full-width digits), without what is invisible."""
    text = INVISIBLE.sub("", text).translate(TABLE)
    if text.isascii():
        return text
    text = ROOT.sub(r"\\sqrt{\1}", FRACTION_CHARACTER.sub(_spell_fraction, text))
    text = SUPERSCRIPT.sub(lambda match: f"^{{{match.group()}}}", text)
    text = SUBSCRIPT.sub(lambda match: f"_{{{match.group()}}}", text)
    return unicodedata.normalize("NFKC", text)


@lru_cache(maxsize=8192)
def _normalize(answer: str) -> str:
    text = spell_unicode(answer)
    text = SHORT_SCRIPT.sub(r"\1\2", text)
    text = SPACING.sub(" ", NEGATIVE_SPACE.sub("", text))
    text = FRAC.sub(r"\\frac", text)
    text = TEXT.sub(r" \1 ", text)
    text = " ".join(text.split())
    text = text if text.endswith("..") else text.removesuffix(".").rstrip()
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


def read_number(answer: str) -> Number | None:
    """An integer, decimal, fraction or mixed number; None for everything else and for more than MAX_NUMBER_CHARS.

    Sign, thousands separators, currency, unit, per cent sign and a power of ten (`1e5`, `3\\times10^4`) are read.
    """
    return _read_number(normalize(answer)) if len(answer) <= MAX_NUMBER_CHARS else None


@lru_cache(maxsize=8192)
def _read_number(text: str) -> Number | None:
    if not text.isascii() or not any(char.isdigit() for char in text):
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


LOOSE_NUMBER = re.compile(rf"[+-]?\\?\$?(?:{DIGITS}(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?(?:\s*\\?%)?")
CHOICE = re.compile(r"\(([A-J])\)(?:.*)|([A-J])(?:[.):].*)?", re.DOTALL)
BARE_CHOICE = re.compile(r"\(([A-J])\)|([A-J])[.)]?")


def read_choice(answer: str, bare: bool = False) -> str | None:
    """The letter of a multiple-choice answer: `B`, `(B)`, `B.`, `\\text{(B)}`, and unless `bare` `B) 42`; else None."""
    match = (BARE_CHOICE if bare else CHOICE).fullmatch(normalize(answer))
    return None if match is None else match[1] or match[2]


QUANTITY = re.compile(r"(?:[^A-Za-z\\]|\\(?:frac|sqrt|pi|cdot)(?![A-Za-z]))*\d\}?\s*([A-Za-z]{1,2})(?:\^\{?\d\}?)?")


def read_unit(answer: str) -> str | None:
    """The one or two letters behind a number (`5\\text{ cm}`, `2x`), else None."""
    match = QUANTITY.fullmatch(normalize(answer))
    return None if match is None else match[1]


LIST = re.compile(r"(\\\{|[(\[])([^()\[\]]*)(\\\}|[)\]])", re.DOTALL)


def read_brackets(text: str) -> str | None:
    """Opening and closing bracket of a text that is one `(...)`, `[...)` or `\\{...\\}`, else None."""
    match = LIST.fullmatch(text)
    return None if match is None or (match[1] == r"\{") != (match[3] == r"\}") else match[1] + match[3]


def read_list(answer: str) -> list[Number] | None:
    """The numbers in brackets: `(1, 2)`, `[0, 3)`, `\\{1, 2\\}`; None unless there are two or more and all are numbers.

    `(1,234)` is left open: it may be a pair, or one number.
    """
    match = LIST.fullmatch(normalize(answer))
    if match is None or len(match[2]) > MAX_NUMBER_CHARS or read_number(match[2]) is not None:
        return None
    found = [read_number(part) for part in match[2].split(",")]
    numbers = [number for number in found if number is not None]
    return numbers if len(numbers) == len(found) > 1 else None


ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z]+\*?\}")
LETTERS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{4,}")
FUNCTIONS = {
    "sqrt", "sinh", "cosh", "tanh", "coth", "arcsin", "arccos", "arctan", "asin", "acos", "atan", "frac", "infty", "floor",
    "ceil", "cdot", "times", "alpha", "beta", "gamma", "theta", "lambda", "sigma", "omega", "delta",
}  # fmt: skip
NO_VALUE = {
    "nan", "n/a", "na", "none", "null", "nil", "yes", "no", "true", "false", "inf", "zoo", "undefined", "unknown", "dne",
    "error",
}  # fmt: skip


def has_words(answer: str) -> bool:
    """Whether an answer holds words rather than mathematics: four letters in a row that are no command and no function
    name, or a short word that stands for no value (`nan`, `N/A`, `yes`)."""
    text = normalize(answer)
    if text.casefold() in NO_VALUE:
        return True
    return any(run.casefold() not in FUNCTIONS for run in LETTERS.findall(ENVIRONMENT.sub(" ", text)))
