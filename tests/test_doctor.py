"""The doctor finds every kind of change to a run folder, and nothing in a healthy one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import events, read_jsonl, run_tiny

from soar.cli import main
from soar.files import sha256_of, write_json
from soar.report.page import write_report
from soar.run.doctor import examine


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be harmed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def complaints(folder: Path) -> dict[str, list[str]]:
    return {check.what: check.complaints for check in examine(folder) if check.complaints}


def rewrite(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the rows of a JSONL file, and the hash of it, as a careful forger would."""
    rows = read_jsonl(folder / name)
    change(rows)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    seal(folder, name)


def seal(folder: Path, name: str) -> None:
    known = json.loads((folder / "hashes.json").read_text())
    write_json(folder / "hashes.json", {**known, name: sha256_of(folder / name)})


def first(rows: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(row for row in rows if row["event"] == kind)


def test_a_healthy_run_has_no_complaints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaints(folder) == {}
    assert main(["doctor", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all 13 checks are well"
    assert "ok   report.html from the files: every number on the page follows from the files" in lines


def test_exit_code_and_words_of_a_sick_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pq.jsonl").unlink()
    assert main(["doctor", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    files = len(json.loads((folder / "hashes.json").read_text()))
    assert f"BAD  hashes of the files: {files} files" in lines
    assert "     pq.jsonl is missing" in lines
    assert lines[-1].endswith(" of 13 checks found something")


def test_a_changed_byte_of_any_file_is_found(folder: Path) -> None:
    for name in json.loads((folder / "hashes.json").read_text()):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert f"{name} was changed after the run: its sha256 is not that in hashes.json" in str(complaints(folder))
        (folder / name).write_bytes(content)
    assert complaints(folder) == {}


EVENTS: dict[str, tuple[str, str, Any, str]] = {
    "pass@k": ("evaluation", "pass_at", {"1": 0.9, "4": 1.0}, "evaluation of base: pass_at"),
    "interval": ("evaluation", "interval_95", {"1": [0, 0], "4": [0, 0]}, "evaluation of base: interval_95"),
    "attempts": ("evaluation", "correct", [4] * 6, "evaluation of base: pass_at"),
    "rollouts": ("evaluation", "student_rollouts", 1, "evaluation of base: student_rollouts"),
    "mean reward": ("outer_step", "reward_mean", 0.5, "outer step 0: reward_mean"),
    "window": ("outer_step", "window_mean", 0.5, "outer step 0: window_mean"),
    "promoted": ("outer_step", "promoted", False, "outer step 0: promoted"),
    "accepted": ("outer_step", "accepted", 13, "outer step 0: accepted"),
    "sampled": ("outer_step", "sampled", 11, "outer step 0: sampled"),
    "distinct": ("outer_step", "distinct_share", 0.5, "outer step 0: distinct_share"),
    "diversity": ("outer_step", "vendi", 2.5, "outer step 0: vendi"),
    "number": ("outer_step", "step", 5, "the outer steps are not numbered 0, 1, 2"),
    "promotion reward": ("promotion", "reward", 0.9, "promotion of step 0: reward"),
    "promoted student": ("promotion", "student", "0" * 64, "ledger of step 0: student"),
    "verdicts": ("promotion", "verdicts", "0" * 64, "ledger of step 0: verdicts"),
    "hard": ("screen", "hard", 11, "screen: hard"),
    "pass rate": ("screen", "pass_rate", 0.5, "screen: pass_rate"),
}


@pytest.mark.parametrize("what", EVENTS)
def test_a_changed_number_is_found_though_the_hashes_were_forged(folder: Path, what: str) -> None:
    kind, field, value, words = EVENTS[what]
    rewrite(folder, "metrics.jsonl", lambda rows: first(rows, kind).update({field: value}))
    assert words in str(complaints(folder))


ROWS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], object], str]] = {
    "question": ("questions.jsonl", lambda rows: rows[0].update(question="1"), "questions of the promoted"),
    "reward": ("questions.jsonl", lambda rows: rows[0].update(reward=0.9), "has another reward than its dataset"),
    "lost question": ("questions.jsonl", lambda rows: rows.pop(), "outer step 1: accepted"),
    "lost pq": ("pq.jsonl", lambda rows: rows.pop(), "pq.jsonl does not hold the questions of the promoted"),
    "pq answer": ("pq.jsonl", lambda rows: rows[0].update(answer="0"), "pq.jsonl holds other questions than were"),
    "ledger line": ("ledger.jsonl", lambda rows: rows.pop(0), "does not follow the line before"),
    "ledger field": ("ledger.jsonl", lambda rows: rows[1].update(decision="accepted"), "the line was changed"),
    "screening": ("hard/screen.jsonl", lambda rows: rows[1].update(successes=4, attempts=9), "screen: pass_rate"),
    "hard": ("hard/train.jsonl", lambda rows: rows[0].update(successes=9), "its counts are not those of hard/screen"),
    "leak": ("hard/test.jsonl", lambda rows: rows.append(rows[0]), "stands twice in hard/train.jsonl and"),
    "held out": ("hard/test.jsonl", lambda rows: rows.pop(), "6 counts for 5 held-out problems"),
    "step": ("metrics.jsonl", lambda rows: rows.remove(first(rows, "outer_step")), "questions.jsonl holds steps"),
    "promotion": ("metrics.jsonl", lambda rows: rows.remove(first(rows, "promotion")), "the promotion events are not"),
    "arm step": ("metrics.jsonl", lambda rows: rows.remove(first(rows, "arm_step")), "hard_only: student_rollouts"),
}


@pytest.mark.parametrize("what", ROWS)
def test_changed_and_lost_lines_are_found(folder: Path, what: str) -> None:
    name, change, words = ROWS[what]
    rewrite(folder, name, change)
    assert words in str(complaints(folder))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("arms", "pq", "pass_at", "4"), 1.0),
        (("arms", "pq", "search_rollouts"), 0),
        (("paired", "pq - hard_only", "1", "difference"), 0.5),
        (("promotions",), 3),
        (("teacher_rollouts",), 1),
        (("loop_end",), None),
        (("best",), 1.0),
    ],
)
def test_a_changed_summary_is_found(folder: Path, keys: tuple[str, ...], value: Any) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    place = summary
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    write_json(folder / "summary.json", summary)
    seal(folder, "summary.json")
    write_report(folder)
    assert list(complaints(folder)) == ["summary.json from metrics.jsonl"]
    assert keys[0] in str(complaints(folder))


def test_an_alarm_that_was_taken_out_or_invented_is_found(folder: Path) -> None:
    assert [row["kind"] for row in events(folder, "alarm")] == []
    invented = {"event": "alarm", "step": 1, "kind": "truncation", "message": "x"}
    rewrite(folder, "metrics.jsonl", lambda rows: rows.append(invented))
    write_report(folder)
    assert complaints(folder) == {"alarms from the steps": ["step 1: the alarm 'truncation' follows from nothing"]}
    rewrite(folder, "metrics.jsonl", lambda rows: rows.pop())
    rewrite(folder, "metrics.jsonl", lambda rows: first(rows, "outer_step").update(teacher_logprob_gap=0.5))
    assert "step 0: the alarm 'log-prob gap of the teacher' is missing" in str(complaints(folder))


def test_a_changed_page_is_found(folder: Path) -> None:
    page = (folder / "report.html").read_text()
    (folder / "report.html").write_text(page.replace("Outer steps", "Outer  steps", 1))
    assert list(complaints(folder)) == ["report.html from the files"]


def test_damaged_checkpoints_are_found(folder: Path) -> None:
    newest = max(path for path in (folder / "state").iterdir() if path.is_dir())
    for path in (newest / "tensors.safetensors", newest / "state.json"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert f"{newest.name}/{path.name} is damaged" in str(complaints(folder))
        path.write_bytes(content)
    assert complaints(folder) == {}


def test_an_unfinished_run_is_no_sick_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from soar.run import pipeline

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train_arms", stop)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run", "teacher.steps=1")
    assert complaints(tmp_path / "run") == {}
    assert len(events(tmp_path / "run", "outer_step")) == 1


GARBAGE = [
    b"",
    b"{",
    b"null\n",
    b"[1]\n",
    b'{"event": "outer_step"}\n',
    b"\xff\xfe\x00",
    b'{"event": null, "step": "x"}\n',
]


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "questions.jsonl", "ledger.jsonl", "summary.json"])
def test_no_content_stops_the_doctor(folder: Path, name: str) -> None:
    for content in GARBAGE:
        (folder / name).write_bytes(content)
        assert complaints(folder)


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 1
    assert "no run folder: it has no manifest.json" in capsys.readouterr().err
