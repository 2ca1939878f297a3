"""Intervals and tests over seeds: against brute force, closed forms and hand-worked numbers."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar.loop.statistics import (
    FLIPS,
    hierarchical_interval,
    over_seeds,
    paired_over_seeds,
    sign_flip_p,
    t_interval,
    wilson_interval,
)


def test_hierarchical_width_has_both_sources_of_spread() -> None:
    """Variance of the mean: spread of seeds / S + spread of problems / (S H)."""
    rng = np.random.default_rng(0)
    S, H = 40, 25
    centres = rng.normal(0.5, 0.1, S)
    values = [(centre + rng.normal(0, 0.3, H)).tolist() for centre in centres]
    means = [statistics.fmean(row) for row in values]
    within = statistics.fmean(np.var(row) for row in values)
    sd = (np.var(means) / S + within / (S * H)) ** 0.5
    low, high = hierarchical_interval(values, 1, 4000)
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.08)
    assert low < statistics.fmean(means) < high
    flat = [[statistics.fmean(row)] * H for row in values]
    narrow = hierarchical_interval(flat, 1, 4000)
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * (np.var(means) / S) ** 0.5, rel=0.08)


def test_hierarchical_interval_weighs_seeds_equally_and_repeats() -> None:
    values = [[1.0] * 3, [0.0] * 300]
    low, high = hierarchical_interval(values, 5, 2000)
    assert (low, high) == (0.0, 1.0)
    assert hierarchical_interval(values, 5, 2000) == (low, high)
    assert hierarchical_interval([[0.25] * 4, [0.25] * 9], 0, 100) == pytest.approx((0.25, 0.25))


def test_t_interval_by_hand() -> None:
    # Mean 2, sd 1, three seeds: 4.303 / sqrt(3) on each side.
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert t_interval([1.0]) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-6, 6), min_size=1, max_size=7))
def test_sign_flips_are_all_counted(values: list[int]) -> None:
    flips = [
        sum(s * v for s, v in zip(signs, values, strict=True))
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    wanted = sum(abs(flip) >= abs(sum(values)) for flip in flips) / len(flips)
    assert sign_flip_p([float(v) for v in values]) == pytest.approx(wanted)


def test_sign_flips_of_many_values() -> None:
    assert sign_flip_p([]) == 1.0
    assert sign_flip_p([1.0] * 5) == 2 / 32
    assert sign_flip_p([1.0] * 40) == 1 / (FLIPS + 1)
    assert sign_flip_p([1.0, -1.0] * 20) == 1.0


def test_wilson_interval_by_hand() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    z2 = 1.959964**2
    assert wilson_interval(0, 10) == pytest.approx((0.0, z2 / (10 + z2)))
    low, high = wilson_interval(5, 10)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert wilson_interval(50, 100)[0] > low


def test_over_seeds() -> None:
    found = over_seeds([[0, 4], [2, 2], [4, 4]], 4, 1, 0, 200)
    assert found["per_seed"] == [0.5, 0.5, 1.0]
    assert found["mean"] == pytest.approx(2 / 3)
    assert found["seed_sd"] == pytest.approx(statistics.stdev([0.5, 0.5, 1.0]))
    assert found["interval_95"] == list(hierarchical_interval([[0, 1], [0.5, 0.5], [1, 1]], 0, 200))
    one = over_seeds([[1, 3]], 4, 1, 0, 200)
    assert (one["t_interval_95"], one["seed_sd"]) == (None, None)


def test_paired_over_seeds() -> None:
    found = paired_over_seeds([[4, 2], [3, 3]], [[2, 2], [1, 3]], 4, 1, 0, 200)
    assert found["per_seed"] == [0.25, 0.25]
    assert found["difference"] == 0.25
    assert found["ratio"] == pytest.approx(0.75 / 0.5)
    assert found["p_seeds"] == 0.5  # two seeds: the observed signs and their mirror of four
    assert found["p_problems"] == 0.5  # two problems differ
    assert paired_over_seeds([[1]], [[0]], 4, 1, 0, 100)["ratio"] is None
    with pytest.raises(ValueError, match="zip"):
        paired_over_seeds([[1]], [[1, 2]], 4, 1, 0, 100)
