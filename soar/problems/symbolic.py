"""What only a symbolic engine can tell (integrals, sums, limits, large values), by math-verify without its reading of units.

For worker processes only: it can hang, and it can eat all memory.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Eq, Float, Integer, Rational, nan, oo, zoo

from soar.problems.answers import spell_unicode
from soar.problems.verify import compare_math, is_value, judge_gold
from soar.types import Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)

NORMALIZATION = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="all")
EXTRACTION = (LatexExtractionConfig(boxed_match_priority=0, normalization_config=NORMALIZATION),)
RELATIVE_TOLERANCE = 1e-25


@lru_cache(maxsize=2048)
def readings(text: str) -> tuple[Any, ...]:
    """What math-verify reads in an answer: sympy objects, then the cleaned text (str). Empty when it reads nothing."""
    bare = spell_unicode(text).strip().strip("*").rstrip(".,;").strip("$")
    try:
        return tuple(parse(rf"\boxed{{{bare}}}", EXTRACTION, parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # the parser fails in many ways on text that is no mathematics
        return ()


def check_symbolic(kind: str, answer: str, gold: str) -> Verdict:
    """`math`: whether answer equals gold; where both are the same text, whether it can be a gold answer. `parsable`: CORRECT
    when answer is a value. Raises MemoryError, which is a crash of the check and no verdict on the answer."""
    if kind == "math" and answer != gold:
        verdict = compare_math(answer, gold)
        return verdict or _verdict(any(_equal(g, a) for g in readings(gold) for a in readings(answer)))
    if kind == "math" and (judged := judge_gold(gold, "math")):
        return judged
    value = None if kind == "math" else is_value(answer)
    if value is not None:
        return _verdict(value)
    parsed = [value for value in readings(answer) if not isinstance(value, str)]
    if kind == "math":
        return Verdict.CORRECT if parsed else Verdict.UNSCORABLE
    return _verdict(bool(parsed) and parsed[0] not in (nan, zoo, oo, -oo))


def _verdict(equal: bool) -> Verdict:
    return Verdict.CORRECT if equal else Verdict.WRONG


def _equal(gold: Any, answer: Any) -> bool:
    """math-verify's verdict on one pair of readings, without its false positives for numbers below its tolerance."""
    try:
        return verify(gold, answer, timeout_seconds=None, raise_on_error=True) and not differ_exactly(gold, answer)
    except MemoryError:
        raise
    except Exception:  # an expression that sympy cannot compare is not shown to be equal
        return False


def differ_exactly(a: Any, b: Any) -> bool:
    """Whether two readings that were called equal are different exact numbers: rationals, or by their ratio to 30 digits."""
    a, b = (value.rhs if isinstance(value, Eq) else value for value in (a, b))
    if not all(isinstance(value, Basic) and value.is_number and not value.has(Float) for value in (a, b)):
        return False
    a, b = a.doit(), b.doit()
    if isinstance(a, Rational) and isinstance(b, Rational):
        return bool(a != b)
    ratio = (a / b - Integer(1)).evalf(30)
    return bool(ratio.is_number and abs(ratio) > RELATIVE_TOLERANCE)
