"""benchmarks/cells.py on two cells made by hand: one finished, one ended in the middle of an arm."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

SCRIPT = ROOT / "benchmarks" / "cells.py"


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arm_steps(arm: str, *rates: float | None) -> list[dict[str, Any]]:
    return [{"event": "arm_step", "arm": arm, "pass_rate": rate} for rate in rates]


def table_rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| s")
    ]


def test_curves_lengths_and_right_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, form in ((0, "totals"), (1, "sums")):
        run = tmp_path / "cells" / f"soar-seed{seed}"
        write(run / "manifest.json", {"config": {"arms": {"curriculum_steps": 2}, "problems": {"format": form}}})
        write(
            run / "pq.jsonl",
            {"question": "3 + 4 + 5", "answer": "7, 12"},
            {"question": "3 + 4 + 5", "answer": "12"},
            {"question": "no sum", "answer": "1"},
        )
    run = tmp_path / "cells" / "soar-seed0"
    steps = [*arm_steps("hard_only", 0.0, 0.0, 0.25, 0.75), *arm_steps("pq", 0.5, 0.5, None, 0.0)]
    write(run / "metrics.jsonl", {"event": "outer_step", "pass_rate": 1.0}, *steps)
    test = [
        {"id": "a", "question": "1 + 2 + 3"},
        {"id": "b", "question": "1 + 2"},
        {"id": "c", "question": "4 + 5 + 6"},
    ]
    write(run / "hard" / "test.jsonl", *test)
    counts = [{"id": "a", "correct": [1, 5]}, {"id": "b", "correct": [0, 2]}, {"id": "c", "correct": [2, 0]}]
    write(run / "state" / "evaluation.jsonl", {"arms": {"base": "x", "pq": "y"}}, *counts)
    metrics = tmp_path / "cells" / "soar-seed1" / "metrics.jsonl"
    write(metrics, *arm_steps("hard_only", 0.0, 0.5), *arm_steps("ps_hard", 0.5, 0.0))
    metrics.write_text(metrics.read_text(encoding="utf-8") + '{"event": "arm_st', encoding="utf-8")  # cut off in a line
    write(tmp_path / "candidates.jsonl", *({**row, "answer": "0"} for row in test))
    write(
        tmp_path / "cells" / "soar-seed1" / "hard" / "screen.jsonl",
        {"evidence": {}},
        {"id": "a", "attempts": 2000, "successes": 1},
        {"id": "b", "attempts": 8, "successes": 0},
        {"id": "c", "attempts": 4, "successes": 2},
    )
    options = ["--steps", "2", "4", "--mean", "2", "--problems", str(tmp_path / "candidates.jsonl")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path), *options])
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    assert out.endswith("| 2 | 8 | 0 |\n| 3 | 2,004 | 3 |\n")
    assert table_rows(out) == [
        ["soar-seed0", "hard_only", "0.00", "50.00", "3"],
        ["soar-seed0", "pq", "50.00", "0.00", "–"],  # its hits are on questions, and a failed step counts as none
        ["soar-seed1", "hard_only", "25.00", "–", "2"],
        ["soar-seed1", "ps_hard", "25.00", "–", "1"],  # on hard problems from its first step
        ["soar-seed0", "2", "1", "base 0 pq 2"],
        ["soar-seed0", "3", "2", "base 3 pq 5"],
        ["soar-seed0", "3", "1"],
        ["soar-seed1", "3", "1"],
    ]
