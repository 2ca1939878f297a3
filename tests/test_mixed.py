"""Several hard sets in one run: each with its own prompts and verifier; rewards and pass@k per set and in total."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop_helpers import events, read_jsonl
from test_any_model import SMALL, save_model, write_sums

from soar.cli import main
from soar.config import Config, ConfigError, by_set, load
from soar.domains.candidates import candidates
from soar.loop.evaluate import summarize
from soar.loop.statistics import pass_at_k
from soar.loop.write import sets_of_step
from soar.run.screen import split_sets
from soar.run.setup import open_examiner
from soar.types import Problem, UserError

SETS = {
    "sums": {"format": "question_answer", "verifier": "number", "subject": "sums"},
    "options": {"source": "science:choices", "domain": "multiple_choice_plain", "limit": 12, "subject": "science"},
}


def settings(folder: Path, **more: Any) -> list[str]:
    sums = write_sums(folder / "sums.jsonl", 12)
    sets = {**SETS, "sums": {**SETS["sums"], "source": str(sums)}}
    keys = {f"problems.sets.{name}.{key}": value for name, part in sets.items() for key, value in part.items()}
    values = {**SMALL, "teacher.datasets": 3, "reward.questions": 6, "teacher.questions": 2, **keys, **more}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def test_each_set_is_a_config_of_its_own(tmp_path: Path) -> None:
    config = load("small-1gpu", settings(tmp_path))
    own = by_set(config)
    assert list(own) == ["sums", "options"]
    assert (own["sums"].problems.verifier, own["options"].problems.domain) == ("number", "multiple_choice_plain")
    assert own["options"].teacher.subject == "science"
    assert all(not part.problems.sets for part in own.values())
    plain = load("small-1gpu")
    assert by_set(plain) == {"": plain}
    assert Config.model_validate(config.resolved()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('arms.run=["base","self_instruct"]', "self_instruct cannot be trained with problems.sets"),
        ('teacher.reward="uncertainty"', "counts votes"),
        ('problems.sets.two-words.source="x.jsonl"', "each named by one word"),
        ('problems.sets.sums.format="totals"', r'sets\.sums\.verifier = "exact", found \'number\''),
    ],
)
def test_what_a_mixed_run_cannot_do_is_refused(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("small-1gpu", [*settings(tmp_path), change])
    with pytest.raises(ConfigError, match="two sets or more"):
        load("small-1gpu", ['problems.sets.one.source="x.jsonl"'])


def test_candidates_carry_their_set_and_halves_hold_both(tmp_path: Path) -> None:
    config = load("small-1gpu", settings(tmp_path))
    problems = candidates(config).problems
    assert Counter(p.set for p in problems) == {"sums": 12, "options": 12}
    assert all(p.id.startswith(f"{p.set}/") for p in problems)
    train, test = split_sets(problems, config)
    assert Counter(p.set for p in train) == Counter(p.set for p in test) == {"sums": 6, "options": 6}
    with pytest.raises(UserError, match=r"problems\.sets\.options has 1 hard problems"):
        split_sets([*problems[:12], problems[-1]], config)


def test_datasets_are_dealt_to_the_sets_in_turn(tmp_path: Path) -> None:
    config = load("small-1gpu", settings(tmp_path))
    dealt = [name for step in range(4) for name in sets_of_step(config, step)]
    assert Counter(dealt) == {"sums": 6, "options": 6}
    assert dealt[:6] == [dealt[0], dealt[1]] * 3
    seeds = {sets_of_step(load("small-1gpu", [*settings(tmp_path), f"seed={seed}"]), 0)[0] for seed in range(8)}
    assert seeds == {"sums", "options"}


def test_a_mixed_run_measures_every_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "3", "5", "A", "B", "Which?\n(A) 3\n(B) 5\n")
    monkeypatch.setattr("test_any_model.WORDS", words)
    model = save_model(tmp_path / "model", "llama", context=600)
    sets = [part for line in settings(tmp_path) for part in ("--set", line)]
    out = tmp_path / "run"
    command = ["small-1gpu", "--model", str(model), *sets]
    assert main(["check", *command, "--no-model"]) == 0
    assert "by 'domain multiple_choice_plain'" in capsys.readouterr().out
    assert main(["run", *command, "--out", str(out), "--quiet", "--calibrate"]) == 0, capsys.readouterr().err
    assert events(out, "forecast")[0]["assumptions"]["candidates"] == 24
    (screened,) = events(out, "screen")
    assert {name: part["candidates"] for name, part in screened["sets"].items()} == {"sums": 12, "options": 12}
    for step in events(out, "outer_step"):
        assert Counter(step["set_G"]).keys() == {"sums", "options"}
        assert {name: part["questions"] for name, part in step["sets"].items()} == {"sums": 3, "options": 3}
        parts = [part["reward_G"] for part in step["sets"].values()]
        assert np.allclose(np.mean(parts, axis=0), step["reward_G"])  # equally many questions of each
    rows = read_jsonl(out / "questions.jsonl")
    assert {row["answer"] in "AB" for row in rows if row["set"] == "options"} == {True}
    assert {row["answer"] in ("3", "5") for row in rows if row["set"] == "sums"} == {True}
    assert all("set" in row for row in read_jsonl(out / "pq.jsonl"))
    hard = read_jsonl(out / "hard" / "test.jsonl")
    evaluations = events(out, "evaluation")
    assert [row["arm"] for row in evaluations] == ["base", "hard_only", "ps", "pq"]
    for row in evaluations:
        for name, part in row["sets"].items():
            own = [c for c, problem in zip(row["correct"], hard, strict=True) if problem["set"] == name]
            assert part["problems"] == len(own)
            assert part["pass_at"]["1"] == pytest.approx(np.mean([pass_at_k(2, c, 1) for c in own]))
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]["ps"]["sets"]) == {"sums", "options"}
    assert main(["doctor", str(out)]) == 0, capsys.readouterr().out
    html = (out / "report.html").read_text(encoding="utf-8")
    part = html[html.index('<h2 id="mixed">Per set</h2>') : html.index('<h2 id="loop">')]
    assert part.count('<th scope="row">sums</th>') == 1 + 4  # the set, and its four arms
    assert part.count('<th scope="row">options</th><td>12</td><td>12</td>') == 1
    assert main(["export", str(out), "--format", "jsonl", "--out", str(tmp_path / "export")]) == 1
    assert "a mixed run has several prompts" in capsys.readouterr().err
    assert main(["run", *command, "--out", str(out), "--quiet", "--resume"]) == 0


def test_sets_with_other_ends_of_a_completion_are_refused(tmp_path: Path) -> None:
    config = load("small-1gpu", [*settings(tmp_path), 'problems.sets.sums.format="sums"'])
    model = save_model(tmp_path / "model", "llama", context=600)
    changed = config.model_copy(update={"model": config.model.model_copy(update={"path": str(model)})})
    with (
        pytest.raises(ConfigError, match=r"'sums' ends a completion at a line break and .* does not"),
        open_examiner(changed),
    ):
        pass


def test_a_problem_goes_to_the_verifier_of_its_set() -> None:
    from helpers import WordChecker, tiny_backbone, tiny_examiner

    from soar.loop.rollout import Part
    from soar.problems.prompts import FORMATS

    examiner = tiny_examiner(tiny_backbone())
    one, other = WordChecker(), WordChecker()
    examiner.parts = {"one": Part(FORMATS["tags"], one), "other": Part(FORMATS["tags"], other)}  # type: ignore[arg-type]
    problems = [
        Problem(str(i), "q", "a", {"set": name} if name else {}) for i, name in enumerate(("one", "", "other", "one"))
    ]
    verdicts = examiner.grade(problems, ["a", "a", "b", ""])
    assert [v.value for v in verdicts] == ["correct", "correct", "wrong", "no_answer"]
    assert (len(one.seen), len(other.seen)) == (2, 1)
    assert examiner.prompt(problems[0]) != examiner.prompt(problems[1])
    assert examiner.of_set("one").fmt is FORMATS["tags"]
    assert examiner.of_set("") is examiner
    assert summarize([1], 1, load("tiny", ["evaluate.attempts=1", "evaluate.ks=[1]"]).evaluate, 0)["pass_at"] == {
        "1": 1.0
    }


def test_the_report_survives_damaged_sets(tmp_path: Path) -> None:
    from soar.report.runs import Run
    from soar.studies.mixed_tables import mixed_section

    damaged: list[Any] = [
        7,
        {"a": 3, "b": {}},
        {"b": {"pass_at": 3, "reward_G": [None, "x", 0.5], "candidates": "many"}},
    ]
    events = {
        "screen": [{"sets": sets} for sets in damaged],
        "outer_step": [{"step": i, "sets": sets, "set_G": ["b", 3, "b"]} for i, sets in enumerate(damaged)],
        "evaluation": [{"arm": "base", "sets": sets} for sets in damaged],
    }
    found = mixed_section(Run(tmp_path, events=events))
    row = {"name": "b", "candidates": None, "hard": None, "datasets": 2, "reward": 0.5, "own": 0.5}
    assert found["sets"] == [row]
    assert mixed_section(Run(tmp_path))["sets"] == []
