"""A quick numerical reading of answers, to tell that two of them differ without a symbolic engine.

A text of a small part of LaTeX (numbers, letters, `+ - * / ^`, fractions, roots, pi, brackets, `x = ...`, matrices) is
evaluated with floats at a fixed point, where every letter has a value of its own. Two answers whose values differ by far
more than rounding are different; nothing else is ever decided here, and whatever has two readings is not read at all.
Bounded: no integers beyond floats, MAX_CHARS characters, MAX_DEPTH levels.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from soar.problems.answers import normalize

MAX_CHARS = 300
MAX_DEPTH = 20
INFINITY = 1e100
TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\\(?:frac|sqrt|pi|cdot|times)(?![A-Za-z])|[-+*/^(){}\[\]])")
PARTS = re.compile(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", re.DOTALL)
MATRIX = re.compile(r"\\begin\{([pb])matrix\}(.*)\\end\{\1matrix\}", re.DOTALL)
EQUATION = re.compile(r"([A-Za-z])\s*=(.*)", re.DOTALL)
UNIT = re.compile(r"\s*[A-Za-z]{1,3}(?:\^\d)?$")
WORDS = frozenset(["pi", "ln", "lg", "or", "in", "of", "to", "is", "as", "at", "no"])
VARIABLES = {
    letter: (1000 + 37 * ord(letter) % 1009) / 733 for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
}
# `i` and `e` are constants to some readers and variables to others: both readings have to differ.
POINTS: tuple[Mapping[str, complex], ...] = ({**VARIABLES, "i": 1j, "e": math.e}, VARIABLES)


@dataclass(frozen=True)
class Sketch:
    """Numerical values of a reading, at a fixed point where it has variables. name: of `x` in `x = 3`, else None.

    shape: None for a number or a collection, rows and columns for a matrix. values: in order for a matrix, else sorted.
    """

    name: str | None
    shape: tuple[int, int] | None
    values: tuple[complex, ...]


def clearly_different(a: Sketch | None, b: Sketch | None) -> bool:
    """Whether two answers differ by far more than any tolerance, so that the slow symbolic comparison is not needed."""
    if a is None or b is None or (a.shape is None) != (b.shape is None):
        return False
    if a.name is not None and b.name is not None and a.name != b.name:
        return False
    if a.shape != b.shape or len(a.values) != len(b.values):
        return True
    return any(abs(x - y) > 1e-5 + 1e-9 * max(abs(x), abs(y)) for x, y in zip(a.values, b.values, strict=True))


def in_order(values: list[complex]) -> tuple[complex, ...]:
    """The values of a collection in one order, whatever order they were written in."""
    return tuple(sorted(values, key=lambda number: (round(number.real, 4), number.imag)))


def surely_different(answer: str, gold: str) -> bool:
    """Whether two answers have different values under every reading; False where either cannot be read here.

    An answer that ends in letters may end in a unit: `5 m` is left open against 5.
    """
    pairs = list(zip(read_sketches(answer), read_sketches(gold), strict=False))
    if len(pairs) < len(POINTS) or not all(clearly_different(a, b) for a, b in pairs):
        return False
    for text, other in ((answer, gold), (gold, answer)):
        bare = UNIT.sub("", normalize(text))
        if bare and bare != normalize(text):
            quantity = zip(read_sketches(bare), read_sketches(other), strict=False)
            if not all(clearly_different(a, b) for a, b in quantity):
                return False
    return True


@lru_cache(maxsize=8192)
def read_sketches(text: str) -> tuple[Sketch, ...]:
    """One Sketch for each of POINTS; empty for a text that is not of the small language, or has an undefined value."""
    if len(text) > MAX_CHARS or not text.isascii():
        return ()
    matrix = MATRIX.fullmatch(text.strip().strip("$").strip())  # normalize would take `\\ ` for a space
    try:
        return tuple(
            _matrix(matrix[2], point) if matrix is not None else _sketch(normalize(text), point) for point in POINTS
        )
    except (_Unread, ZeroDivisionError, OverflowError, ValueError):
        return ()


class _Unread(Exception):
    """The text is not of the small language."""


def _matrix(text: str, point: Mapping[str, complex]) -> Sketch:
    rows = [[_value(normalize(cell), point) for cell in row.split("&")] for row in text.split(r"\\")]
    if len({len(row) for row in rows}) != 1:
        raise _Unread
    return Sketch(None, (len(rows), len(rows[0])), tuple(cell for row in rows for cell in row))


def _sketch(text: str, point: Mapping[str, complex]) -> Sketch:
    equation = EQUATION.fullmatch(text)
    name, text = (equation[1], equation[2].strip()) if equation is not None else (None, text)
    brackets = PARTS.fullmatch(text)
    if brackets is not None and "," in brackets[2] and (brackets[1] == r"\{") == (brackets[3] == r"\}"):
        parts = brackets[2].split(",")
        if any(re.fullmatch(r"\d{3}(?:\D.*)?", part.strip(), re.DOTALL) for part in parts[1:]):
            raise _Unread  # perhaps a thousands separator
        return Sketch(name, None, in_order([_bound(part, point) for part in parts]))
    return Sketch(name, None, (_value(text, point),))


def _bound(text: str, point: Mapping[str, complex]) -> complex:
    """A value, or infinity as an end of an interval."""
    infinity = re.fullmatch(r"\s*([+-]?)\s*\\infty\s*", text)
    return _value(text, point) if infinity is None else (-INFINITY if infinity[1] == "-" else INFINITY)


def _value(text: str, point: Mapping[str, complex]) -> complex:
    tokens, position = [], 0
    text = text.strip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise _Unread
        tokens.append(match[1])
        position = match.end()
    reader = _Reader(tokens, point)
    value = reader.sum(0)
    if reader.next is not None or not cmath.isfinite(value):
        raise _Unread
    return value


class _Reader:
    """Recursive descent over the tokens of one expression, evaluating as it reads."""

    def __init__(self, tokens: list[str], point: Mapping[str, complex]) -> None:
        self.tokens, self.point, self.position = tokens, point, 0

    @property
    def next(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self, *wanted: str) -> str:
        token = self.next
        if token is None or (wanted and token not in wanted):
            raise _Unread
        self.position += 1
        return token

    def sum(self, depth: int) -> complex:
        """`a + b - c`, with a sign in front or not."""
        if depth > MAX_DEPTH:
            raise _Unread
        sign = -1.0 if self.next in ("+", "-") and self.take() == "-" else 1.0
        total = sign * self.product(depth)
        while self.next in ("+", "-"):
            sign = -1.0 if self.take() == "-" else 1.0
            total += sign * self.product(depth)
        return total

    def product(self, depth: int) -> complex:
        """Factors with and without a sign between them. What follows a quotient `a/b` must end the product."""
        value, last = self.power(depth)
        while self.next is not None and self.next not in ("+", "-", ")", "}", "]"):
            token = self.next
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                factor, last = self.power(depth)
                value *= factor
            elif token == "/":
                self.take()
                divisor, _ = self.power(depth)
                if self.next not in (None, "+", "-", ")", "}", "]"):
                    raise _Unread
                return value / divisor
            else:
                # `2 3` and `1\frac12` are perhaps one number, `f(2)` and `x(y)` perhaps a function's value
                if token[0].isdigit() or token[0] == "." or (last == "number" and token == r"\frac"):
                    raise _Unread
                if last == "letter" and token == "(":
                    raise _Unread
                factor, last = self.power(depth)
                value *= factor
        return value

    def power(self, depth: int) -> tuple[complex, str]:
        """An atom with its exponent, and what kind of atom it is."""
        value, kind = self.atom(depth)
        if self.next != "^":
            return value, kind
        self.take()
        exponent = self.argument(depth)
        if self.next == "^" or (value.real <= 0 and value.imag == 0 and exponent != round(exponent.real)):
            raise _Unread
        return value**exponent, "power"

    def argument(self, depth: int) -> complex:
        """What stands behind `^`, `\\frac` and `\\sqrt`: a group, or one digit or letter."""
        if self.next == "{":
            return self.group("{", "}", depth)
        token = self.take()
        if len(token) != 1 or not token.isalnum() or (self.next or " ")[0].isdigit():
            raise _Unread
        return self.point[token] if token.isalpha() else float(token)

    def group(self, opening: str, closing: str, depth: int) -> complex:
        """A sum in brackets."""
        self.take(opening)
        value = self.sum(depth + 1)
        self.take(closing)
        return value

    def atom(self, depth: int) -> tuple[complex, str]:
        """A number, letters, pi, a fraction, a root, or a sum in parentheses."""
        if self.next == "(":
            return self.group("(", ")", depth), "group"
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return float(token), "number"
        if token == r"\pi":
            return math.pi, "constant"
        if token == r"\frac":
            above, below = self.argument(depth), self.argument(depth)
            return above / below, "group"
        if token == r"\sqrt":
            degree = self.group("[", "]", depth) if self.next == "[" else 2.0
            value = self.argument(depth)
            if value.real <= 0 or value.imag:
                raise _Unread
            return value ** (1 / degree), "group"
        if not token.isalpha() or len(token) > 2 or token in WORDS:
            raise _Unread
        if len(token) == 2 and self.next == "^":
            return self.pair(token, depth), "power"
        return math.prod((self.point[letter] for letter in token), start=1.0 + 0j), "letter"

    def pair(self, letters: str, depth: int) -> complex:
        """`xy^2`: the exponent belongs to the second letter."""
        self.take("^")
        exponent = self.argument(depth)
        if self.next == "^":
            raise _Unread
        return self.point[letters[0]] * self.point[letters[1]] ** exponent
