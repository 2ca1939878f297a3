"""Statistics of held-out results: pass@k, intervals over problems and seeds, paired tests. Needs no torch.

pass@k is the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374, eq. 1): 1 - C(n - c, k) / C(n, k) for c correct of n
samples. Over seeds S and problems H the hierarchical bootstrap draws seeds with replacement and, within every drawn seed,
problems with replacement (Davison and Hinkley 1997, section 3.8); with few seeds it is somewhat too narrow, so the
t interval over seed means stands beside it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from soar import seeds

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
EXACT_SEEDS = 16  # seeds up to which all 2^S sign flips are taken
FLIPS = 10_000


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k draws without replacement from `samples` (of which `correct` solve) solves.

    Raises ValueError unless 0 <= correct <= samples and 1 <= k <= samples.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} from {correct} correct of {samples} samples is not defined")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def bootstrap_interval(
    values_H: Sequence[float], seed: int, resamples: int, share: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over problems, by resampling problems with replacement."""
    values = np.asarray(values_H, dtype=np.float64)
    rng = seeds.generator(seed, "bootstrap")
    picks = rng.integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def hierarchical_interval(
    values_S_H: Sequence[Sequence[float]], seed: int, resamples: int, share: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean over seeds of the means over problems (module text).

    values_S_H: one list a seed, not necessarily equally long. With one seed it is `bootstrap_interval`'s kind.
    """
    rng = seeds.generator(seed, "hierarchical bootstrap")
    S = len(values_S_H)
    drawn_M_S = rng.integers(0, S, size=(resamples, S))
    total_M = np.zeros(resamples)
    for s, values_H in enumerate(values_S_H):
        values = np.asarray(values_H, dtype=np.float64)
        rows, _ = np.nonzero(drawn_M_S == s)
        if len(rows):
            picks = rng.integers(0, len(values), size=(len(rows), len(values)))
            np.add.at(total_M, rows, values[picks].mean(axis=1))
    low, high = np.quantile(total_M / S, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def t_interval(means_S: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean over seeds by Student's t; None for fewer than two seeds."""
    if len(means_S) < 2:
        return None
    quantile = T_95[min(len(means_S) - 1, len(T_95)) - 1]
    half = quantile * statistics.stdev(means_S) / math.sqrt(len(means_S))
    centre = statistics.fmean(means_S)
    return centre - half, centre + half


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value that differences (of seeds, or of problems) are symmetric around 0, by flipping their signs.

    All 2^n flips for up to EXACT_SEEDS differences (the smallest p-value is then 2 / 2^n: 0.0625 for five), else FLIPS
    random ones, with the observed one counted. 1 for no differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        return 1.0
    slack = 1e-12 * float(np.abs(values).sum())
    if len(values) <= EXACT_SEEDS:
        signs_F_n = np.array(list(itertools.product((1.0, -1.0), repeat=len(values))))
        return float(np.mean(np.abs(signs_F_n @ values) >= abs(values.sum()) - slack))
    signs_F_n = seeds.generator(seed, "sign flips").choice((1.0, -1.0), size=(FLIPS, len(values)))
    extreme = int(np.sum(np.abs(signs_F_n @ values) >= abs(values.sum()) - slack))
    return (extreme + 1) / (FLIPS + 1)


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """95 % Wilson score interval of a share; (0, 1) without trials. `trials` may be an effective number."""
    if trials <= 0:
        return 0.0, 1.0
    z, p = 1.959964, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def over_seeds(correct_S_H: Sequence[Sequence[int]], samples: int, k: int, seed: int, resamples: int) -> dict[str, Any]:
    """One arm's pass@k over seeds: mean, hierarchical interval, t interval, spread, and the value of every seed."""
    values_S_H = [[pass_at_k(samples, correct, k) for correct in row] for row in correct_S_H]
    return _spread(values_S_H, "mean", seed, resamples)


def paired_over_seeds(
    correct_a_S_H: Sequence[Sequence[int]],
    correct_b_S_H: Sequence[Sequence[int]],
    samples: int,
    k: int,
    seed: int,
    resamples: int,
) -> dict[str, Any]:
    """pass@k(a) - pass@k(b) on the same problems of the same seeds, with intervals and two p-values.

    p_seeds: sign flips of the seeds' mean differences, for a claim about new seeds. p_problems: sign flips of single
    problems in all seeds together, for a claim about these trained students only. ratio: mean of a over mean of b (None
    when b is 0).
    """
    a_S_H = [[pass_at_k(samples, correct, k) for correct in row] for row in correct_a_S_H]
    b_S_H = [[pass_at_k(samples, correct, k) for correct in row] for row in correct_b_S_H]
    gaps_S_H = [[a - b for a, b in zip(a_H, b_H, strict=True)] for a_H, b_H in zip(a_S_H, b_S_H, strict=True)]
    found = _spread(gaps_S_H, "difference", seed, resamples)
    mean_a, mean_b = (statistics.fmean(statistics.fmean(row) for row in rows) for rows in (a_S_H, b_S_H))
    return {
        **found,
        "ratio": mean_a / mean_b if mean_b > 0 else None,
        "p_seeds": sign_flip_p(found["per_seed"], seed),
        "p_problems": sign_flip_p([gap for gaps in gaps_S_H for gap in gaps if gap], seed),
    }


def _spread(values_S_H: Sequence[Sequence[float]], name: str, seed: int, resamples: int) -> dict[str, Any]:
    means_S = [statistics.fmean(values_H) for values_H in values_S_H]
    t = t_interval(means_S)
    return {
        name: statistics.fmean(means_S),
        "interval_95": list(hierarchical_interval(values_S_H, seed, resamples)),
        "t_interval_95": None if t is None else list(t),
        "seed_sd": statistics.stdev(means_S) if len(means_S) > 1 else None,
        "per_seed": means_S,
    }
