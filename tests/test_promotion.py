"""The promotion rule against a plain transcription of it, and its corners worked out by hand."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar.loop.promotion import decide
from soar.types import Trial

Rates = list[list[float | None]]
# Sixteenths, so that sums are exact, ties are common and the mean meets tau exactly at times.
sixteenths = st.integers(-8, 8).map(lambda i: i / 16)


def transcription(
    history: list[float], rewards: list[float | None], rates: Rates, tau: float, size: int
) -> tuple[int, int] | None:
    """(k*, j*) or None, word for word: Rbar is the mean of the last `size` step rewards; if Rbar > tau, k* is the dataset of
    the largest reward and j* the repeat with the median pass rate. None in rates: a failed student."""
    if len(history) < size:
        return None
    total = 0.0
    for value in history[len(history) - size :]:
        total += value
    if not total / size > tau:
        return None
    best = max((k for k, reward in enumerate(rewards) if reward is not None), key=lambda k: rewards[k], default=None)
    if best is None:
        return None
    alive = sorted((rate, j) for j, rate in enumerate(rates[best]) if rate is not None)
    median, repeat = alive[(len(alive) - 1) // 2]
    assert median == statistics.median_low(rate for rate, _ in alive)
    return best, repeat


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[float], list[float | None], Rates, float, int]:
    G, R = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rate = st.one_of(st.none(), st.integers(0, 4).map(lambda i: i / 4))
    rates = [draw(st.lists(rate, min_size=R, max_size=R)) for _ in range(G)]
    rewards = [None if set(row) == {None} else draw(sixteenths) for row in rates]
    return draw(st.lists(sixteenths, max_size=7)), rewards, rates, draw(sixteenths), draw(st.integers(1, 4))


def trials_of(rates: Rates) -> list[Trial]:
    """A failed student keeps a pass rate that would be chosen if it counted."""
    return [Trial(k, j, 0.5 if r is None else r, r is None) for k, row in enumerate(rates) for j, r in enumerate(row)]


@settings(max_examples=400, deadline=None)
@given(situations())
def test_decide_is_the_algorithm(situation: tuple[Any, ...]) -> None:
    history, rewards, rates, tau, size = situation
    decision = decide(history, rewards, trials_of(rates), tau, size)
    expected = transcription(history, rewards, rates, tau, size)
    assert (decision.promote, (decision.dataset, decision.repeat)) == (expected is not None, expected or (None, None))
    assert decision.window_mean == (sum(history[-size:]) / size if len(history) >= size else None)


@pytest.mark.parametrize(
    ("history", "rewards", "rates", "tau", "size", "expected", "reason"),
    [
        ([0.25] * 3, [0.25], [[0.5]], 0.25, 3, None, "window mean 0.2500 does not exceed tau 0.25"),
        ([0.25, 0.25, 0.2501], [0.25], [[0.5]], 0.25, 3, (0, 0), "window mean 0.2500 exceeds tau 0.25"),
        ([9.0, 9.0], [9.0], [[1.0]], 0.0, 3, None, "window holds 2 of 3 steps"),
        ([9.0, 0.0, 0.0, 0.0], [0.0], [[1.0]], 0.1, 3, None, "window mean 0.0000 does not exceed tau 0.1"),
        ([1.0], [0.5, 0.7, 0.7], [[0.0, 0.1, 0.2]] * 3, 0.0, 1, (1, 1), "window mean 1.0000 exceeds tau 0"),
        ([1.0], [-0.5, None, -0.2], [[0.0], [None], [0.0]], 0.0, 1, (2, 0), "window mean 1.0000 exceeds tau 0"),
        ([1.0], [0.3], [[None, 0.2, 0.4, None]], 0.0, 1, (0, 1), "window mean 1.0000 exceeds tau 0"),
        ([1.0], [None, None], [[None], [None]], 0.0, 1, None, "every student of this step failed"),
    ],
    ids=["at tau", "over tau", "not full", "old steps", "tie", "negative", "failed repeats", "all failed"],
)
def test_corners_worked_out_by_hand(
    history: Any, rewards: Any, rates: Rates, tau: float, size: int, expected: tuple[int, int] | None, reason: str
) -> None:
    decision = decide(history, rewards, trials_of(rates), tau, size)
    assert (decision.promote, decision.reason) == (expected is not None, reason)
    assert (decision.dataset, decision.repeat) == (expected or (None, None))
