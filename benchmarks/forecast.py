"""Forecast against actual: calibrate on this device, run the embedded world briefly, print both by stage.

    python benchmarks/forecast.py [--runs 3] [--wall] [--set KEY=VALUE ...]

The error is that of actual / forecast. By default times are CPU seconds of this process, all its threads together, so that
other programs on the machine do not decide the result; workers that verify answers are left out of both sides. --wall: wall
time, for a quiet machine. Each run is calibrated anew, with another seed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from soar.config import Config, load
from soar.plan import forecast
from soar.plan.calibrate import calibrate
from soar.plan.forecast import STAGES, against, assumed
from soar.run import pipeline
from soar.run.progress import Progress
from soar.run.setup import choose_workers, open_examiner

SHORT = (
    "problems.limit=64",
    "screen.attempts=32",
    "teacher.steps=2",
    "student.steps=8",
    "arms.pq_steps=20",
    "evaluate.attempts=32",
)


def one(config: Config, wall: bool) -> list[tuple[str, float, float]]:
    """(stage, forecast, actual) of one calibration and one run."""
    clock = time.perf_counter if wall else time.process_time
    with open_examiner(config) as examiner:
        workers = choose_workers(examiner.backbone, config.threads)
        expected = forecast(config, *calibrate(examiner, config, workers, assumed(config), clock=clock))
    pipeline.time = SimpleNamespace(monotonic=clock)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        summary = pipeline.execute(config, Path(folder) / "run", False, ["benchmark"], Progress(quiet=True))
    return against(expected.stage_seconds(), summary["wall_seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    unit = "wall seconds" if arguments.wall else "CPU seconds"
    errors: dict[str, list[float]] = {stage: [] for stage in (*STAGES, "in all")}
    print(f"{'run':>3s} {'stage':10s} {'forecast':>10s} {'actual':>10s} {'error':>7s}   ({unit})")
    for run in range(arguments.runs):
        config = load(None, [*SHORT, f"seed={run}", *arguments.overrides])
        for stage, expected, actual in one(config, arguments.wall):
            errors[stage].append(actual / expected - 1)
            print(f"{run:3d} {stage:10s} {expected:10.2f} {actual:10.2f} {errors[stage][-1]:+7.1%}", flush=True)
    for stage, found in errors.items():
        if found:
            print(f"median of |error|, {stage}: {statistics.median(map(abs, found)):.1%}")


if __name__ == "__main__":
    main()
