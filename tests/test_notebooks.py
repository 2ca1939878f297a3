"""Notebooks run from top to bottom, and the two forms of each are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest
from helpers import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_pair_is_the_same(path: Path, tmp_path: Path) -> None:
    cells, twins = (jupytext.read(one)["cells"] for one in (path, path.with_suffix(".ipynb")))
    shown = [[(cell["cell_type"], cell["source"]) for cell in some] for some in (cells, twins)]
    assert shown[0] == shown[1], f"write it anew: jupytext --to ipynb {path}"
    environment = os.environ | {"MPLBACKEND": "Agg", "SOAR_NOTEBOOK_OUT": str(tmp_path)}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "problems are never solved" in done.stdout and (tmp_path / "run" / "report.html").is_file()
