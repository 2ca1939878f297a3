"""Promotions on hold: a person accepts or rejects, and the run does exactly that."""

import json
from pathlib import Path

import pytest
from loop_helpers import events, read_jsonl, run_tiny, without_clock

from soar.cli import main
from soar.run import folder as review
from soar.run.checkpoint import Checkpoint
from soar.run.folder import RunFolder, examine, recorded_config
from soar.run.interrupts import Stopped

REVIEW, CHANGES = "promotion.review=true", ("teacher.steps=3", "arms.run=[]")


def until_review(out: Path, *changes: str, resume: bool = False) -> None:
    with pytest.raises(Stopped) as caught:
        run_tiny(out, REVIEW, *changes, resume=resume)
    assert caught.value.exit_code == 3
    assert "waits for a person; everything is saved" in str(caught.value)
    assert f"`soar review {out}`" in str(caught.value)


def test_accepting_everything_is_the_run_without_review(tiny_run, tmp_path, monkeypatch):
    out = tmp_path / "held"
    for step in range(2):
        until_review(out, resume=step > 0)
        assert len(events(out, "outer_step")) == step + 1
        assert len(events(out, "promotion")) == step  # not entered before it is accepted
        assert len(read_jsonl(out / "pq.jsonl") if step else []) == 4 * step
        review.decide(out, review.ACCEPTED, "ann")

    def killed(self: RunFolder, checkpoint: Checkpoint) -> None:
        real_save(self, checkpoint)
        raise KeyboardInterrupt

    real_save = RunFolder.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "save", killed)
        run_tiny(out, REVIEW, resume=True)
    assert (out / review.FILE).exists(), "killed between the checkpoint and the end of the review"
    run_tiny(out, REVIEW, resume=True)
    free, held = (without_clock(events(folder)) for folder in (tiny_run, out))
    undecided = [{k: v for k, v in row.items() if k not in ("decision", "by")} for row in (*held, *free)]
    assert [row for row in undecided[: len(held)] if row["event"] != "review"] == undecided[len(held) :]
    assert [row for row in held if row["event"] == "review"] == [
        {"event": "review", "step": step, "decision": "accepted", "by": "ann"} for step in range(2)
    ]
    names = [f"{name}/adapter_model.safetensors" for name in ("teacher", "student", "arms/pq")]
    for name in ("pq.jsonl", *names):
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name
    decided = [(row["step"], row["decision"], row["by"]) for row in events(out, "promotion")]
    assert decided == [(step, "accepted", "ann") for step in range(2)]
    assert [row["decision"] for row in events(tiny_run, "promotion")] == ["automatic"] * 2
    assert not (out / review.FILE).exists()
    assert not any(complaints for _, complaints in examine(out))


def kept_baseline(out: Path) -> dict[str, bytes]:
    """The baseline that a refusal of the promotion on hold restores."""
    with RunFolder(out, recorded_config(out), [], resume=True) as folder:
        checkpoint = folder.load()
    assert checkpoint is not None
    return {k: v.numpy().tobytes() for k, v in checkpoint.tensors.items() if k.startswith("/pending/")}


def test_a_rejected_promotion_leaves_the_baseline_and_its_questions(tmp_path):
    out = tmp_path / "run"
    until_review(out, *CHANGES)
    first = json.loads((out / review.FILE).read_text())["promotion"]
    fresh = kept_baseline(out)
    review.decide(out, review.REJECTED, "ann")
    until_review(out, *CHANGES, resume=True)
    assert events(out, "promotion") == []
    assert kept_baseline(out) == fresh != {}  # the refused student is nobody's baseline
    held = (out / review.FILE).read_text()
    (out / review.FILE).write_text(held.replace('"answer": "', '"answer": "1', 1))
    review.decide(out, review.ACCEPTED, "ann")  # a person who saw other questions than were written
    until_review(out, *CHANGES, resume=True)  # is asked again
    (out / review.FILE).write_text(held)
    second = json.loads((out / review.FILE).read_text())["promotion"]
    assert (first["step"], second["step"]) == (0, 1)
    review.decide(out, review.ACCEPTED, "bob")
    until_review(out, *CHANGES, resume=True)
    review.decide(out, review.REJECTED, "ann")
    summary = run_tiny(out, REVIEW, *CHANGES, resume=True)
    assert summary["promotions"] == 1
    assert [row["promoted"] for row in events(out, "outer_step")] == [True] * 3
    assert [row["step"] for row in events(out, "promotion")] == [1]
    assert {row["step"] for row in read_jsonl(out / "pq.jsonl")} == {1}
    assert [row["decision"] for row in events(out, "review")] == ["rejected", "accepted", "rejected"]
    rates = [row["baseline_pass_rate"] for row in events(out, "outer_step")]
    assert events(out, "promotion")[0]["baseline_pass_rate"] == rates[1]
    assert not any(complaints for _, complaints in examine(out))


def test_the_command_shows_questions_and_effect_and_takes_the_decision(tmp_path, capsys):
    promotion = {"step": 4, "dataset": 2, "repeat": 1, "reward": 0.125, "pass_rate": 0.25, "baseline_pass_rate": 0.125}
    hostile = "two\nlines \x1b[31m\u202e" + "x" * 5000
    rows = [{"question": "3 a+4", "answer": "7", "correct": False}, {"question": hostile}]
    assert review.ask(tmp_path, promotion, rows) is None
    assert main(["review", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "outer step 4: dataset 2, student 1"
    assert lines[1] == "  reward +0.1250: pass rate on the hard reward questions +0.2500, baseline +0.1250"
    assert lines[3:5] == ["    1. 3 a+4", "       answer: 7  (wrong by the world's oracle)"]
    assert lines[-1] == "decision: none yet"
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert max(map(len, lines)) < 1100
    assert main(["review", str(tmp_path), "--reject", "--by", "ann"]) == 0
    assert "decision: rejected by ann" in capsys.readouterr().out
    for _ in range(2):
        assert review.ask(tmp_path, promotion, rows) == ("rejected", "ann")  # asking again keeps a decision
    assert main(["review", str(tmp_path), "--accept"]) == 0
    assert review.ask(tmp_path, promotion, rows)[0] == "accepted"  # type: ignore[index]
    assert review.ask(tmp_path, {**promotion, "step": 5}, rows) is None  # nothing is said about another promotion
