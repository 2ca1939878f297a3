"""A run folder that something happened to: every command goes on or says in one message what is wrong; nothing is lost."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import TINY, outcome, sets
from run_folders import change
from tables import cases
from test_record import content, spoil

from soar.cli import main


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
def test_commands_that_look_at_a_damaged_folder_end_with_a_message(run, capsys, kind):
    """All files but the manifest are spoilt at once; then the manifest as well."""
    for name in (*content(run), "review.json", "paused.json"):
        if name != "manifest.json":
            spoil(run / name, kind)
    codes = look(run)
    said = capsys.readouterr()
    assert codes["review"] == codes["export"] == codes["export "] == 1
    assert codes["doctor"] == (kind != "missing")  # a manifest alone is a run that was just begun
    assert codes["report"] == codes["watch"] == 0
    assert [line[:6] for line in said.err.splitlines()] == ["soar: "] * 3  # one message for each that failed
    spoil(run / "manifest.json", kind)
    assert set(look(run).values()) <= {0, 1}
    before = content(run)
    assert main(["run", "--resume", "--quiet", "--out", str(run)]) == 1
    assert content(run) == before
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "manifest.json" in said.err.splitlines()[-1]


@pytest.mark.parametrize(("line", "old", "new"), cases("damage", "screening"))
def test_a_damaged_line_of_the_screening_is_made_again(tiny_run, run, capsys, line, old, new):
    change(run / "hard" / "screen.jsonl", old.encode(), new.encode())
    assert main(["run", "--resume", "--quiet", "--out", str(run)]) == 0
    assert f"hard/screen.jsonl:{line} is damaged: what follows is made again" in capsys.readouterr().err
    assert outcome(run) == outcome(tiny_run)


def test_a_disk_that_fails_anywhere_in_a_run(tiny_run, tmp_path, monkeypatch, capsys):
    """A run whose every process meets a disk that fails, each later: in the manifest, in checkpoints, in the final files."""
    real, out = os.fsync, tmp_path / "run"
    left, failures = [5], [errno.EDQUOT]

    def fail(descriptor: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(failures[-1], os.strerror(failures[-1]))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    while main(["run", "--quiet", "--out", str(out), *(["--resume"] if out.exists() else ["tiny", *sets(*TINY)])]) == 1:
        said = capsys.readouterr().err
        assert f"cannot be written: {os.strerror(failures[-1])}" in said and "Traceback" not in said
        failures.append((errno.ENOSPC, errno.EIO, errno.EDQUOT)[len(failures) % 3])
        left[0] = 25 * len(failures)
    assert len(failures) > 3
    assert outcome(out) == outcome(tiny_run)


def test_a_run_is_well_while_it_runs_and_in_a_study(run, tmp_path, capsys):
    (run / "report.html").write_text("the page may be written again")
    shutil.copytree(run, tmp_path / "study" / "a")
    for name in ("summary.json", "hashes.json"):
        (run / name).unlink()
    shutil.copytree(run, tmp_path / "study" / "b")
    assert main(["doctor", str(tmp_path / "study")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "all 8 checks are well" in lines
    assert "not found by this: changes of somebody who wrote hashes.json" in lines[-1]
    assert "ok   a: config of the newest checkpoint" in lines
    assert "ok   b: no summary.json: the run is not finished" in lines
    assert main(["doctor", str(tmp_path / "study" / "a" / "hard")]) == 1
    assert "no run folder: it has no manifest.json" in capsys.readouterr().err
