"""`soar doctor`: a whole run is well; whatever was changed, removed, added or swapped afterwards is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from loop_helpers import read_jsonl

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


def forged(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    """A change after which the hashes are made to fit."""

    def both(run: Path) -> None:
        change(run)
        write_hashes(run)

    return both


def other_attempts(run: Path) -> None:
    """One more correct attempt in the raw event."""
    rows = read_jsonl(run / "metrics.jsonl")
    correct = next(row for row in rows if row["event"] == "evaluation" and row["arm"] == "pq")["correct"]
    correct[0] = (correct[0] + 1) % 5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def twice(run: Path) -> None:
    """The evaluation of an arm once more, with a better result."""
    line = next(row for row in read_jsonl(run / "metrics.jsonl") if row["event"] == "evaluation" and row["arm"] == "ps")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "correct": [4] * len(line["correct"])}) + "\n")


def thinned(run: Path) -> None:
    hashes = json.loads((run / "hashes.json").read_text())
    (run / "hard" / "test.jsonl").unlink()
    del hashes["hard/test.jsonl"]
    (run / "hashes.json").write_text(json.dumps(hashes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "changed": (edit("hard/train.jsonl", "question", "questiom"), ["hard/train.jsonl was changed after the run"]),
    "removed": (lambda run: (run / "pq.jsonl").unlink(), ["pq.jsonl is missing"]),
    "added": (lambda run: (run / "student" / "pytorch_model.bin").touch(), ["student/pytorch_model.bin was added"]),
    "added to state": (lambda run: (run / "state" / ".new").touch(), ["state/.new was added after the run"]),
    "no list": (lambda run: (run / "hashes.json").unlink(), ["hashes.json is missing"]),
    "thinned list": (thinned, ["hashes.json lacks hard/test.jsonl"]),
    "half a line": (
        lambda run: (run / "questions.jsonl").write_bytes((run / "questions.jsonl").read_bytes()[:-9]),
        ["the last line is not complete", "questions.jsonl was changed after the run"],
    ),
    "manifest": (edit("manifest.json", '"config": {', '"config": {"nam": 1,'), ["unknown key 'nam'", "was changed"]),
    "config": (
        forged(edit("manifest.json", '"lora_rank": 16', '"lora_rank": 32')),
        ["manifest.json: the config was changed: model.lora_rank: 16 -> 32"],
    ),
    "summary": (forged(edit("summary.json", '"promotions": ', '"promotions": 1')), ["summary.json: promotions is 1"]),
    "attempts": (forged(other_attempts), ["summary.json: paired is"]),
    "event": (
        edit("metrics.jsonl", '"event": "outer_step"', '"event": "outer_stop"'),
        ["metrics.jsonl was changed after the run", "summary.json: outer_steps is 2, recomputed 1"],
    ),
    "event twice": (forged(twice), ["metrics.jsonl: evaluation 'ps' stands 2 times"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(run: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    damage, words = DAMAGE[what]
    damage(run)
    assert main(["doctor", str(run)]) == 1
    said = capsys.readouterr().out
    assert "BAD  " in said
    assert "of 4 checks found something" in said
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
    assert "all 8 checks are well" in lines
    assert "not found by this: changes of somebody who wrote hashes.json" in lines[-1]
    assert "ok   a: config of the newest checkpoint" in lines
    assert "ok   b: no summary.json: the run is not finished" in lines
    assert main(["doctor", str(tmp_path / "study" / "a" / "hard")]) == 1
    assert "no run folder: it has no manifest.json" in capsys.readouterr().err


def test_the_doctor_needs_no_torch(tiny_run: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from soar.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "doctor", str(tiny_run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
