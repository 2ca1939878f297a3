"""Held-out pass@k with intervals: bootstraps over problems, without the spread over training seeds (`study` has that)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from soar import seeds
from soar.config import Config, EvaluateConfig
from soar.loop.parallel import Tick, spread
from soar.loop.statistics import bootstrap_interval, pass_at_k
from soar.types import Problem

if TYPE_CHECKING:  # the estimators need no torch, so that a run can be checked without it
    from soar.engine.policy import AdapterStack
    from soar.loop.rollout import RolloutEnv


def summarize(correct_H: Sequence[int], config: EvaluateConfig, seed: int) -> dict[str, dict[str, Any]]:
    """`pass_at` and `interval_95`, keyed by k as text, from correct counts per problem."""
    values_K = {str(k): [pass_at_k(config.attempts, correct, k) for correct in correct_H] for k in config.ks}
    interval = {k: list(bootstrap_interval(values, seed, config.bootstrap)) for k, values in values_K.items()}
    return {"pass_at": {k: float(np.mean(values)) for k, values in values_K.items()}, "interval_95": interval}


def paired_differences(a_H: Sequence[int], b_H: Sequence[int], config: EvaluateConfig, seed: int) -> dict[str, Any]:
    """k as text -> mean of pass@k(a) - pass@k(b) over the same problems, from correct counts, with bootstrap interval."""
    differences = {}
    for k in config.ks:
        a_at, b_at = ([pass_at_k(config.attempts, correct, k) for correct in counts_H] for counts_H in (a_H, b_H))
        values = [a - b for a, b in zip(a_at, b_at, strict=True)]
        interval = bootstrap_interval(values, seed, config.bootstrap, floor=-1.0)
        differences[str(k)] = {"difference": float(np.mean(values)), "interval_95": list(interval)}
    return differences


def results_of(counts: Mapping[str, Sequence[int]], config: EvaluateConfig, seed: int) -> dict[str, Any]:
    """What `soar eval` reports of correct attempts per problem: policies with intervals, differences from `base`."""
    place, paired_place, base_H = seeds.derive(seed, "evaluate"), seeds.derive(seed, "paired"), counts["base"]
    policies = {name: {**summarize(a_H, config, place), "correct": list(a_H)} for name, a_H in counts.items()}
    pairs = ((f"{name} - base", a_H) for name, a_H in counts.items() if name != "base")
    paired = {pair: paired_differences(a_H, base_H, config, paired_place) for pair, a_H in pairs}
    head = config.model_dump(include={"attempts", "temperature", "bootstrap"})
    return {**head, "seed": seed, "policies": policies, "paired": paired}


BLOCK = 8  # problems of a piece of work; the counts do not depend on it


def count_correct(
    env: RolloutEnv, stack: AdapterStack | None, problems: list[Problem], config: Config, seed: int, done: Tick
) -> np.ndarray:
    """Correct attempts, truncated attempts, generated tokens [3, P, H] of every slice (P = 1 for the base model).

    `evaluate.attempts` attempts at evaluate.temperature, all at the same problems and seeds. done(problems counted just now)
    is called in order.
    """
    blocks = [(problems[first : first + BLOCK],) for first in range(0, len(problems), BLOCK)]
    counts: list[np.ndarray] = []
    for result in spread(env, count_block, (stack, config, seed), blocks):
        counts.append(result)
        done(result.shape[2])
    return np.concatenate(counts, axis=2)


def count_block(
    env: RolloutEnv, tick: Tick, stack: AdapterStack | None, config: Config, seed: int, problems: list[Problem]
) -> np.ndarray:
    """The counts of `count_correct` at a few problems, as a piece of work."""
    policies, attempts = stack.policies if stack is not None else 1, config.evaluate.attempts
    sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
    stack = stack.to(env.backbone.device) if stack is not None else None
    batch = env.rollout(stack, [problems] * policies, attempts, [seed] * policies, sampling)
    counted = (batch.solved_P_Q_N & batch.valid_P_Q_N, ~batch.rollouts.ended_B, batch.rollouts.length_B)
    shape = (policies, len(problems), attempts)
    return np.stack([values.view(shape).sum(-1).cpu().numpy() for values in counted])
