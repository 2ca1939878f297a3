"""Inputs that must not break anything, each with what it ends with: the one table, `cases/inputs.jsonl`. And run folders that
something happened to: every command goes on or says in one message what is wrong; nothing is lost.

A row: kind, number in the list of docs/reliability.md (or a name), what it is; then either the test that holds it
(`file::test`), or what is done before (verbs of `prepare`), the command, its exit code, and words that it says. RUN is a
copy of a finished run, OUT a folder that is not there. No row may end in a traceback, show a secret, run the code that a
folder names (it would make a file `ran`) or, where it is refused, change a file.
"""

import errno
import json
import os
import re
import shlex
import shutil
from glob import glob
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from helpers import ROOT
from loop_helpers import TINY, outcome, sets
from tables import cases, change
from test_record import content, spoil

from soar.cli import main
from soar.config import resolve_path
from soar.run.folder import write_hashes
from soar.run.interrupts import resume_command

TABLE = list(map(json.loads, (Path(__file__).parent / "cases" / "inputs.jsonl").read_text("utf-8").splitlines()))
ROWS = [pytest.param(*row[3:], id=f"{row[1]} {row[2]}") for row in TABLE if len(row) == 7]


def prepare(verb: str, name: str, *more: Any) -> FileLock | None:
    """Do one thing to a file, or to the newest checkpoint's; a lock that is taken is returned."""
    newest = max(glob("run/state/0*"), default="")
    path = Path(name.replace("RUN/state/NEWEST", newest).replace("RUN", "run"))
    match verb:
        case "write" | "write+":
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab" if verb == "write+" else "wb") as file:
                file.write(more[0].encode(*more[1:]))
        case "spoil":
            for each in glob(str(path)) or [str(path)]:
                spoil(Path(each), more[0])
        case "change":
            change(path, *(text.encode() for text in more))
        case "model":
            shutil.copytree(resolve_path("builtin:tiny"), path)
        case "copy" | "link":
            target = str(more[0]).replace("RUN", "run").replace("PID", f"{os.getpid()}")
            (os.symlink if verb == "link" else shutil.copyfile)(path.absolute(), target)
        case "remove":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        case "rehash":
            write_hashes(path)
        case "set":  # a key of the recorded config, or of the manifest
            document = json.loads(Path("run/manifest.json").read_text())
            section, _, key = name.rpartition(".")
            (document["config"][section] if section else document)[key] = more[0]
            Path("run/manifest.json").write_text(json.dumps(document))
        case "lock":
            lock = FileLock(path)
            lock.acquire()
            return lock
        case _:
            raise AssertionError(verb)
    return None


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("steps", "command", "code", "words"), ROWS)
def test_input(tiny_run, tmp_path, monkeypatch, capsys, steps, command, code, words):
    monkeypatch.chdir(tmp_path)
    if "RUN" in command:
        shutil.copytree(tiny_run, "run")
    held = [lock for step in steps if (lock := prepare(*step)) is not None]
    before, there = content(tmp_path), {*tmp_path.rglob("*")}
    ended = main([word.replace("RUN", "run").replace("OUT", "out") for word in shlex.split(command)])
    for lock in held:
        lock.release()
    out, err = capsys.readouterr()
    assert ended == code, out + err
    assert re.search(words, out + err, re.DOTALL), out + err
    assert not re.search("Traceback|secret", out + err)
    assert not Path("ran").exists()
    if code:
        assert out or "soar: " in err or code == 2
        assert content(tmp_path) == before and {*tmp_path.rglob("*")} == there


def test_the_table_is_whole():
    """Every number of the list has a row, and every test that a row or a page names is there."""
    assert {int(row[1]) for row in TABLE if row[1].isdigit()} == set(range(1, 109))
    pages = "\n".join(path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md"))
    for place in (*(row[3] for row in TABLE if len(row) == 4), *re.findall(r"\btest_\w+::test_\w+", pages)):
        file, _, name = place.partition("::")
        assert f"\ndef {name}(" in next((ROOT / "tests").rglob(f"{file}.py")).read_text("utf-8"), place


def test_a_folder_of_ones_own_is_trusted_by_the_option(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare("write", "evil.py", "open('ran', 'w')\nD = None\n")
    prepare("set", "problems.domain", "evil.py:D")
    assert main(["export", "run", "--trust-run", "--format", "trl", "--out", "out"]) == 1
    Path("ran").unlink()  # which its code made; it was refused then as no domain
    assert main(["export", "run", "--format", "peft", "--out", "weights"]) == 0, "weights need no domain"
    assert not Path("ran").exists()
    assert resume_command(Path("run")) == "soar run --out run --resume --trust-run"


def look(folder: Path) -> list[int]:
    """Exit codes of every command that looks at a run folder: doctor, report, watch, review, and export twice."""
    words = (["doctor"], ["report", "--out", str(folder.parent / "page.html")], ["watch", "--once"], ["review"])
    exports = (["export", "--format", form, "--out", str(folder.parent / form)] for form in ("jsonl", "peft"))
    return [main([name, str(folder), *more]) for name, *more in (*words, *exports)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "dangling", "deep", "zeros", "no text"])
def test_commands_that_look_at_a_damaged_folder_end_with_a_message(run, capsys, kind):
    """All files but the manifest are spoilt at once; then the manifest as well."""
    for name in (*content(run), "review.json", "paused.json"):
        if name != "manifest.json":
            spoil(run / name, kind)
    codes = look(run)
    said = capsys.readouterr()
    assert codes == [kind != "missing", 0, 0, 1, 1, 1]  # a manifest alone is a run that was just begun
    assert [line[:6] for line in said.err.splitlines()] == ["soar: "] * 3  # one message for each that failed
    spoil(run / "manifest.json", kind)
    assert {*look(run)} <= {0, 1}
    before = content(run)
    assert main(["run", "--resume", "--quiet", "--out", str(run)]) == 1
    assert content(run) == before
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err and "manifest.json" in said.err.splitlines()[-1]


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
    assert len(failures) > 3 and outcome(out) == outcome(tiny_run)
    (tmp_path / "behind").mkdir()
    (tmp_path / "trl").symlink_to(tmp_path / "behind")
    for form in ("peft", "trl"):
        left[0] = 2
        assert main(["export", str(out), "--format", form, "--out", str(tmp_path / form)]) == 1
        assert not (tmp_path / form).exists() and f"{tmp_path / form} cannot be written" in capsys.readouterr().err


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
