"""Where the arms' questions come from: counts, seeds, equal sizes, nothing held out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_stack
from loop_helpers import easy_problems, events, read_jsonl, rollouts_of, run_tiny, tiny_config, write_problems

from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.engine.policy import AdapterStack
from soar.engine.rollouts import Rollouts
from soar.loop import arms as training_sets
from soar.loop.arms import (
    Material,
    NothingLeft,
    arm_plan,
    oracle,
    read_pq,
    read_teacher,
    training_questions,
    write_hints,
)
from soar.loop.rollout import RolloutEnv, masked, mentions
from soar.loop.write import TeacherError
from soar.problems.load import DataError
from soar.run.interrupts import Stopped
from soar.run.setup import open_env
from soar.types import Problem, Screening


@pytest.fixture(scope="module")
def env() -> Iterator[RolloutEnv]:
    with open_env(tiny_config()) as found:
        torch.set_num_threads(1)
        yield found


def material(
    teacher: AdapterStack | None = None, pq: list[Problem] | None = None, test: list[Problem] | None = None
) -> Any:
    notes: list[str] = []
    found = Material(pq or [], teacher, test or [], notes.append)  # type: ignore[arg-type]
    object.__setattr__(found, "notes", notes)
    return found


def settings_of(*overrides: str) -> Config:
    return tiny_config("arms.questions=6", *overrides)


def test_teachers_write_the_asked_number_from_their_own_seed(env: RolloutEnv) -> None:
    config = settings_of()
    changed = random_stack(env.backbone, 1, size=0.02)
    base_t = training_questions("base_t", env, config, material(changed))
    teacher_t = training_questions("teacher_t", env, config, material(changed))
    assert len(base_t) == len(teacher_t) == 6
    assert training_questions("base_t", env, config, material(None)) == base_t
    same_teacher = training_questions("teacher_t", env, config, material(env.backbone.new_stack(0)))
    assert same_teacher != teacher_t
    assert same_teacher != base_t  # another arm, another draw
    assert training_questions("base_t", env, settings_of("seed=1"), material()) != base_t
    assert training_questions("hard_only", env, config, material()) == []


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


def test_subsets_of_the_promotion_questions_are_equally_large(env: RolloutEnv) -> None:
    """Of five questions two are right and four well-posed."""
    pairs = [("47 c+8", "55"), ("47 c+9", "46"), ("12 a+1", "13"), ("c+8 47", "55"), ("max 31", "1")]
    pq = [Problem(f"pq-{i}", *pair) for i, pair in enumerate(pairs)]
    world, config, subsets = get_world("tiny"), settings_of(), ("pq_sample", "pq_well_posed", "pq_correct")
    found = {arm: training_questions(arm, env, config, material(pq=pq)) for arm in subsets}
    assert [len(problems) for problems in found.values()] == [2, 2, 2]
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
    assert "1 are well-posed and 0 have a correct answer" in noted.notes[0]
    assert noted.notes[0].endswith("so the arm pq_correct is left out")
    assert training_questions("pq", env, config, material(pq=pq)) == pq
    assert oracle(env, config, pq[:2] + pq[3:4]) == [(True, True), (True, False), (False, False)]
    with pytest.raises(NothingLeft, match=r"problems\.domain = 'd\.py:D' cannot solve questions"):
        oracle(env, settings_of("problems.source=f.jsonl", "problems.domain=d.py:D"), pq)
    with pytest.raises(ConfigError, match=r"pq_correct, pq_sample, pq_well_posed need an exact oracle.*'f\.jsonl'"):
        settings_of("problems.source=f.jsonl", 'arms.run=["pq_correct"]')


def test_hints_are_written_once_and_do_not_hold_the_answer(env: RolloutEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    problems, config, asked = easy_problems(2), settings_of(), list[str]()

    class Teller:
        """Says the answer to the first problem always, to the second at first only."""

        def sample(self, stack: Any, prompts: Any, attempts: int, seeds: Any, sampling: Any) -> Rollouts:
            asked.extend(env.backbone.tokenizer.decode(ids) for ids in prompts[0])
            first, second = (p.answer for p in problems)
            texts = [f"think of {first} first", f"{second}", *["c+8"] * (attempts - 1)]
            return rollouts_of(env.backbone, [*texts[:1] * attempts, *texts[1:]], [1])

    monkeypatch.setattr(env, "sampler", Teller())
    hints = write_hints(env, problems, config)
    assert all(p.question in text for p, text in zip(problems, asked, strict=True))
    assert "..." in hints[problems[0].id] and not mentions(hints[problems[0].id], problems[0].answer)
    assert hints[problems[1].id] == "c+8"


def test_variants_are_kept_where_the_base_model_solves_some(env: RolloutEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five continued problems one is held out; the base model gives the answer 2, 3, 7 and 8 times of 10."""
    hard = [Problem(f"h{i}", f"4{i} c+8 d+5 e+9", "0") for i in range(5)]
    pairs = {f"4{i} c+8 d+1": f"{48 + i} {49 + i}" for i in range(5)}
    prompts: list[str] = []

    class Sampler:
        def sample(self, stack: Any, prompts_P_Q: Any, attempts: int, *rest: Any) -> Rollouts:
            if attempts == 1:
                prompts.extend(env.backbone.tokenizer.decode(ids) for ids in prompts_P_Q[0])
                texts = [f" d+1 <ans> {answer}" for answer in pairs.values()]
            else:
                answers = [*pairs.values()][: len(prompts_P_Q[0])]
                right = zip(answers, (2, 3, 7, 8), strict=True)
                texts = [f"<ans> {a if n < solved else '00'}" for a, solved in right for n in range(attempts)]
            return rollouts_of(env.backbone, texts, [1])

    monkeypatch.setattr(env, "sampler", Sampler())
    monkeypatch.setattr(training_sets, "VARIANT_ROUNDS", 1)
    noted = material(test=[Problem("t", "44 c+8 d+1", "52 53")])
    object.__setattr__(noted, "hard_train", hard)
    kept = training_questions("variants", env, settings_of(), noted)
    assert [(p.question, p.answer) for p in kept] == [("41 c+8 d+1", "49 50"), ("42 c+8 d+1", "50 51")]
    assert prompts == [f"<bos><ask> 4{i} c+8" for i in range(5)] and len(noted.notes) == 1
    assert len(training_questions("variants", env, settings_of("arms.questions=1"), noted)) == 1


def test_an_answer_is_masked_as_a_run_of_tokens() -> None:
    assert masked("take 4 of 42, then 4", "4") == "take ... of 42, then ..."
    assert masked("so \\frac{1}{2} it is", "\\frac{1}{2}") == "so ... it is"
    assert masked("nothing here", "") == "nothing here"


def test_solvable_problems_are_those_between_and_not_held_out(env: RolloutEnv, tmp_path: Path) -> None:
    problems = easy_problems(5)
    screened = [(p, Screening(successes, 10)) for p, successes in zip(problems, (0, 1, 6, 7, 3), strict=True)]
    noted = material(test=problems[4:])
    object.__setattr__(noted, "screened", screened)
    assert training_questions("solvable", env, settings_of(), noted) == problems[1:3]
    assert noted.notes == ["solvable: 1 problems are held out for the test, so they are left out"]
    assert training_questions("solvable", env, settings_of(), material()) == []
    path = tmp_path / "counts.jsonl"
    rows = [{"id": p.id, "question": p.question, "answer": p.answer, **vars(counts)} for p, counts in screened]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = settings_of(f'arms.solvable="{path}"')
    assert [p.id for p in training_questions("solvable", env, config, material())] == ["easy-1", "easy-2", "easy-4"]
    write_problems(path, problems)
    with pytest.raises(ConfigError, match=r"arms.solvable = .*no problem has the columns successes and attempts"):
        training_questions("solvable", env, config, material())


def test_groups_of_128_are_copies_of_one_problem_side_by_side() -> None:
    hard = [Problem(f"h{i}", f"h{i}", "0") for i in range(4)]
    config = tiny_config("student.attempts=32", "student.prompts_per_step=8")
    plan = arm_plan("hard_only_128", config, hard, [], 2)
    batches = plan.batches
    assert [[p.id for p in batch[::4]] for batch in batches] == [[p.id for p in batch[3::4]] for batch in batches]
    assert sorted(p.id for batch in batches for p in batch) == sorted([p.id for p in hard] * 4)
    assert plan.copies == 4
    with pytest.raises(ConfigError, match=r"groups of 128 .* found 4 \* 24"):
        tiny_config("student.attempts=24", "student.prompts_per_step=4", 'arms.run=["hard_only_128"]')


SHORT = ("teacher.steps=1", "teacher.datasets=2", "teacher.questions=2", "student.repeats=1", "student.steps=1")


def test_every_arm_gets_the_same_total_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one population, as on a GPU; search and hints included. The last step may go over by what a step can take; pass@k is
    measured on the way."""
    monkeypatch.setattr(training_sets, "arms_at_once", lambda backbone, arms: arms)
    arms = ["base", "hard_only", "likelihood", "hinted", "solvable", "pq"]
    source = write_problems(tmp_path / "easy.jsonl", easy_problems(14, seed=1))
    keys = [f"arms.run={json.dumps(arms)}", f'problems.source="{source}"', "evaluate.every=6", *SHORT]
    config = tiny_config(*keys)
    most = config.student.prompts_per_step * config.student.attempts * config.student.sampling.max_tokens
    summary = run_tiny(tmp_path / "run", *keys, "arms.tokens=1500", "arms.save_steps=100")
    for arm in arms[1:]:
        assert 1500 <= summary["arms"][arm]["total_tokens"] < 1500 + most, arm
    assert (
        summary["arms"]["hinted"]["tokens"]["preparation"] > 0 == summary["arms"]["solvable"]["tokens"]["preparation"]
    )
    assert summary["arms"]["pq"]["tokens"]["search"] > 0 == summary["arms"]["hinted"]["tokens"]["search"]
    for arm, row in summary["arms"].items():
        assert row["total_tokens"] == sum(row["tokens"].values()) and row["evaluation_tokens"] > row["attempts"], arm
    curves = [row for row in events(tmp_path / "run", "curve") if row["arm"] == "hinted"]
    assert [row["step"] for row in curves] == [6 * i for i in range(1, len(curves) + 1)] and curves
    steps = [row for row in events(tmp_path / "run", "arm_step") if row["arm"] == "hinted"]
    told = summary["arms"]["hinted"]["tokens"]["preparation"] + sum(row["tokens"] for row in steps[:6])
    assert curves[0]["total_tokens"] == told and set(curves[0]["pass_at"]) == {"1", "4"}
    assert "damaged" not in "".join(capsys.readouterr()), "counts of other arms than before are no damage"
    left = run_tiny(tmp_path / "short", 'arms.run=["base", "pq"]', "arms.tokens=10", *SHORT)
    assert list(left["arms"]) == ["base"]
    assert "took all of arms.tokens = 10" in events(tmp_path / "short", "alarm")[-1]["message"]


def test_a_resume_amid_the_arms_counts_their_preparation_once(tmp_path: Path) -> None:
    def spent(run: Path) -> int:
        newest = max((run / "state").glob("[0-9]*"), key=lambda folder: int(folder.name))
        return int(json.loads((newest / "state.json").read_text())["data"]["tokens"])

    keys = (*SHORT, 'arms.run=["hinted"]', "arms.steps=4", "arms.save_steps=1")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    row = run_tiny(whole, *keys)["arms"]["hinted"]
    assert row["tokens"]["preparation"] > 0
    after = row["evaluation_tokens"] + sum(step["tokens"] for step in events(whole, "arm_step")[2:])
    with pytest.raises(Stopped):
        run_tiny(broken, *keys, f"limits.max_tokens={spent(whole) - after}")
    assert len(events(broken, "arm_step")) == 2
    assert run_tiny(broken, *keys, resume=True)["arms"]["hinted"] == row
    assert spent(broken) == spent(whole)


def test_every_arm_in_one_run(tmp_path: Path) -> None:
    """All arms train, are measured, and leave their questions; PQ arms record what the search cost."""
    arms = ["base", "hard_only", "pq", "pq_correct", "base_t", "teacher_t", "real"]
    summary = run_tiny(
        tmp_path / "run", f"arms.run={json.dumps(arms)}", "arms.questions=4", "teacher.steps=1", report=True
    )
    assert set(summary["arms"]) <= set(arms)
    assert {"base", "hard_only", "pq", "base_t", "teacher_t", "real"} <= set(summary["arms"])
    spent = events(tmp_path / "run", "validation")[-1]["student_rollouts"]
    searched = {arm for arm, row in summary["arms"].items() if row.get("search_rollouts") == spent}
    assert searched == {arm for arm in summary["arms"] if arm.startswith("pq")} | {"teacher_t"}
    against_hard = {f"{arm} - hard_only" for arm in summary["arms"] if arm not in ("base", "hard_only")}
    assert set(summary["paired"]) == against_hard | {"teacher_t - base_t"}
    for arm in set(summary["arms"]) - {"base", "hard_only"}:
        rows = read_jsonl(tmp_path / "run" / "arms" / arm / "questions.jsonl")
        assert set(rows[0]) == {"question", "answer", "topic", "well_posed", "correct"}
    assert all(r["correct"] for r in read_jsonl(tmp_path / "run" / "arms" / "real" / "questions.jsonl"))
    assert "Base-T" in (tmp_path / "run" / "report.html").read_text()


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

    monkeypatch.setattr(screening, "screen_call", never)
    sources = (f'arms.pq_from="{tiny_run}"', f'arms.teacher_from="{tiny_run}"', f'screen.from_run="{tiny_run}"')
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
