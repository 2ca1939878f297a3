"""The promotion rule against a plain transcription of it, and its corners worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_helpers import transcription

from soar.loop.promotion import decide, lower_median
from soar.types import Trial

# Sixteenths, so that sums are exact, ties are common and the mean meets tau exactly at times.
sixteenths = st.integers(-8, 8).map(lambda i: i / 16)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[float], list[float | None], list[list[float | None]], float, int]:
    size = draw(st.integers(1, 4))
    history = draw(st.lists(sixteenths, max_size=7))
    G, R = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rate = st.one_of(st.none(), st.integers(0, 4).map(lambda i: i / 4))
    rates = [draw(st.lists(rate, min_size=R, max_size=R)) for _ in range(G)]
    rewards = [None if set(row) == {None} else draw(sixteenths) for row in rates]
    return history, rewards, rates, draw(sixteenths), size


def trials_of(rates: list[list[float | None]]) -> list[Trial]:
    """A failed student keeps a pass rate that would be chosen if it counted."""
    return [
        Trial(k, j, 0.5 if rate is None else rate, failed=rate is None)
        for k, row in enumerate(rates)
        for j, rate in enumerate(row)
    ]


@settings(max_examples=400, deadline=None)
@given(situations())
def test_decide_is_the_algorithm(
    situation: tuple[list[float], list[float | None], list[list[float | None]], float, int],
) -> None:
    history, rewards, rates, tau, size = situation
    decision = decide(history, rewards, trials_of(rates), tau, size)
    expected = transcription(history, rewards, rates, tau, size)
    assert decision.promote == (expected is not None)
    assert (decision.dataset, decision.repeat) == (expected or (None, None))
    assert decision.window_mean == (sum(history[-size:]) / size if len(history) >= size else None)


@pytest.mark.parametrize(
    ("rates", "repeat"),
    [
        ([0.3], 0),
        ([0.3, 0.1], 1),
        ([0.3, 0.1, 0.2], 2),
        ([0.4, 0.3, 0.1, 0.2], 3),
        ([0.2, 0.2, 0.1, 0.2], 0),
        ([0.5, 0.5, 0.5, 0.5], 1),
    ],
)
def test_lower_median(rates: list[float], repeat: int) -> None:
    assert lower_median([Trial(0, j, rate) for j, rate in enumerate(rates)]).repeat == repeat


def test_lower_median_of_nothing() -> None:
    with pytest.raises(ValueError, match="no trials"):
        lower_median([])


def test_the_mean_must_exceed_tau() -> None:
    trials = [Trial(0, 0, 0.5)]
    at = decide([0.25, 0.25, 0.25], [0.25], trials, tau=0.25, size=3)
    above = decide([0.25, 0.25, 0.2501], [0.25], trials, tau=0.25, size=3)
    assert not at.promote
    assert at.reason == "window mean 0.2500 does not exceed tau 0.25"
    assert above.promote


def test_a_window_that_is_not_full_never_promotes() -> None:
    decision = decide([9.0, 9.0], [9.0], [Trial(0, 0, 1.0)], tau=0.0, size=3)
    assert (decision.promote, decision.window_mean) == (False, None)
    assert decision.reason == "window holds 2 of 3 steps"


def test_only_the_last_steps_count() -> None:
    decision = decide([9.0, 0.0, 0.0, 0.0], [0.0], [Trial(0, 0, 1.0)], tau=0.1, size=3)
    assert (decision.promote, decision.window_mean) == (False, 0.0)


def test_equal_rewards_promote_the_first_dataset() -> None:
    trials = [Trial(k, j, 0.1 * j) for k in range(3) for j in range(3)]
    decision = decide([1.0], [0.5, 0.7, 0.7], trials, tau=0.0, size=1)
    assert (decision.dataset, decision.repeat) == (1, 1)


def test_the_largest_reward_may_be_negative() -> None:
    trials = [Trial(k, 0, 0.0) for k in range(3)]
    assert decide([1.0], [-0.5, None, -0.2], trials, tau=0.0, size=1).dataset == 2


def test_failed_students_are_not_promoted() -> None:
    trials = [Trial(0, 0, 0.9, failed=True), Trial(0, 1, 0.2), Trial(0, 2, 0.4), Trial(0, 3, 0.5, failed=True)]
    assert decide([1.0], [0.3], trials, tau=0.0, size=1).repeat == 1


def test_a_step_in_which_all_failed_promotes_nobody() -> None:
    decision = decide([1.0], [None, None], [Trial(k, 0, 1.0, failed=True) for k in range(2)], tau=0.0, size=1)
    assert (decision.promote, decision.reason) == (False, "every student of this step failed")
