"""Inputs that must not break a command, each with what it ends with: the one table (docs/reliability.md has the numbers).

A row: number and what it is, how the folder is prepared (a function of the copy of a finished run), the command, in which RUN
is that folder, its exit code, and words of its only message. No row may end in a traceback, run the code that a folder
names, or, where it is refused, change a file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from loop_helpers import TINY
from test_record import change, content, spoil

from soar.cli import main
from soar.run.interrupts import resume_command

SETS = " ".join(f"--set {override}" for override in TINY if '"' not in override)
EVIL = "import pathlib\npathlib.Path({mark!r}).touch()\nfrom soar.domains import *\nD = check = None\n"
Prepare = Callable[[Path], Any]


def manifest(section: str, key: str, value: Any) -> Prepare:
    """Sets a key of the recorded config."""

    def prepare(run: Path) -> None:
        document = json.loads((run / "manifest.json").read_text())
        (document["config"][section] if section else document)[key] = value
        (run / "manifest.json").write_text(json.dumps(document))

    return prepare


def named(key: str) -> Prepare:
    """The config names a function of a Python file beside the run, which leaves a mark when it is read."""

    def prepare(run: Path) -> None:
        (run.parent / "evil.py").write_text(EVIL.format(mark=str(run.parent / "ran")))
        manifest("problems", key, f"{run.parent}/evil.py:D")(run)

    return prepare


def newest(name: str, kind: str) -> Prepare:
    return lambda run: spoil(max(run.glob("state/0*")) / name, kind)


def without_checkpoints(run: Path) -> None:
    for path in run.glob("state/0*/state.json"):
        spoil(path, "flip")


def nothing(run: Path) -> None:
    """As the run left it."""


RESUME, DRY = "run --resume --out RUN", "run --resume --dry-run --out RUN"
ROWS: list[tuple[str, Prepare, str, int, str]] = [
    ("92 tensors changed", newest("tensors.safetensors", "flip"), RESUME, 0, "from the checkpoint before"),
    ("92 no whole checkpoint", without_checkpoints, RESUME, 1, "No other checkpoint is left"),
    ("92 lines lost", lambda run: spoil(run / "pq.jsonl", "zeros"), RESUME, 1, "lines are lost"),
    ("92 lines changed", lambda run: change(run / "pq.jsonl", b"step", b"stop"), RESUME, 1, "was changed"),
    ("92 state gone", lambda run: shutil.rmtree(run / "state"), RESUME, 1, "restore state/"),
    ("92 manifest gone", lambda run: (run / "manifest.json").unlink(), RESUME, 1, "manifest.json is missing, though"),
    ("93 another schema", manifest("", "schema", 2), RESUME, 1, "schema 2.*resume with the version"),
    ("94 a key by --set", nothing, f"{RESUME} --set student.optimizer.lr=1", 1, "student.optimizer.lr: .* -> 1"),
    ("94 a key in the manifest", manifest("teacher", "questions", 3), RESUME, 1, "was changed.*questions: 4 -> 3"),
    ("94 an unknown key in it", manifest("teacher", "stepz", 3), RESUME, 1, "unknown key 'teacher.stepz'"),
    ("95 in use", nothing, RESUME, 1, "in use by another process"),
    ("96 a file in place of the folder", nothing, "run --out RUN/summary.json", 1, "is a file, expected a folder"),
    ("96 a folder with a run", nothing, "run --out RUN", 1, "is not empty; give --resume"),
    ("97 a path as name", nothing, "run --set name=../x", 1, "name of a folder under runs/"),
    ("82 a domain, exported", named("domain"), "export RUN --format trl --out OUT", 1, "--trust-run"),
    ("82 a domain, resumed", named("domain"), RESUME, 1, "problems.domain = .*evil.py:D.*--trust-run"),
    ("82 a domain, dry run", named("domain"), DRY, 1, "--trust-run"),
    ("82 a domain, its run as recipe", named("domain"), "run RUN --dry-run", 1, "--trust-run"),
    ("82 a domain, checked", named("domain"), "check RUN --no-model", 1, "--trust-run"),
    ("82 a domain, its report", named("domain"), "report RUN", 0, ""),
    ("82 a domain, watched", named("domain"), "watch RUN --once", 0, ""),
    ("82 a domain, doctor", named("domain"), "doctor RUN", 1, ""),
    ("82 a verifier, dry run", named("verifier"), DRY, 1, "problems.verifier = .*--trust-run"),
    ("82 a model's code", manifest("model", "trust_remote_code", True), "export RUN --format peft --out OUT", 1, "--trust"),
    ("82 a cluster", manifest("cluster", "address", "ray://evil:1"), RESUME, 1, "cluster.address.*--trust-run"),
    ("103 keys in a dry run", nothing, "run --dry-run --set problems.source=https://u:secret@h/x?key=secret", 1, ""),
]  # fmt: skip


@pytest.mark.parametrize(("what", "prepare", "command", "code", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_input(
    tiny_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    what: str,
    prepare: Prepare,
    command: str,
    code: int,
    words: str,
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    prepare(run)
    before = content(tmp_path)
    lock = FileLock(run / ".lock")
    if what == "95 in use":
        lock.acquire()
    ended = main([word.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for word in command.split()])
    lock.release()
    said = capsys.readouterr()
    assert ended == code, said
    assert re.search(words, said.err, re.DOTALL), said.err
    assert "Traceback" not in said.out + said.err
    assert "secret" not in said.out + said.err
    assert not (tmp_path / "ran").exists()
    if code:
        assert said.err.startswith("soar: ") or command.startswith("doctor")
        assert content(tmp_path) == before


def test_a_folder_of_ones_own_is_trusted_by_the_option(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    named("domain")(run)
    assert main(["export", str(run), "--trust-run", "--format", "trl", "--out", str(tmp_path / "out")]) == 1
    assert (tmp_path / "ran").exists()  # its code was run, and then refused as no domain
    assert resume_command(run) == f"soar run --out {run} --resume --trust-run"


def test_a_typo_bricks_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "run")
    assert main(["run", "tiny", "--quiet", "--model", str(tmp_path / "WRONG"), "--out", out, *SETS.split()]) == 1
    assert main(["run", "tiny", "--quiet", "--problems", str(tmp_path / "p.jsonl"), "--out", out, *SETS.split()]) == 1
    assert "p.jsonl" in capsys.readouterr().err
    assert main(["doctor", out]) == 1
    more = ["--set", 'arms.run=["base"]', "--set", "teacher.steps=1"]
    assert main(["run", "--quiet", "--out", out, *SETS.split(), *more]) == 0
