"""The math-verify part of the `math` verifier. For worker processes only: it can hang, and it can eat all memory."""

from __future__ import annotations

import cmath
import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import (
    Basic,
    Eq,
    Expr,
    FiniteSet,
    Float,
    Integer,
    Interval,
    MatrixBase,
    Rational,
    Set,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    nan,
    oo,
    zoo,
)

from soar.problems.answers import has_words, normalize, read_number, spell_unicode
from soar.types import Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)

EXTRACTION = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="all", equations=False
        ),
    ),
)
MAX_TEXT_WORDS = 8
MAX_PARTS = 100
RELATIVE_TOLERANCE = 1e-25


@lru_cache(maxsize=2048)
def readings(text: str) -> tuple[Any, ...]:
    """What math-verify reads in an answer: sympy objects, then the cleaned text (str). Empty when it reads nothing.

    Plain numbers skip its parser, which takes milliseconds. Its search for any number in text that is no LaTeX is left
    out: it finds 42 in `(lambda: 42)()`.
    """
    number = read_number(text)
    if number is not None and not number.percent:
        value = Rational(number.value.numerator, number.value.denominator)
        return (Float(value) if number.decimal else value, str(value))
    bare = spell_unicode(text).strip().strip("*").rstrip(".,;").strip("$")
    try:
        return tuple(parse(rf"\boxed{{{bare}}}", EXTRACTION, parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # the parser fails in many ways on text that is no mathematics
        return ()


def check_symbolic(kind: str, answer: str, gold: str) -> Verdict:
    """`math`: whether answer equals gold. `parsable`: CORRECT when answer is a value, else WRONG.

    A gold answer in words is compared as text; prose of more than MAX_TEXT_WORDS words is UNSCORABLE. Raises
    MemoryError, which is a crash of the check and no verdict on the answer.
    """
    if kind == "parsable":
        return _verdict(is_value(answer))
    if not is_value(gold, undefined=True):
        if len(gold.split()) > MAX_TEXT_WORDS or not normalize(gold):
            return Verdict.UNSCORABLE
        return _verdict(normalize(answer).casefold() == normalize(gold).casefold())
    if _far_apart(_values(gold), _values(answer)):
        return Verdict.WRONG
    return _verdict(any(_equal(g, a) for g in readings(gold) for a in readings(answer)))


def _verdict(equal: bool) -> Verdict:
    return Verdict.CORRECT if equal else Verdict.WRONG


def is_value(text: str, undefined: bool = False) -> bool:
    """Whether `text` is a number, an expression, a relation or a set, and not words that happen to parse.

    math-verify reads nearly any text as a product of letters; see `answers.has_words`. undefined: whether infinity
    and 1/0 count.
    """
    found = readings(text)
    values = [value for value in found if not isinstance(value, str)]
    if not values or (not undefined and values[0] in (nan, zoo, oo, -oo)):
        return False
    cleaned = next((value for value in found if isinstance(value, str)), text)
    return not has_words(cleaned)


@lru_cache(maxsize=2048)
def _values(text: str) -> tuple[str | None, Any, list[complex]] | None:
    """The values of an answer's first reading, with every variable at a number that depends on its name: the `x` of
    `x = 3`, a matrix's shape, numbers (sorted unless it is a matrix). None where they do not tell it from others (per cent,
    inequality, words, names that math-verify reads in two ways)."""
    value = next(iter(readings(text)), None)
    name = None
    if isinstance(value, Eq) and isinstance(value.lhs, Symbol):
        name, value = value.lhs.name, value.rhs
    shape = value.shape if isinstance(value, MatrixBase) else None
    if isinstance(value, MatrixBase):
        parts = list(value)
    elif isinstance(value, Interval):
        parts = [value.start, value.end]
    else:
        parts = list(value.args) if isinstance(value, (FiniteSet, Tuple)) else [value]
    if not 0 < len(parts) <= MAX_PARTS:
        return None
    numbers = []
    for part in parts:
        if not isinstance(part, Expr) or part.has(UnevaluatedExpr):
            return None
        symbols = {symbol: symbol.name for symbol in part.free_symbols}
        if any(len(letter) > 1 or letter in "eEiI" for letter in symbols.values()):
            return None
        point = {symbol: Rational(1000 + 37 * ord(letter) % 1009, 733) for symbol, letter in symbols.items()}
        try:
            numbers.append(complex(part.subs(point).evalf(15)))
        except MemoryError:
            raise
        except Exception:  # undefined here, or not a number at all
            return None
    if not all(map(cmath.isfinite, numbers)):
        return None
    return name, shape, numbers if shape else sorted(numbers, key=lambda number: (round(number.real, 4), number.imag))


def _far_apart(
    a: tuple[str | None, Any, list[complex]] | None, b: tuple[str | None, Any, list[complex]] | None
) -> bool:
    """Whether two answers differ by far more than any tolerance, so that the slow symbolic comparison is not needed."""
    if a is None or b is None or (a[1] is None) != (b[1] is None) or (a[0] and b[0] and a[0] != b[0]):
        return False
    if a[1] != b[1] or len(a[2]) != len(b[2]):
        return True
    return any(abs(x - y) > 1e-5 + 1e-9 * max(abs(x), abs(y)) for x, y in zip(a[2], b[2], strict=True))


def _equal(gold: Any, answer: Any) -> bool:
    """math-verify's verdict on one pair of readings, without its false positives for numbers below its tolerance."""
    try:
        if not verify(gold, answer, timeout_seconds=None, raise_on_error=True):
            return False
        return not differ_exactly(gold, answer)
    except MemoryError:
        raise
    except Exception:  # an expression that sympy cannot compare is not shown to be equal
        return False


def differ_exactly(a: Any, b: Any) -> bool:
    """Whether two readings that were called equal are different exact numbers, or hold such numbers.

    Only numbers without floats and free symbols are judged; rationals exactly, others by their ratio to 30 digits.
    """
    a, b = (value.rhs if isinstance(value, Eq) else value for value in (a, b))
    if isinstance(a, (Set, Tuple)) and isinstance(b, (Set, Tuple)):
        elements, others = [set(map(_exact, value.args)) for value in (a, b)]
        return None not in elements | others and elements != others
    for value in (a, b):
        if not isinstance(value, Basic) or not value.is_number or value.has(Float):
            return False
    left, right = _exact(a), _exact(b)
    if left is not None and right is not None:
        return bool(left != right)
    ratio = (a.doit() / b.doit() - Integer(1)).evalf(30)
    return bool(ratio.is_number and abs(ratio) > RELATIVE_TOLERANCE)


def _exact(value: Any) -> Rational | None:
    if not isinstance(value, Basic) or not value.is_number or value.has(Float):
        return None
    done = value.doit()
    return done if isinstance(done, Rational) else None
