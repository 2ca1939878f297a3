"""Notebooks run from top to bottom at tiny size, and the two forms of each are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from helpers import ROOT

TINY = {
    "screen.attempts": 2, "teacher.datasets": 2, "teacher.questions": 2, "student.repeats": 1, "student.steps": 1,
    "student.prompts_per_step": 2, "student.attempts": 2, "reward.questions": 2, "reward.baseline_attempts": 2,
    "arms.steps": 1, "arms.pq_steps": 1, "evaluate.attempts": 2, "evaluate.ks": [1, 2], "teacher.steps": 1,
    "promotion.tau": -1.0, "promotion.window": 1, "problems.limit": 8, "problems.format": "tiny", "model.adapter": "full",
    "student.sampling.max_tokens": 16, "teacher.sampling.max_tokens": 32,
}  # fmt: skip
SAID = {
    "method": ("problems are never solved", "the sets earned", "promotions: 2 in 2 outer steps"),
    "your_model": ("8 problems, 2 attempts each", "3 problems, 2 attempts each", "adapter: "),
}


@pytest.mark.parametrize("name", SAID)
def test_a_notebook_runs_and_its_pair_is_the_same(name: str, tmp_path: Path) -> None:
    path = ROOT / "notebooks" / f"{name}.py"
    cells, twins = (jupytext.read(one)["cells"] for one in (path, path.with_suffix(".ipynb")))
    shown = [[(cell["cell_type"], cell["source"]) for cell in some] for some in (cells, twins)]
    assert shown[0] == shown[1], f"write it anew: jupytext --to ipynb {path}"
    small = {"SOAR_NOTEBOOK_MODEL": "builtin:tiny", "SOAR_NOTEBOOK_SETTINGS": json.dumps(TINY)}
    environment = os.environ | small | {"MPLBACKEND": "Agg", "SOAR_NOTEBOOK_OUT": str(tmp_path)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(words in done.stdout for words in SAID[name]), done.stdout
    assert (tmp_path / "run" / "report.html").is_file()
