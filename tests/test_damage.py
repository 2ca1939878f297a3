"""A run folder that something happened to: every command goes on or says in one message what is wrong; nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import TINY, events, run_tiny, without_clock
from test_record import change, content, spoil

from soar.cli import main
from soar.run.folder import RunFolder

CHANGES = ("teacher.steps=2", 'arms.run=["base","ps"]')
SETS = [part for override in (*TINY, *CHANGES) for part in ("--set", override)]


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that may be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def look(folder: Path) -> dict[str, int]:
    """Exit codes of every command that looks at a run folder."""
    elsewhere = folder.parent
    commands = {
        "doctor": [],
        "report": ["--out", str(elsewhere / "page.html")],
        "watch": ["--once"],
        "review": [],
        "export": ["--format", "jsonl", "--out", str(elsewhere / "questions")],
        "export ": ["--format", "peft", "--out", str(elsewhere / "adapter")],
    }
    return {name: main([name.strip(), str(folder), *more]) for name, more in commands.items()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "dangling", "deep", "zeros", "no text"])
def test_commands_that_look_at_a_damaged_folder_end_with_a_message(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """All files but the manifest are spoilt at once; then the manifest as well."""
    for name in (*content(folder), "review.json", "paused.json"):
        if name != "manifest.json":
            spoil(folder / name, kind)
    codes = look(folder)
    said = capsys.readouterr()
    assert codes["review"] == codes["export"] == codes["export "] == 1
    assert codes["doctor"] == (kind != "missing")  # a manifest alone is a run that was just begun
    assert codes["report"] == codes["watch"] == 0
    assert [line[:6] for line in said.err.splitlines()] == ["soar: "] * 3  # one message for each that failed
    spoil(folder / "manifest.json", kind)
    assert set(look(folder).values()) <= {0, 1}
    before = content(folder)
    assert main(["run", "--resume", "--quiet", "--out", str(folder)]) == 1
    assert content(folder) == before
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "manifest.json" in said.err.splitlines()[-1]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first block of held-out problems."""
    out = tmp_path_factory.mktemp("runs") / "run"

    def stop(self: RunFolder, name: str, rows: list[dict[str, Any]]) -> None:
        real(self, name, rows)
        if name == "state/evaluation.jsonl" and "id" in rows[0]:
            raise KeyboardInterrupt

    real = RunFolder.append
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "append", stop)
        run_tiny(out)
    return out


@pytest.mark.parametrize(
    ("line", "screened", "new", "evaluated_line", "new_line"),
    [
        (1, b'"evidence"', b'"evidense"', b'"arms"', b'"armies"'),
        (2, b'"truncated": ', b'"truncated": 9', b'"correct": [', b'"correct": [1, '),
    ],
)
def test_evidence_that_cannot_be_is_made_again(
    evaluated: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    line: int, screened: bytes, new: bytes, evaluated_line: bytes, new_line: bytes,
) -> None:  # fmt: skip
    """Its header, or numbers in it that no attempts have."""
    out = Path(shutil.copytree(evaluated, tmp_path / "run"))
    change(out / "hard" / "screen.jsonl", screened, new)
    change(out / "state" / "evaluation.jsonl", evaluated_line, new_line)
    assert main(["run", "--resume", "--quiet", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    for name in ("hard/screen.jsonl", "state/evaluation.jsonl"):
        assert f"{out}/{name}:{line} is damaged: what follows is made again" in said
    assert (out / "hard" / "screen.jsonl").read_bytes() == (tiny_run / "hard" / "screen.jsonl").read_bytes()
    assert without_clock(events(out)) == without_clock(events(tiny_run))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], int]:
    """Metrics of an undisturbed run, and how often it calls fsync."""
    calls = [0]
    real = os.fsync

    def count(descriptor: Any) -> None:
        calls[0] += 1
        real(descriptor)

    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", count)
        run_tiny(out, *CHANGES)
    return without_clock(events(out)), calls[0]


@pytest.mark.parametrize(("share", "code"), [(0.02, errno.EDQUOT), (0.4, errno.ENOSPC), (0.97, errno.EIO)])
def test_a_disk_that_fails_anywhere_in_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: tuple[list[Any], int],
    code: int,
    share: float,
) -> None:
    """The first, a middle or one of the last writes fails: of the manifest, of a checkpoint, of the final files."""
    metrics, calls = whole
    left = [int(share * calls)]
    real = os.fsync

    def fail(descriptor: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        real(descriptor)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert main(["run", "tiny", "--quiet", "--out", str(out), *SETS]) == 1
    said = capsys.readouterr().err
    assert f"cannot be written: {os.strerror(code)}" in said
    assert "Traceback" not in said
    assert main(["run", "tiny", "--quiet", "--out", str(out), *SETS, "--resume"]) == 0
    assert without_clock(events(out)) == metrics
