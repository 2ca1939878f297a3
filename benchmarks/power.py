"""What a screening says before any training: strata, luck among the zeros, and what a comparison of two arms could show.

    python benchmarks/power.py docs/results/maths-screen-1.5b.jsonl [--pool 2500] [--seeds 4] [--problems 256] [--attempts 64]

Reads one JSON object a line (id, level, successes, attempts, truncated, tokens). A Beta distribution of the problems' pass
rates is fitted to the counts (maximum likelihood, beta-binomial); the rates of the problems at zero are drawn from its
posterior. Power: share of 400 simulated studies in which the t interval over seeds of the difference of pass@32 between an
arm with `gain` times the base's rate on every problem and the base excludes zero; between seeds the gain itself varies by
a factor of exp(N(0, 0.5)).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np

T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}


def log_beta(a: float | np.ndarray, b: float | np.ndarray) -> np.ndarray:
    gamma = np.vectorize(math.lgamma)
    return gamma(a) + gamma(b) - gamma(np.asarray(a) + b)


def fitted(successes_H: np.ndarray, attempts: int) -> tuple[float, float]:
    """(a, b) of the Beta distribution, on a grid."""
    best, found = -math.inf, (1.0, 1.0)
    for a in np.geomspace(0.05, 2, 60):
        for b in np.geomspace(0.1, 6, 60):
            value = float((log_beta(successes_H + a, attempts - successes_H + b) - log_beta(a, b)).sum())
            if value > best:
                best, found = value, (float(a), float(b))
    return found


def pass_at(k: int, correct: np.ndarray, samples: int) -> np.ndarray:
    """Unbiased pass@k of every problem."""
    misses = np.array([math.comb(samples - n, k) / math.comb(samples, k) for n in range(samples + 1)])
    return 1 - misses[correct]


def power(a: float, b: float, gain: float, arguments: argparse.Namespace, rng: np.random.Generator) -> float:
    shown, k = 0, 32
    for _ in range(400):
        differences = []
        for _ in range(arguments.seeds):
            rate_H = rng.beta(a, b, arguments.problems)
            lifted_H = np.minimum(1, rate_H + rate_H * (gain - 1) * math.exp(rng.normal(0, 0.5)))
            counts = [rng.binomial(arguments.attempts, rate) for rate in (lifted_H, rate_H)]
            lifted, plain = (pass_at(k, count, arguments.attempts).mean() for count in counts)
            differences.append(lifted - plain)
        mean, error = np.mean(differences), np.std(differences, ddof=1) / math.sqrt(arguments.seeds)
        shown += mean - T_975[arguments.seeds] * error > 0
    return shown / 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pool", type=int, default=2500, help="problems that could be screened")
    parser.add_argument("--seeds", type=int, default=4, choices=sorted(T_975))
    parser.add_argument("--problems", type=int, default=256, help="held-out hard problems")
    parser.add_argument("--attempts", type=int, default=64, help="attempts at each of them")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.file.read_text(encoding="utf-8").splitlines()]
    attempts = rows[0]["attempts"]
    successes_H = np.array([row["successes"] for row in rows])
    print("level  problems  at zero  pass@1  cut off  tokens")
    for level in [*sorted({row["level"] for row in rows}), None]:
        of = [row for row in rows if level in (None, row["level"])]
        made = attempts * len(of)
        print(
            f"{level or 'all':>5}  {len(of):8d}  {sum(row['successes'] == 0 for row in of):7d}  "
            f"{sum(row['successes'] for row in of) / made:6.3f}  {sum(row['truncated'] for row in of) / made:7.3f}  "
            f"{np.mean([row['tokens'] for row in of]):6.0f}"
        )
    a, b = fitted(successes_H, attempts)
    zeros, rng = int((successes_H == 0).sum()), np.random.default_rng(0)
    hidden = rng.beta(a, b + attempts, 200_000)
    again = np.mean((1 - hidden) ** attempts)
    tokens = np.mean([row["tokens"] for row in rows if row["successes"] == 0])
    print(
        f"pass rates: Beta({a:.2f}, {b:.2f}); hard in a pool of {arguments.pool}: {arguments.pool * zeros / len(rows):.0f}"
    )
    print(
        f"a problem at zero has pass rate {hidden.mean():.4f}, pass@32 {1 - np.mean((1 - hidden) ** 32):.3f}, and is at zero"
    )
    print(
        f"in {attempts} new attempts with probability {again:.2f}; expected successes of plain RL in 8 M tokens of attempts"
    )
    print(f"at such problems ({tokens:.0f} tokens each), without any learning: {8e6 / tokens * hidden.mean():.0f}")
    for gain in (1.5, 2.0, 3.0, 5.0):
        print(f"power for {gain:.1f} times the base's rate: {power(a, b + attempts, gain, arguments, rng):.2f}")


if __name__ == "__main__":
    main()
