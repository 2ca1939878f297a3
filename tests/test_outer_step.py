"""The benchmark of one outer step on random weights: it goes through the real loop at a toy shape and says what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import house
import pytest
from loop_helpers import tiny_config
from soar.plan.calibrate import Calibrator
from soar.plan.probe import Timed, at_full, rate_at_full

SCRIPT = house.ROOT / "benchmarks" / "outer_step.py"
TOY = {
    "shape": "toy", "datasets": 2, "repeats": 1, "questions": 2, "steps": 2, "prompts": 1, "attempts": 2, "max-tokens": 6,
    "mean": 4, "reward-questions": 2, "verify-workers": 1, "calibrate": 0.5,
}  # fmt: skip


@pytest.mark.timeout(300)
def test_an_outer_step_of_random_weights_is_forecast_done_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(SCRIPT),
        *(f"--{key}={value}" for key, value in TOY.items()),
        f"--json={out}",
        "--warm",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    parts = {"teacher writes", "students train", "students measured", "teacher learns"}
    assert set(figures["first_step_s"]) == parts and figures["first_step_s"] != figures["actual_s"]
    assert set(figures["forecast_s"]) == set(figures["actual_s"]) == parts
    assert all(seconds > 0 for seconds in figures["actual_s"].values())
    for part in parts:
        assert figures["errors"][part] == pytest.approx(figures["actual_s"][part] / figures["forecast_s"][part] - 1)
    # 160 steps of students at 8 x 32 rollouts: at the rates of this step, whatever they were.
    rates = figures["rates"]
    longer, shorter = figures["paper_step"][-1], figures["paper_step"][0]
    prompt = figures["calibrated"]["assumptions"]["question_prompt_tokens"]
    for row in (longer, shorter):
        tokens = row["tokens"]
        rollouts = 160 * 8 * 32
        seconds = rollouts * (tokens / rates["sample"]["student"] + (tokens + prompt) / rates["train"]["student"])
        assert row["students train"] == pytest.approx(seconds)
        assert row["gpu_hours"] == pytest.approx(sum(row[part] for part in parts) / 3600)
    assert "extrapolated, not measured" in done.stdout


def test_a_calibration_on_a_cpu_times_two_sizes_where_not_all_rows_fit() -> None:
    """A call takes 2 s and half a second a row; 16 s a part."""
    now, sizes = [0.0], []

    def work(size: int) -> None:
        sizes.append(size)
        now[0] += 2.0 + 0.5 * size

    backbone = SimpleNamespace(device=SimpleNamespace(type="cpu"))
    parts = dict.fromkeys(("sampler", "fmt", "verifier", "scheme", "parts"))
    env: Any = SimpleNamespace(backbone=backbone, **parts)
    calibrator = Calibrator(env, tiny_config(), 1, seconds=96.0, clock=lambda: now[0])
    points, _ = calibrator._sized("write", 32, work)
    assert sizes == [4, 4, 16] and [point.size for point in points] == [4, 16]
    assert at_full([(point.size, point.seconds) for point in points], 32) == 2.0 + 0.5 * 32
    assert calibrator.found.shares["write"] == 0.5
    sizes.clear()
    points, _ = calibrator._sized("write", 4, work)
    assert sizes == [1, 4] and len(points) == 1


def test_what_part_of_the_rows_took_is_stretched_to_all() -> None:
    # One point: in proportion. Two: 2 s whatever happens, and half a second a row.
    assert at_full([(4, 3.0)], 8) == 6.0
    assert at_full([(2, 3.0), (4, 4.0)], 32) == 18.0
    assert at_full([(2, 3.0), (32, 18.0)], 32) == 18.0
    assert at_full([(2, 3.0), (4, 2.0)], 32) == 2.0  # a fluctuation: no row makes it faster
    assert rate_at_full([Timed(2, 3.0, 20), Timed(4, 4.0, 40)], 32) == 320 / 18
