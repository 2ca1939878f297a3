"""Standard streams as shells leave them: a pipe without a reader, a full device, a closed descriptor, another encoding."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import run_folders
from helpers import ROOT

from soar.run import folder as review

SOAR = f"{shlex.quote(sys.executable)} -m soar.cli"


def shell(line: str, **variables: str) -> tuple[int, str, str]:
    """Exit code of the first command of a pipe, standard output and error. `soar` is this checkout's."""
    script = f"set -o pipefail; {line.replace('soar ', f'{SOAR} ', 1)}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a promotion that waits for review."""
    run = run_folders.write_run(tmp_path / "run", steps=3, hostile=False)
    question = {"question": "5 \u00d7 7 \u2264 40, \u8fd0\u884c", "answer": "35"}
    review.ask(run, {"step": 1, "dataset": 0, "repeat": 0, "reward": 0.1}, [question])
    return run


@pytest.mark.parametrize(("command", "unbuffered"), [("run --dry-run", ""), ("watch RUN --once", "1")])
def test_a_reader_that_has_gone_is_no_error(run, command, unbuffered):
    line = f"soar {command.replace('RUN', shlex.quote(str(run)))} | true"
    code, shown, said = shell(line, PYTHONUNBUFFERED=unbuffered)
    assert (code in (0, 1), shown, said) == (True, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_a_named_error():
    code, _, said = shell("soar run --dry-run > /dev/full")
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("soar: ") and said.endswith("No space left on device\n")
