"""Fixtures that several files share."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# For child processes too. One thread of torch: the workers of pytest share the cores. Bytecode is written, or each of some
# twenty processes compiles torch and transformers anew, which takes 15 s.
given = [Path(__file__).parent.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, given))}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

LONGEST = ("test_parallel", "test_arms", "test_kill", "test_jobs", "test_stopping", "test_api", "test_surroundings")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that the workers of pytest end together."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def quick() -> Iterator[None]:
    """Without what takes longer than a tiny run: the charts of pages (test_report draws them), waiting for a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr("soar.report.page.Chart.image", lambda chart: "")
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one finished tiny run on the embedded world with two promotions. Read it, change nothing in it."""
    from loop_helpers import TINY, sets

    from soar.cli import main

    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["run", "tiny", "--out", str(out), "--quiet", *sets(*TINY)]) == 0
    return out


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def env() -> Iterator[Any]:
    """The embedded model as a tiny run opens it."""
    from loop_helpers import tiny_config

    from soar.run.setup import open_env

    with open_env(tiny_config()) as opened:
        yield opened


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the teacher's update is given, with three datasets."""
    from loop_helpers import UpdateLog

    found = UpdateLog(datasets=3)
    monkeypatch.setattr("soar.loop.teacher.update", found)
    return found
