"""pass@k by brute force, intervals by their properties, and counts that do not depend on how the work is split."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_helpers import easy_problems, tiny_config

from soar.config import EvaluateConfig
from soar.engine.policy import AdapterStack, Backbone
from soar.loop.evaluate import bootstrap_interval, count_correct, paired_difference, pass_at_k, summarize
from soar.loop.statistics import nothing_varies
from soar.run.setup import open_env


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_subsets_with_a_solution(samples: int) -> None:
    for correct in range(samples + 1):
        solved = [i < correct for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(combinations(solved, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(samples, correct, k) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_what_is_not_defined(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} from {correct} correct of {samples}"):
        pass_at_k(samples, correct, k)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=2, max_size=30), st.integers(0, 2**31))
def test_bootstrap_interval_covers_the_mean_and_stays_in_range(counts: list[int], seed: int) -> None:
    values = [count / 8 for count in counts]
    low, high = bootstrap_interval(values, seed, 400)
    if len(set(counts)) == 1:  # nothing to resample
        assert max(0.0, low) < high <= 1.0 and low <= values[0] <= high
        return
    assert min(values) <= low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= high <= max(values)
    narrow_low, narrow_high = bootstrap_interval(values, seed, 400, share=0.5)
    assert low <= narrow_low <= narrow_high <= high


def test_bootstrap_width_is_that_of_the_mean() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values, 1, 4000)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.08)


def test_summarize() -> None:
    config = EvaluateConfig(attempts=4, ks=(1, 2), bootstrap=100)
    found = summarize([0, 1, 4], 4, config, seed=0)
    assert found["pass_at"] == {"1": pytest.approx((0 + 1 / 4 + 1) / 3), "2": pytest.approx((0 + 1 / 2 + 1) / 3)}
    assert found["interval_95"]["1"] == list(bootstrap_interval([0.0, 0.25, 1.0], 0, 100))


def test_paired_difference_pairs_problems() -> None:
    a, b = [4, 0, 2, 3], [3, 0, 1, 2]
    found: dict[str, Any] = paired_difference(a, b, 4, 1, seed=0, resamples=500)
    assert found["difference"] == pytest.approx(3 / 16)
    assert found["interval_95"] == list(bootstrap_interval([0.25, 0.0, 0.25, 0.25], 0, 500))
    shifted = paired_difference([4, 1, 2, 3], [3, 0, 1, 2], 4, 1, seed=0, resamples=500)
    assert shifted["interval_95"] == list(nothing_varies(0.25, 4, floor=-1.0))
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1], [1, 2], 4, 1, seed=0, resamples=100)


def perturbed(backbone: Backbone, policies: int) -> AdapterStack:
    """Different policies, all near the base model."""
    stack = backbone.new_stack(0, policies)
    generator = torch.Generator().manual_seed(5)
    for tensor in stack.tensors.values():
        tensor += 0.01 * torch.randn(tensor.shape, generator=generator)
    return stack


def test_counts_do_not_depend_on_workers_and_blocks() -> None:
    config = tiny_config()
    problems = easy_problems(10)
    with open_env(config) as env:
        torch.set_num_threads(1)
        stack = perturbed(env.backbone, 2)
        blocks: list[list[str]] = []
        one = count_correct(env, stack, problems, 4, 7, config.student.sampling)
        other = count_correct(
            env,
            stack,
            problems,
            4,
            7,
            config.student.sampling,
            threads=3,
            block=3,
            on_block=lambda part, correct, truncated: blocks.append([p.id for p in part]),
        )
        again = count_correct(env, stack, problems, 4, 8, config.student.sampling)
        base, _ = count_correct(env, None, problems, 4, 7, config.student.sampling)
    assert blocks == [[p.id for p in problems[i : i + 3]] for i in (0, 3, 6, 9)]
    for mine, theirs in zip(one, other, strict=True):
        assert mine.shape == (2, 10)
        assert (mine == theirs).all()
    assert (one[0] != again[0]).any()
    assert base.shape == (1, 10)
    assert (one[0].sum(1) > 0).all()
