"""Fixtures that several files share."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of torch, also in child processes: the workers of pytest share the cores


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished tiny run on the embedded world with two promotions. Read it, change nothing in it."""
    from loop_helpers import run_tiny

    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_tiny(out, report=True)
    return out


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without their page, the charts of which take longer than a tiny run."""
    monkeypatch.setattr("soar.run.pipeline.report_at_the_end", lambda path, say: None)
