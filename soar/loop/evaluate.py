"""Held-out results: attempts counted, pass@k, intervals over problems and over seeds, paired tests. Needs no torch.

Over seeds the t interval of the seeds' means leads; beside it stands the pigeonhole bootstrap (Owen 2007, arXiv 0705.1428),
which draws seeds and problems with replacement, each problem for all seeds that hold it together. Where nothing was solved,
resampling says [0, 0], and hardly more where next to nothing was, or all but a few: there Clopper-Pearson's interval counts.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy  # its `stats` is loaded by the first look at it, which takes a second

from soar import seeds
from soar.config import Config, EvaluateConfig
from soar.loop.parallel import Tick, map_tasks
from soar.types import Problem

if TYPE_CHECKING:  # the estimators need no torch, so that a run can be checked without it
    from soar.engine.policy import AdapterStack
    from soar.loop.rollout import RolloutEnv

Interval = tuple[float, float]
Values = Mapping[str, float]  # problem -> value
ENDS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # of a 95 % interval
BLOCK = 8  # problems of a piece of work; the counts do not depend on it
FEW = 6  # values that are not 0 (or 1): fewer of them, all on one side, have p > 0.05 by their signs
FLIPS = 2**16  # sign flips: all of them for up to 16 differences, else so many random ones


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for c correct of n samples: unbiased (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} from {correct} correct of {samples} samples is not defined")
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def rate_of_unsolved(successes: Sequence[int], attempts: int, most: int = 0, before: int = 0) -> float | None:
    """Expected success rate of an attempt at a problem solved in at most `most` of `attempts` (Good 1953, Robbins 1956).

    successes: per problem. Sum over x <= most of (x + 1) n(x + 1), over attempts times the sum of n(x); n(x) problems were
    solved x times. Where screening leaves one with more than `most` successes after `before` attempts, one of most + 1
    is seen with probability 1 - C(before, most + 1) / C(attempts, most + 1). None where no success says anything.
    """
    hard = sum(count <= most for count in successes)
    seen = 1 - math.comb(before, most + 1) / math.comb(attempts, most + 1)
    total = sum(count for count in successes if count <= most) + (most + 1) * list(successes).count(most + 1) / seen
    return total / (attempts * hard) if hard and total else None


def bootstrap_interval(values_H: Sequence[float], seed: int, resamples: int, floor: float = 0.0) -> Interval:
    """Percentile interval of the mean over problems, by resampling problems with replacement.

    Where all values are equal `nothing_varies`, and `as_far` for few that are not 0, or not 1. floor: the lowest value that
    there can be, -1 for differences.
    """
    values = np.asarray(values_H, dtype=np.float64)
    if len(set(values.tolist())) == 1:
        return as_far(nothing_varies(float(values[0]), len(values), floor), values, floor)
    rng = seeds.generator(seed, "bootstrap")
    picks = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), ENDS)
    return as_far((float(low), float(high)), values, floor)


def as_far(interval: Interval, values: np.ndarray, floor: float) -> Interval:
    """An interval that reaches as far as Clopper-Pearson's, of what lies above 0 and of what lies below, where fewer than FEW
    values are not 0, or not 1: resampling knows next to nothing of so few.
    """
    if not any(0 < np.count_nonzero(size) < FEW for size in (values, np.abs(values) - 1.0)):
        return interval
    above = clopper_pearson(float(values.clip(min=0.0).sum()), len(values))
    below = clopper_pearson(float(-values.clip(max=0.0).sum()), len(values)) if floor < 0 else (0.0, 0.0)
    return min(interval[0], above[0] - below[1]), max(interval[1], above[1] - below[0])


def nothing_varies(value: float, trials: int, floor: float = 0.0) -> Interval:
    """Clopper-Pearson's reach around a value that all `trials` independent units have: 0 of 96 problems -> (0, 0.038)."""
    reach = 1.0 - ENDS[0] ** (1 / trials)
    return max(floor, value - reach), min(1.0, value + reach)


def pigeonhole_interval(values_S: Sequence[Values], seed: int, resamples: int) -> Interval:
    """Percentile interval of the mean over seeds of the means over problems (module text).

    values_S: one mapping a seed; what two seeds call by one name is drawn for both together.
    """
    rng = seeds.generator(seed, "pigeonhole bootstrap")
    names = list(dict.fromkeys(name for values in values_S for name in values))
    place = {name: i for i, name in enumerate(names)}
    drawn_M_U = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples).astype(np.float64)
    means_M_S = np.empty((resamples, len(values_S)))
    for s, values in enumerate(values_S):
        drawn_M_H = drawn_M_U[:, [place[name] for name in values]]
        many_M = drawn_M_H.sum(axis=1)
        values_H = np.fromiter(values.values(), dtype=np.float64)
        means_M_S[:, s] = np.where(many_M > 0, drawn_M_H @ values_H / np.maximum(many_M, 1), values_H.mean())
    seeds_M_S = rng.integers(0, len(values_S), size=means_M_S.shape)
    means_M = np.take_along_axis(means_M_S, seeds_M_S, axis=1).mean(axis=1)
    low, high = np.quantile(means_M, ENDS)
    return float(low), float(high)


def t_interval(means_S: Sequence[float]) -> Interval | None:
    """95 % interval of the mean over seeds by Student's t; None for fewer than two seeds."""
    if len(means_S) < 2:
        return None
    half = float(scipy.stats.t.ppf(0.975, len(means_S) - 1)) * statistics.stdev(means_S) / math.sqrt(len(means_S))
    centre = statistics.fmean(means_S)
    return centre - half, centre + half


def clopper_pearson(successes: float, trials: float) -> Interval:
    """95 % interval of a share (Clopper and Pearson 1934); (0, 1) without trials. `trials` may be an effective number."""
    beta = scipy.stats.beta
    low = float(beta.ppf(0.025, successes, trials - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(0.975, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value that differences (of seeds, or of problems) are symmetric around 0, by flipping their signs.

    With n seeds it is at least 2 / 2^n: 0.0625 for five. 1 for no differences and for one.
    """
    if len(differences) < 2:
        return 1.0
    values, rng = np.asarray(differences, dtype=np.float64), seeds.generator(seed, "sign flips")
    how = {"permutation_type": "samples", "vectorized": True, "n_resamples": FLIPS, "batch": 4096, "rng": rng}
    return float(scipy.stats.permutation_test((values,), lambda values, axis: values.sum(axis=axis), **how).pvalue)


def told_apart(steps: Sequence[Sequence[tuple[float, float]]], repeats: int) -> tuple[float, float] | None:
    """(F, p) of a one-way analysis of variance within steps: whether rewards tell the sets of a step apart.

    steps: of each step (mean, standard error over `repeats` students) of every set. None where nothing can be told: one
    student a set, one set a step, or students that are all alike.
    """
    compared = [sets for sets in steps if len(sets) > 1]
    count = sum(map(len, compared))
    chance = sum(error**2 for sets in compared for _, error in sets) / max(1, count)
    if repeats < 2 or not chance > 0:
        return None
    between = sum(statistics.variance([reward for reward, _ in sets]) * (len(sets) - 1) for sets in compared)
    ratio = between / (count - len(compared)) / chance
    return ratio, float(scipy.stats.f.sf(ratio, count - len(compared), count * (repeats - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of a family of comparisons adjusted so that any false one among them has its stated chance (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def over_seeds(values_S: Sequence[Values], seed: int, resamples: int, floor: float = 0.0) -> dict[str, Any]:
    """The mean over seeds of the means over problems, with its intervals.

    values_S: pass@k (or, with floor = -1, a difference of two), one mapping a seed. interval_95, the one to lead with:
    Student's t over the seeds within what can be; the bootstrap's for one seed and for seeds with one mean.
    """
    means_S = [statistics.fmean(values.values()) for values in values_S]
    every = {value for values in values_S for value in values.values()}
    problems = len({name for values in values_S for name in values})
    if len(every) == 1:
        bootstrap = nothing_varies(every.pop(), problems, floor=floor)
    else:
        bootstrap = pigeonhole_interval(values_S, seed, resamples)
    if len(values_S) == 1:
        bootstrap = as_far(bootstrap, np.array([*values_S[0].values()]), floor)
    low, high = t_interval(means_S) or (0.0, 0.0)
    return {
        "mean": statistics.fmean(means_S),
        "interval_95": [max(low, floor), min(high, 1.0)] if low < high else list(bootstrap),
        "bootstrap_95": list(bootstrap),
        "per_seed": means_S,
    }


def paired_over_seeds(a_S: Sequence[Values], b_S: Sequence[Values], seed: int, resamples: int) -> dict[str, Any]:
    """`over_seeds` of a - b on the same problems of the same seeds, with the p-value. Raises KeyError for other problems."""
    gaps_S = [{name: a[name] - b[name] for name in {**a, **b}} for a, b in zip(a_S, b_S, strict=True)]
    spread = over_seeds(gaps_S, seed, resamples, floor=-1.0)
    return {"difference": spread.pop("mean"), **spread, "p_seeds": sign_flip_p(spread["per_seed"], seed)}


def summarize(correct_H: Sequence[int], config: EvaluateConfig, seed: int) -> dict[str, dict[str, Any]]:
    """`pass_at` and `interval_95`, keyed by k as text, from correct counts per problem."""
    values_K = {str(k): [pass_at_k(config.attempts, correct, k) for correct in correct_H] for k in config.ks}
    interval = {k: list(bootstrap_interval(values, seed, config.bootstrap)) for k, values in values_K.items()}
    return {"pass_at": {k: float(np.mean(values)) for k, values in values_K.items()}, "interval_95": interval}


def paired_differences(a_H: Sequence[int], b_H: Sequence[int], config: EvaluateConfig, seed: int) -> dict[str, Any]:
    """k as text -> mean of pass@k(a) - pass@k(b) over the same problems, from correct counts, with bootstrap interval."""
    differences = {}
    for k in config.ks:
        at = partial(pass_at_k, config.attempts, k=k)
        values = [at(a) - at(b) for a, b in zip(a_H, b_H, strict=True)]
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


def count_correct(
    env: "RolloutEnv", stack: "AdapterStack | None", problems: list[Problem], config: Config, seed: int, done: Tick
) -> np.ndarray:
    """Correct attempts, truncated attempts, generated tokens [3, P, H] of every slice (P = 1 for the base model).

    evaluate.attempts at evaluate.temperature, the same problems and seeds for every slice. done(problems counted just now).
    """
    blocks = [(problems[first : first + BLOCK],) for first in range(0, len(problems), BLOCK)]
    counts: list[np.ndarray] = []
    for result in map_tasks(env, count_block, (stack, config, seed), blocks):
        counts.append(result)
        done(result.shape[2])
    return np.concatenate(counts, axis=2)


def count_block(
    env: "RolloutEnv", tick: Tick, stack: "AdapterStack | None", config: Config, seed: int, problems: list[Problem]
) -> np.ndarray:
    """The counts of `count_correct` at a few problems, as a piece of work."""
    policies, attempts = stack.policies if stack is not None else 1, config.evaluate.attempts
    sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
    stack = stack.to(env.backbone.device) if stack is not None else None
    batch = env.rollout(stack, [problems] * policies, attempts, [seed] * policies, sampling)
    counted = (batch.solved_P_Q_N, ~batch.rollouts.ended_B, batch.rollouts.length_B)
    shape = (policies, len(problems), attempts)
    return np.stack([values.view(shape).sum(-1).cpu().numpy() for values in counted])
