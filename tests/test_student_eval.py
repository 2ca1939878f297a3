"""`soar student` and `soar eval`: what they make of their arguments, and that they agree with a run."""

import json
from typing import Any

from loop_helpers import events, read_jsonl

from soar.cli import main
from soar.cli.commands import student_config
from soar.config import Config


def asked(train: str, *overrides: str, recipe: str | None = "tiny", steps: int | None = 5) -> Config:
    return student_config(train, recipe, None, None, list(overrides), steps)


def test_training_sets_become_arms(tiny_run):
    assert asked("hard_only").arms.run == ("base", "hard_only")
    assert asked("pq_correct:runs/demo").arms.run == ("base", "pq_correct")
    config = asked(f"pq:{tiny_run}")
    assert (config.arms.run, config.arms.pq_from, config.screen.from_run) == (("base", "pq"), str(tiny_run), "")
    assert (config.teacher.steps, config.arms.steps, config.arms.pq_steps) == (0, 5, 0)
    assert asked("real:easy.jsonl").arms.real == "easy.jsonl"
    # Without a recipe the run's own config and screening are used.
    config = asked(f"teacher_t:{tiny_run}", recipe=None)
    assert (config.student.attempts, config.problems.limit, config.screen.from_run) == (4, 12, str(tiny_run))
    assert config.arms.teacher_from == str(tiny_run)
    assert asked("hard_only", "arms.steps=9").arms.steps == 9


def test_a_student_on_a_runs_questions(tiny_run, tmp_path, capsys):
    out = tmp_path / "student"
    arguments = ["student", "--train", f"pq:{tiny_run}", "--steps", "2", "--out", str(out), "--quiet"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pq " in printed and f"adapter: {out / 'arms' / 'pq'}; report" in printed
    assert (out / "arms" / "pq" / "adapter_config.json").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["arms"]) == ["base", "pq"]
    mine, theirs = ({e["arm"]: e["correct"] for e in events(f, "evaluation")} for f in (out, tiny_run))
    assert mine["base"] == theirs["base"]
    assert mine["pq"] == theirs["pq"]  # two steps on the same questions with the same seeds
    assert main(arguments) == 1
    assert main([*arguments, "--resume"]) == 0


def test_eval_repeats_the_runs_own_evaluation(tiny_run, tmp_path, capsys):
    out = tmp_path / "eval.json"
    adapters = [str(tiny_run / name) for name in ("student", "arms/pq")]
    problems = str(tiny_run / "hard" / "test.jsonl")
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    assert main(["eval", *options, "--problems", problems, "--out", str(out), "--quiet"]) == 0
    found = json.loads(out.read_text())
    run: dict[str, Any] = {event["arm"]: event for event in events(tiny_run, "evaluation")}
    assert list(found["policies"]) == ["base", *adapters]
    for name, arm in zip(found["policies"], ("base", "ps", "pq"), strict=True):
        policy = found["policies"][name]
        assert policy["correct"] == run[arm]["correct"]
        assert policy["pass_at"]["1"] == run[arm]["pass_at"]["1"]
        assert policy["interval_95"]["4"] == run[arm]["interval_95"]["4"]
        assert list(policy["pass_at"]) == ["1", "2", "3", "4"]
    assert set(found["paired"]) == {f"{name} - base" for name in adapters}
    assert found["problems"]["ids"] == [row["id"] for row in read_jsonl(tiny_run / "hard" / "test.jsonl")]
    shown = capsys.readouterr().out
    assert shown.startswith("6 problems, 4 attempts each\npolicy")
    assert f"result: {out}" in shown
