"""One outer step of the real loop at the 3B shape, at reduced count, with its forecast and the extrapolation to the paper's.

    python benchmarks/outer_step.py [--json FILE]            Llama-3.2-3B's shape on one GPU, about three minutes
    python benchmarks/outer_step.py --shape toy --datasets 2 --repeats 1 --prompts 2 --attempts 4 --max-tokens 16 \
        --mean 12 --calibrate 1                              a toy on a CPU, to see that the script runs

Weights are random, so nothing is learned, but everything is done as in a run: the teacher writes, its texts are read, the
students train by RLOO with the KL term, are measured greedily, and the teacher learns (`OuterLoop.step`); only the domain is
one that random text satisfies (random_domain.py). One token in `--mean` ends a completion. First the forecast of exactly
this step is printed, from a calibration as `soar run --calibrate` makes it; then the step is done and timed by part. The
first step of a process pays once for kernels, plans and memory, which no forecast counts: with `--warm` the second one is
compared. The last lines scale the rates of the step that was done to the paper's outer step (16 students, 10 RLOO steps, 64
questions a dataset, 64 reward questions, up to 1,024 tokens); that is an extrapolation, not a measurement.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("3b", "135m", "toy"), default="3b")
    numbers = {
        "datasets": 2, "repeats": 2, "questions": 16, "steps": 3, "prompts": 8, "attempts": 32, "max-tokens": 320,
        "mean": 300, "reward-questions": 16, "verify-workers": 2,
    }  # fmt: skip
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--calibrate", type=float, default=150.0, help="seconds for the calibration, about")
    parser.add_argument("--warm", action="store_true", help="compare the second step; the first is timed and printed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


if __name__ == "__main__":  # worker processes import this file, and torch would take them seconds
    from outer_step_parts import main

    main(parsed())
