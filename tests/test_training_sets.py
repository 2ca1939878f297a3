"""Where the arms' questions come from: counts, seeds, equal sizes, nothing held out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import easy_problems, events, read_jsonl, run_tiny, tiny_config, write_problems
from recited import ANSWERS, Recited

from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.engine.policy import AdapterStack
from soar.loop import arms as training_sets
from soar.loop.arms import (
    Material,
    arm_batches,
    arm_learning_rate,
    arm_steps,
    majority_answers,
    read_pq,
    read_teacher,
    training_questions,
)
from soar.loop.rollout import RolloutEnv
from soar.loop.write import TeacherError
from soar.problems.load import DataError
from soar.run.setup import open_env
from soar.types import Problem


@pytest.fixture(scope="module")
def env() -> Iterator[RolloutEnv]:
    with open_env(tiny_config()) as found:
        torch.set_num_threads(1)
        yield found


def material(
    teacher: AdapterStack | None = None, pq: list[Problem] | None = None, test: list[Problem] | None = None
) -> Any:
    notes: list[str] = []
    found = Material(pq or [], teacher, test or [], 1, notes.append)  # type: ignore[arg-type]
    object.__setattr__(found, "notes", notes)
    return found


def settings_of(*overrides: str) -> Config:
    return tiny_config("arms.questions=6", *overrides)


def test_teachers_write_the_asked_number_from_their_own_seed(env: RolloutEnv) -> None:
    config = settings_of()
    changed = env.backbone.new_stack(0)
    for tensor in changed.tensors.values():
        tensor += 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
    base_t = training_questions("base_t", env, config, material(changed))
    teacher_t = training_questions("teacher_t", env, config, material(changed))
    assert len(base_t) == len(teacher_t) == 6
    assert training_questions("base_t", env, config, material(None)) == base_t
    same_teacher = training_questions("teacher_t", env, config, material(env.backbone.new_stack(0)))
    assert same_teacher != teacher_t
    assert same_teacher != base_t  # another arm, another draw
    assert training_questions("base_t", env, settings_of("seed=1"), material()) != base_t
    assert training_questions("hard_only", env, config, material()) == []


def test_self_instruct_takes_the_majority_answer() -> None:
    recited: Any = Recited()
    noted = material()
    written = [Problem(q, q, "1") for q in ANSWERS]
    kept = majority_answers(recited, written, tiny_config("arms.votes=4"), noted)
    assert {p.question: p.answer for p in kept} == {
        "never": "2",
        "always": "1",
        "half": "1",
        "once": "1",
        "unscorable": "1",
    }
    assert noted.notes == ["self_instruct: 5 of 6 questions have a majority answer"]


def test_self_instruct_on_the_embedded_model(env: RolloutEnv) -> None:
    found = training_questions("self_instruct", env, settings_of("arms.votes=4"), material())
    assert 0 < len(found) <= 6
    assert all(p.answer for p in found)


def test_real_problems_of_the_world_are_right_and_not_held_out(env: RolloutEnv) -> None:
    world, config = get_world("tiny"), settings_of()
    found = training_questions("real", env, config, material())
    assert len({p.question for p in found}) == 6
    assert all(world.solve(p.question) == p.answer for p in found)
    noted = material(test=found[:2])
    left = training_questions("real", env, config, noted)
    assert {p.question for p in left} == {p.question for p in found[2:]}
    assert noted.notes == ["real: 2 problems are held out for the test, so they are left out"]


def test_real_problems_of_a_file(env: RolloutEnv, tmp_path: Path) -> None:
    problems = easy_problems(9)
    path = write_problems(tmp_path / "easy.jsonl", problems)
    config = settings_of(f'arms.real="{path}"')
    found = training_questions("real", env, config, material())
    assert len(found) == 6
    assert {p.question for p in found} < {p.question for p in problems}
    with pytest.raises(ConfigError, match="has no problem left to train on"):
        training_questions("real", env, config, material(test=problems))
    again = path.read_text(encoding="utf-8") + json.dumps({"question": problems[0].question, "answer": "-1"}) + "\n"
    path.write_text(again, encoding="utf-8")
    with pytest.raises(DataError, match=r"same question with another answer.*skip_bad_rows=true"):
        training_questions("real", env, config, material())
    settings = settings_of(f'arms.real="{path}"', "problems.skip_bad_rows=true")
    assert training_questions("real", env, settings, material()) == found
    with pytest.raises(ConfigError, match=r'arms.real = "" and problems.source = \'p.jsonl\' is no embedded world'):
        training_questions("real", env, settings_of("problems.source=p.jsonl"), material())


def promoted() -> list[Problem]:
    """Five questions, two of them right, four of them well-posed."""
    pairs = [("47 c+8", "55"), ("47 c+9", "46"), ("12 a+1", "13"), ("c+8 47", "55"), ("max 31", "1")]
    return [Problem(f"pq-{i}", question, answer) for i, (question, answer) in enumerate(pairs)]


def test_subsets_of_the_promotion_questions_are_equally_large(env: RolloutEnv) -> None:
    world, config, pq = get_world("tiny"), settings_of(), promoted()
    found = {
        arm: training_questions(arm, env, config, material(pq=pq))
        for arm in ("pq_sample", "pq_well_posed", "pq_correct")
    }
    assert {arm: len(problems) for arm, problems in found.items()} == {
        "pq_sample": 2,
        "pq_well_posed": 2,
        "pq_correct": 2,
    }
    assert [p.id for p in found["pq_correct"]] == ["pq-0", "pq-2"]
    assert all(world.well_posed(p.question) for p in found["pq_well_posed"])
    assert all(p in pq for p in found["pq_sample"])
    drawn = {
        tuple(p.id for p in training_questions("pq_well_posed", env, settings_of(f"seed={s}"), material(pq=pq)))
        for s in range(9)
    }
    assert len(drawn) > 1
    noted = material(pq=pq[1:2])
    assert training_questions("pq_correct", env, config, noted) == []
    assert "4 are well-posed" not in noted.notes[0]
    assert "1 are well-posed and 0 have a correct answer (oracle of world:tiny)" in noted.notes[0]
    assert noted.notes[1] == "so the arm pq_correct is left out"
    assert training_questions("pq", env, config, material(pq=pq)) == pq


def test_batches_and_budgets_of_the_arms() -> None:
    hard = [Problem(f"h{i}", f"h{i}", "0") for i in range(4)]
    questions = [Problem(f"q{i}", f"q{i}", "0") for i in range(4)]
    config = tiny_config("arms.curriculum_steps=2", "arms.pq_mode=curriculum", "arms.pq_steps=5")

    def first(arm: str) -> set[str]:
        return {p.id[0] for batch in arm_batches(arm, config, hard, questions, 4)[:2] for p in batch}

    assert first("pq_curriculum") == first("base_t") == first("pq") == {"q"}
    mixed = arm_batches("pq_mixed", config, hard, questions, 4)
    assert sorted(p.id for batch in mixed for p in batch) == sorted(p.id for p in [*hard, *questions])
    assert [arm_steps(arm, config, 0) for arm in ("hard_only", "pq", "real")] == [2, 5, 5]
    rates = tiny_config("arms.learning_rate=0.5", "arms.learning_rates.real=0.25")
    assert [arm_learning_rate(arm, rates) for arm in ("hard_only", "real")] == [0.5, 0.25]
    assert arm_learning_rate("pq", tiny_config()) == tiny_config().student.optimizer.lr


def test_every_arm_in_one_run(tmp_path: Path) -> None:
    """All arms train, are measured, and leave their questions; PQ arms record what the search cost."""
    arms = ["base", "hard_only", "pq_curriculum", "pq_correct", "base_t", "teacher_t", "self_instruct", "real"]
    summary = run_tiny(tmp_path / "run", f"arms.run={json.dumps(arms)}", "arms.questions=4", "teacher.steps=1")
    assert set(summary["arms"]) <= set(arms)
    assert {"base", "hard_only", "pq_curriculum", "base_t", "teacher_t", "self_instruct", "real"} <= set(
        summary["arms"]
    )
    spent = events(tmp_path / "run", "outer_step")[-1]["student_rollouts"]
    searched = {arm for arm, row in summary["arms"].items() if row.get("search_rollouts") == spent}
    assert searched == {arm for arm in summary["arms"] if arm.startswith("pq")} | {"teacher_t"}
    assert set(summary["paired"]) == {
        f"{arm} - hard_only" for arm in summary["arms"] if arm not in ("base", "hard_only")
    }
    for arm in set(summary["arms"]) - {"base", "hard_only"}:
        rows = read_jsonl(tmp_path / "run" / "arms" / arm / "questions.jsonl")
        assert set(rows[0]) == {"question", "answer", "topic", "well_posed", "correct"}
    assert all(r["correct"] for r in read_jsonl(tmp_path / "run" / "arms" / "real" / "questions.jsonl"))
    labels, pq = (read_jsonl(tmp_path / "run" / name) for name in ("pq_labels.jsonl", "pq.jsonl"))
    assert all(set(row) == {"question", "answer", "judge", "well_posed", "correct"} for row in labels)
    same = ("question", "answer", "well_posed", "correct")
    assert [[row[key] for key in same] for row in labels] == [[row[key] for key in same] for row in pq]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Self-instruct" in page


def test_a_teacher_that_writes_nothing_costs_its_arm_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(env: Any, teacher: Any, *rest: Any) -> Any:
        raise TeacherError("the teacher wrote 0 acceptable pairs of 4")

    monkeypatch.setattr(training_sets, "write_questions", write)
    overrides = ('arms.run=["base", "teacher_t", "real"]', "arms.questions=4", "teacher.steps=0")
    summary = run_tiny(tmp_path / "run", *overrides)
    assert list(summary["arms"]) == ["base", "real"]
    (alarm,) = events(tmp_path / "run", "alarm")
    assert (alarm["kind"], alarm["arm"], alarm["step"]) == ("arm left out", "teacher_t", None)
    assert alarm["message"] == "the teacher wrote 0 acceptable pairs of 4"


def test_questions_and_screening_of_another_run(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("screened again")

    from soar.run import screen as screening

    monkeypatch.setattr(screening, "screen_block", never)
    sources = (f'arms.pq_from="{tiny_run}"', f'arms.teacher_from="{tiny_run}"', f'screen.from_run="{tiny_run}"')
    fewer = run_tiny(tmp_path / "fewer", sources[2], "arms.run=[]", "teacher.steps=0", "problems.limit=9")
    assert (fewer["arms"], events(tmp_path / "fewer", "screen")[0]["candidates"]) == ({}, 9)
    overrides = (*sources, 'arms.run=["pq", "teacher_t"]', "teacher.steps=0", "arms.questions=4")
    summary = run_tiny(tmp_path / "run", *overrides)
    assert (summary["outer_steps"], list(summary["arms"])) == (0, ["pq", "teacher_t"])
    assert "search_rollouts" not in summary["arms"]["pq"]
    mine, theirs = (read_jsonl(f / "hard" / "test.jsonl") for f in (tmp_path / "run", tiny_run))
    assert mine == theirs
    trained = read_jsonl(tmp_path / "run" / "arms" / "pq" / "questions.jsonl")
    assert [r["question"] for r in trained] == [r["question"] for r in read_jsonl(tiny_run / "pq.jsonl")]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert {"pq_from", "teacher_from"} <= set(manifest["hashes"])
    # The same questions, seeds and steps as in the run itself: the same student.
    first, second = (
        (f / "arms" / "pq" / "adapter_model.safetensors").read_bytes() for f in (tmp_path / "run", tiny_run)
    )
    assert first == second


def test_sources_that_are_not_there_are_named(env: RolloutEnv, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"arms\.pq_from = .*nothing.*is missing"):
        read_pq(tmp_path / "nothing")
    (tmp_path / "pq.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ConfigError, match="no line has a question and an answer"):
        read_pq(tmp_path)
    with pytest.raises(ConfigError, match=r"arms\.teacher_from = .* holds an adapter"):
        read_teacher(env.backbone, tmp_path)
    with pytest.raises(ConfigError, match=r"screen\.from_run = .*screen\.jsonl is missing; give a run folder"):
        run_tiny(tmp_path / "run", f'screen.from_run="{tmp_path}"')


def test_arms_without_a_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"arms\.steps = 0 .*teacher\.steps = 0: .* set arms\.steps for the arm pq"):
        tiny_config("teacher.steps=0", "arms.steps=0", 'arms.run=["base", "pq"]')
    assert tiny_config("teacher.steps=0", "arms.steps=0", 'arms.run=["base"]').teacher.steps == 0
