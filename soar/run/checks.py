"""What a check of recorded numbers is: what was looked at, what is wrong with it, and when two numbers are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLOSE = 1e-9  # sums in another order differ in the last bits
MOST = 5  # complaints of one kind that are spelled out
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, OSError)
"""What looking at a damaged folder can raise."""


@dataclass(frozen=True)
class Check:
    """What was checked, what is wrong with it, and a remark."""

    what: str
    complaints: list[str]
    note: str = ""


def guarded(what: str, look: Callable[[], Check | Iterable[str]]) -> Check:
    """A check that damaged content cannot stop; of many complaints the first are spelled out."""
    try:
        found = look()
        check = found if isinstance(found, Check) else Check(what, list(found))
    except DAMAGE as error:
        check = Check(what, [f"cannot be checked: {type(error).__name__}: {error}"])
    left = len(check.complaints) - MOST
    shown = [*check.complaints[:MOST], f"{left} more"] if left > 0 else check.complaints
    return Check(what, shown, check.note)


def unequal(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One complaint for every key whose value is not the recomputed one."""
    return [
        f"{where}: {key} = {_short(found.get(key))}, but the lines give {_short(value)}"
        for key, value in wanted.items()
        if not same(found.get(key), value)
    ]


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, default=str)[:120]


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, numbers up to the rounding of a sum in another order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str) and not isinstance(b, str):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, int | float) and not isinstance(b, bool):
        return abs(a - b) <= CLOSE * max(1.0, abs(a), abs(b))
    return type(a) is type(b) and bool(a == b)
