"""Standard streams as shells leave them: a pipe without a reader, a full device, a closed descriptor, another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_folders
from helpers import ROOT

from soar.run import folder as review

# One process imports the package; every command runs in a fork of it, as `COMMAND > STDOUT` would, buffered or not.
SCRIPT = """
import io, json, os, sys
from soar.cli import main

def fork(command, target, unbuffered):
    child = os.fork()
    if child == 0:
        if target == "pipe":
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)
        elif target == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        elif target == "closed":
            os.close(1)
            os.close(0)
        errors = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(errors, 2)
        if target == "closed":
            sys.stdout = sys.stdin = None
        else:
            raw = io.FileIO(1, "w")
            sys.stdout = io.TextIOWrapper(raw if unbuffered else io.BufferedWriter(raw), write_through=unbuffered)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        code = 99
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            sys.stderr.write(repr(error))
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(sys.argv[1]) as file:
        return [code, file.read()]

print(json.dumps([fork(*one) for one in json.loads(sys.stdin.read())]))
"""


def outcomes(tmp_path: Path, every: list[tuple[list[str], str, bool]]) -> list[tuple[int, str]]:
    """(exit code, standard error) of commands with their standard output at a target; True: unbuffered."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "errors.txt")],
        input=json.dumps(every),
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [(code, said) for code, said in json.loads(done.stdout)]


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """Name -> a command that prints; none needs torch."""
    run = run_folders.write_run(tmp_path / "run", steps=3, hostile=False)
    review.ask(run, {"step": 1, "dataset": 0, "repeat": 0, "reward": 0.1}, [{"question": "q", "answer": "1"}])
    problems = tmp_path / "p.jsonl"
    problems.write_text('{"question": "one", "answer": "1"}\n' * 3)
    return {
        "help": ["--help"],
        "plan": ["run", "--dry-run"],
        "review": ["review", str(run)],
        "watch": ["watch", str(run), "--once"],
        "report": ["report", str(run), "--out", str(tmp_path / "page.html")],
        "check": ["check", "tiny", "--problems", str(problems), "--no-model"],
    }


def test_a_reader_that_has_gone_is_no_error_for_any_command(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    every = [(command, "pipe", unbuffered) for command in commands.values() for unbuffered in (False, True)]
    found = outcomes(tmp_path, every)
    for (command, _, unbuffered), (code, said) in zip(every, found, strict=True):
        assert "Traceback" not in said, (command, unbuffered, said)
        assert "Error" not in said, (command, unbuffered, said)
        # A verdict is kept when all that was printed was still in the buffer; rich ends its help pages with 1.
        allowed = {0, 1} if command[0] in ("check", "--help") else {0}
        assert code in allowed, (command, unbuffered, said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_a_named_error(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    for unbuffered in (False, True):
        ((code, said),) = outcomes(tmp_path, [(commands["review"], "full", unbuffered)])
        assert code == 1
        assert said.endswith("No space left on device\n")
        assert said.startswith("soar: ")
        assert "Traceback" not in said


def test_a_closed_descriptor_is_given_to_no_file(tmp_path: Path, commands: dict[str, list[str]]) -> None:
    """Without care the page would be opened as descriptor 1, and what is printed would stand in it."""
    page = tmp_path / "page.html"
    assert outcomes(tmp_path, [(commands["report"], "closed", False)]) == [(0, "")]
    assert page.read_text().startswith("<!doctype html>")


def test_characters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    run = tmp_path / "run"
    review.ask(run, {"step": 1}, [{"question": "5 \u00d7 7 \u2264 40, \u8fd0\u884c", "answer": "35"}])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "soar.cli", "review", str(run)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"5 \xd7 7 \u2264 40, \u8fd0\u884c" in done.stdout
