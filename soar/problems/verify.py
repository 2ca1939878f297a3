"""Comparing an answer with a gold answer, as far as that can be done without a symbolic engine.

`compare_math` decides equal texts, choice letters, rational numbers and lists of them. It returns None for the rest, which
`pool.py` gives to math-verify in a worker process. Deciding rationals here also removes math-verify's false positives for
tiny fractions. `50%` equals 50 and 0.5; `x=3` equals 3 and `3 or 5` is the set {3, 5} (math-verify).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from soar.problems.answers import (
    LOOSE_NUMBER,
    MAX_ANSWER_CHARS,
    Number,
    normalize,
    read_brackets,
    read_choice,
    read_list,
    read_number,
    read_unit,
)
from soar.types import UserError, Verdict

NAMES = ("math", "number", "exact", "choice")


class VerifierError(UserError, RuntimeError):
    """A verifier that cannot be used: unknown name, no such function, wrong return shape, workers that do not start."""


def as_verdict(value: Any, name: str) -> Verdict:
    """What a user's check returned: True, False, a number (1 or more is correct), None, NaN (unscorable) or a Verdict.

    Raises TypeError for anything else.
    """
    if isinstance(value, Verdict):
        return value
    if value is None:
        return Verdict.UNSCORABLE
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        kind = type(value).__name__
        raise TypeError(f"{name} returned a {kind} ({value!r:.80}), expected True, False, a number, None or a Verdict")
    score = float(value)
    return Verdict.UNSCORABLE if math.isnan(score) else _verdict(score >= 1)


def read_reward(values: Any, name: str) -> Verdict:
    """The verdict in what a user function returned for one completion: a list of one number or None.

    Raises VerifierError for any other shape.
    """
    expected = "expected a list with one number or None for each completion"
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise VerifierError(f"{name} returned {type(values).__name__}; {expected}")
    if len(values) != 1:
        raise VerifierError(f"{name} returned {len(values)} values for 1 completion; {expected}")
    try:
        return as_verdict(values[0], name)
    except TypeError as error:
        raise VerifierError(f"{error}; {expected}") from error


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


def _verdict(equal: bool) -> Verdict:
    return Verdict.CORRECT if equal else Verdict.WRONG


def compare_exact(answer: str, gold: str) -> Verdict:
    """Equal text, up to whitespace."""
    return _verdict(answer == gold or answer.split() == gold.split())


def compare_choice(answer: str, gold: str) -> Verdict:
    """Equal choice letters; equal normalised text where the gold answer is no letter."""
    letter = read_choice(gold)
    if letter is None:
        return _verdict(normalize(answer) == normalize(gold))
    return _verdict(read_choice(answer) == letter)


def compare_number(answer: str, gold: str) -> Verdict:
    """Equal rational values. An answer with words is read by its last number (`it is 42 apples`).

    UNSCORABLE when the gold answer is no number.
    """
    wanted = read_number(gold)
    if wanted is None:
        return Verdict.UNSCORABLE
    found = read_number(answer)
    if found is None and len(answer) <= MAX_ANSWER_CHARS:
        numbers = LOOSE_NUMBER.findall(normalize(answer))
        found = read_number(numbers[-1]) if numbers else None
    return _verdict(found is not None and compare_numbers(found, wanted) is True)


def _compare_lists(found: list[Number], wanted: list[Number], brackets: str) -> bool | None:
    if brackets == r"\{\}":
        found, wanted = (sorted(numbers, key=lambda number: number.value) for numbers in (found, wanted))
    if len(found) != len(wanted):
        return None if brackets == r"\{\}" else False
    equal = [compare_numbers(a, b) for a, b in zip(found, wanted, strict=True)]
    return None if None in equal else all(equal)


def compare_math(answer: str, gold: str) -> Verdict | None:
    """The verdict where it can be decided exactly without a symbolic engine, else None.

    Decided here: equal normalised text, choice letters, rationals, numbers with different short units, tuples and
    sets of rationals, a set against a tuple or an interval, and answers too long to be parsed.
    """
    if answer == gold:
        return Verdict.CORRECT
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
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
    units = read_unit(answer), read_unit(gold)
    if units[0] and units[1] and sorted(units[0]) != sorted(units[1]):
        return Verdict.WRONG  # math-verify drops units, so that 5 m would equal 5 cm
    return _compare_brackets(answer, gold)


def _compare_brackets(answer: str, gold: str) -> Verdict | None:
    """`compare_math` for lists of numbers, and for brackets of different kinds."""
    kind, other = read_brackets(normalize(gold)), read_brackets(normalize(answer))
    if kind is not None and other is not None and (kind == r"\{\}") != (other == r"\{\}"):
        return Verdict.WRONG
    wanted, found = read_list(gold), read_list(answer)
    if (wanted and read_number(answer)) or (found and read_number(gold)):
        return Verdict.WRONG
    if wanted is None or found is None or kind is None or kind != other:
        return None
    equal = _compare_lists(found, wanted, kind)
    return None if equal is None else _verdict(equal)


COMPARERS = {"exact": compare_exact, "number": compare_number, "choice": compare_choice}
