"""`soar doctor`: a whole run is well; changed, lost and new files, lost lines and wrong summaries are named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import ROOT

from soar.cli import main
from soar.run.doctor import write_hashes


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that may be damaged."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return change


def cut(run: Path) -> None:
    content = (run / "questions.jsonl").read_bytes()
    (run / "questions.jsonl").write_bytes(content[:-9])


def forged(run: Path) -> None:
    """The summary is changed, and the hashes are made to fit."""
    edit("summary.json", '"promotions": ', '"promotions": 1')(run)
    write_hashes(run)


def other_attempts(run: Path) -> None:
    """One more correct attempt in the raw event, and the hashes are made to fit."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    correct = next(row for row in rows if row["event"] == "evaluation" and row["arm"] == "pq")["correct"]
    correct[0] = (correct[0] + 1) % 5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_hashes(run)


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "changed": (edit("hard/train.jsonl", "question", "questiom"), ["hard/train.jsonl was changed after the run"]),
    "removed": (lambda run: (run / "pq.jsonl").unlink(), ["pq.jsonl is missing"]),
    "added": (
        lambda run: (run / "arms" / "new.txt").write_text("x") and None,
        ["arms/new.txt was added after the run"],
    ),
    "no list": (lambda run: (run / "hashes.json").unlink(), ["hashes.json is missing"]),
    "half a line": (cut, ["the last line is not complete", "questions.jsonl was changed after the run"]),
    "manifest": (edit("manifest.json", '"config": {', '"config": {"nam": 1,'), ["unknown key 'nam'"]),
    "summary": (forged, ["summary.json: promotions is 1"]),
    "attempts": (other_attempts, ["summary.json: paired is"]),
    "event": (
        edit("metrics.jsonl", '"event": "outer_step"', '"event": "outer_stop"'),
        ["metrics.jsonl was changed after the run", "summary.json: outer_steps is 2, recomputed 1"],
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(run: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    damage, words = DAMAGE[what]
    damage(run)
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert "BAD  " in said and said.splitlines()[-1].endswith("of 3 checks found something")
    for text in words:
        assert text in said


def test_a_run_is_well_while_it_runs_and_in_a_study(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "report.html").write_text("the page may be written again")
    shutil.copytree(run, tmp_path / "study" / "a")
    for name in ("summary.json", "hashes.json"):
        (run / name).unlink()
    shutil.copytree(run, tmp_path / "study" / "b")
    assert main(["doctor", str(tmp_path / "study")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all 6 checks are well"
    assert "ok   a: summary.json from metrics.jsonl" in lines
    assert "ok   b: no summary.json: the run is not finished" in lines
    assert main(["doctor", str(tmp_path / "study" / "a" / "hard")]) == 1
    assert "no run folder: it has no manifest.json" in capsys.readouterr().err


def test_the_doctor_needs_no_torch(tiny_run: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from soar.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "doctor", str(tiny_run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
