"""The arms: where their questions come from, their budget, what they train on, and how they report."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import random_stack
from loop_helpers import BRIEF, Says, easy_problems, events, read_jsonl, run_tiny, skills, tiny_config, write_problems
from tables import write_jsonl

from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.files import digest
from soar.loop import arms
from soar.loop.parallel import no_tick
from soar.loop.population import train_chunk
from soar.loop.rollout import RolloutEnv, masked, mentions
from soar.loop.student import Plan, TrainState
from soar.loop.write import Bound, TeacherError
from soar.problems.load import DataError, split
from soar.report.alarms import alarm
from soar.run import pipeline, screen
from soar.run.folder import RunFolderError
from soar.run.interrupts import Stopped
from soar.types import Problem, Screening


def questions(arm: str, env: RolloutEnv, config: Config, said: list[str] | None = None, **given: Any) -> list[Problem]:
    """`training_questions` of a run that offers what is `given`; notes go to `said`."""
    offered: dict[str, Any] = {"pq": [], "teacher": None, "hard_test": [], "say": ([] if said is None else said).append}
    return arms.training_questions(arm, env, config, arms.Material(**offered | given))


def settings_of(*overrides: str) -> Config:
    return tiny_config("arms.questions=6", *overrides)


def test_teachers_write_the_asked_number_from_their_own_seed(env):
    config = settings_of()
    base_t = questions("base_t", env, config)
    teacher_t = questions("teacher_t", env, config, teacher=random_stack(env.backbone, 1, size=0.02))
    assert len(base_t) == len(teacher_t) == 6
    assert questions("base_t", env, config) == base_t
    untrained = questions("teacher_t", env, config, teacher=env.backbone.new_stack(0))
    assert untrained != teacher_t and untrained != base_t  # another arm, another draw
    assert questions("base_t", env, settings_of("seed=1")) != base_t
    asked = [arms.write_questions(env, None, arms.teacher_prompt(env, config), config, step) for step in (0, 1)]
    assert asked[0].problems_G_Q != asked[1].problems_G_Q, "an outer step has draws of its own"
    held = [p for p in base_t if p.question == base_t[0].question]
    assert questions("base_t", env, config, hard_test=held) == [p for p in base_t if p not in held]
    with pytest.raises(arms.NothingLeft, match="each of its questions is held out for the test"):
        questions("pq", env, config, pq=base_t, hard_test=base_t)
    assert questions("hard_only", env, config) == []


def test_a_bound_changes_nothing_until_it_is_reached(env):
    """It has texts written and voted on, or hints, in parts; where it is too small they are the first of the whole."""
    votes, hard = ("teacher.votes=2", "teacher.agreement=0.5", "teacher.max_tries=99"), easy_problems(9)

    def made(arm: str, config: Config, most: int) -> tuple[list[Any], bool, int]:
        before, bound = env.tokens, Bound(env.tokens + most)
        given = arms.Material([], Mock(), [], print, hard_train=hard, bound=bound)
        hints = arms.write_hints(env, config, given).items() if arm == "hinted" else ()
        return [*hints, *questions(arm, env, config, bound=bound)], bound.full, env.tokens - before

    for arm, each, keys in (("base_t", 16, ()), ("base_t", 16 + 2 * 10, votes), ("hinted", 8 * 5, ())):
        config = settings_of("arms.hint_tokens=5", *BRIEF, *keys)
        whole, _, spent = made(arm, config, 10**9)
        assert made(arm, config, spent + each)[:2] == (whole, False)
        some, full, less = made(arm, config, spent // 4)
        assert len(some) < len(whole) and some == whole[: len(some)] and full
        assert spent // 4 - each < less <= spent // 4


def test_real_problems_are_right_and_not_held_out(env, tmp_path):
    """Those of the world, then those of a file."""
    world, config, said = get_world("tiny"), settings_of(), list[str]()
    real = questions("real", env, config)
    assert len({p.question for p in real}) == 6
    assert all(world.solve(p.question) == p.answer for p in real)
    left = questions("real", env, config, said, hard_test=real[:2])
    assert {p.question for p in left} == {p.question for p in real[2:]}
    assert said == ["real: 2 problems are held out for the test, so they are left out"]
    problems = easy_problems(9)
    path = write_problems(tmp_path / "easy.jsonl", problems)
    config = settings_of(f'arms.real="{path}"')
    real = questions("real", env, config)
    assert len(real) == 6 and {p.question for p in real} < {p.question for p in problems}
    with pytest.raises(ConfigError, match="has no problem left to train on"):
        questions("real", env, config, hard_test=problems)
    path.write_text(path.read_text() + json.dumps({"question": problems[0].question, "answer": "-1"}) + "\n")
    with pytest.raises(DataError, match=r"same question with another answer.*skip_bad_rows=true"):
        questions("real", env, config)
    with pytest.raises(ConfigError, match=r'arms.real = "" and problems.source = \'p.jsonl\' is no embedded world'):
        questions("real", env, settings_of("problems.source=p.jsonl"))


def test_subsets_of_the_promotion_questions_are_equally_large(env):
    """Of five questions two are right and four well-posed."""
    pairs = [("47 c+8", "55"), ("47 c+9", "46"), ("12 a+1", "13"), ("c+8 47", "55"), ("max 31", "1")]
    pq = [Problem(f"pq-{i}", *pair) for i, pair in enumerate(pairs)]
    config = settings_of()
    kinds = ("sample", "well_posed", "correct")
    sample, well_posed, correct = (questions(f"pq_{kind}", env, config, pq=pq) for kind in kinds)
    assert [len(sample), len(well_posed)] == [2, 2] and [p.id for p in correct] == ["pq-0", "pq-2"]
    assert all(get_world("tiny").solve(p.question) for p in well_posed)
    draws = [questions("pq_well_posed", env, settings_of(f"seed={s}"), pq=pq) for s in range(9)]
    assert any(draw != well_posed for draw in draws)
    with pytest.raises(arms.NothingLeft, match=r"0 of 1 .* 1 are well-posed and 0 have a correct answer"):
        questions("pq_correct", env, config, pq=pq[1:2])
    with pytest.raises(arms.NothingLeft, match="no promotion"):
        questions("pq_sample", env, config)
    assert questions("pq", env, config, pq=pq) == pq
    assert arms.oracle(env, config, pq[:2] + pq[3:4]) == [(True, True), (True, False), (False, False)]
    with pytest.raises(arms.NothingLeft, match=r"problems\.domain = 'd\.py:D' cannot solve questions"):
        arms.oracle(env, settings_of("problems.source=f.jsonl", "problems.domain=d.py:D"), pq)


def test_hints_are_written_once_and_do_not_hold_the_answer(env, monkeypatch):
    """The answer to the first problem is always said, to the second at first only."""
    problems = easy_problems(2)

    def answers(prompts: list[str], attempts: int) -> list[str]:
        assert all(p.question in text for p, text in zip(problems, prompts, strict=True))
        return [f"think of {problems[0].answer} first"] * attempts + [problems[1].answer] + ["c+8"] * (attempts - 1)

    monkeypatch.setattr(env, "sampler", Says(env.backbone, answers))
    hints = arms.write_hints(env, settings_of(), arms.Material([], Mock(), [], print, hard_train=problems))
    assert "..." in hints[problems[0].id] and not mentions(hints[problems[0].id], problems[0].answer)
    assert hints[problems[1].id] == "c+8"
    assert masked("take 4 of 42, then 4", "4") == "take ... of 42, then ..."
    assert masked("so \\frac{1}{2} it is", "\\frac{1}{2}") == "so ... it is"
    assert masked("1 1 1", "1 1") == "... 1"


def test_variants_are_kept_where_the_base_model_solves_some(env, monkeypatch):
    """Of five continued problems one is held out; the base model gives the answer 2, 3, 7 and 8 times of 10 (votes). The
    last times the bound has room for two problems (votes: for one), then for one until it is full."""
    hard = [Problem(f"h{i}", f"4{i} c+8 d+5 e+9", "0") for i in range(5)]
    right, calls, shown = [f"{48 + i} {49 + i}" for i in range(5)], list[int](), list[list[int]]()

    def answers(prompts: list[str], attempts: int) -> list[str]:
        calls.append(attempts)
        asked = [int(re.search(r"4(\d) c\+8", prompt)[1]) for prompt in prompts]
        if attempts == arms.VARIANT_TEXTS:
            shown.append(asked)
            return [f" d+1 <ans> {right[i]}" for i in asked for _ in range(attempts)]
        return [f"<ans> {right[i] if n < (2, 3, 7, 8)[i] else '00'}" for i in asked for n in range(attempts)]

    monkeypatch.setattr(env, "sampler", Says(env.backbone, answers))
    monkeypatch.setattr(arms, "VARIANT_ROUNDS", 1)
    given = {"hard_test": [Problem("t", "44 c+8 d+1", "52 53")], "hard_train": hard}
    kept = questions("variants", env, settings_of(), **given)
    assert [(p.question, p.answer) for p in kept] == [("41 c+8 d+1", "49 50"), ("42 c+8 d+1", "50 51")]
    assert questions("variants", env, settings_of("arms.questions=1"), **given) == kept[:1]
    voted = questions("variants", env, settings_of("teacher.votes=10", "teacher.agreement=0.7"), **given)
    assert [(p.answer, p.agreement) for p in voted] == [("00", 0.8), ("00", 0.7), ("50 51", 0.7), ("51 52", 0.8)]
    monkeypatch.setattr(arms, "VARIANT_ROUNDS", 2)
    with pytest.raises(arms.NothingLeft, match="no variant was solved"):
        questions("variants", env, settings_of("teacher.votes=10", "teacher.agreement=0.9"), **given)
    assert calls[-3:] == [arms.VARIANT_TEXTS, 10, arms.VARIANT_TEXTS], "a question is voted on once"
    assert shown == [[0, 1, 2, 3, 4]] * len(shown)
    most = arms.VARIANT_TEXTS * (16 + 10 * 10)
    given["bound"] = bound = Bound(env.tokens + 2 * most)
    assert questions("variants", env, settings_of(*BRIEF), **given) == kept and bound.full
    given["bound"] = bound = Bound(env.tokens + 3 * most // 2)
    questions("variants", env, settings_of("teacher.votes=10", *BRIEF), **given)
    assert shown[-11:] == [[0, 1], [2], [3], [4], [0], [1], [2], [0], [1], [2], [3]] and bound.full


def test_solvable_problems_are_those_between_and_not_held_out(env):
    problems, said = easy_problems(5), list[str]()
    screened = [(p, Screening(successes, 10)) for p, successes in zip(problems, (0, 1, 6, 7, 3), strict=True)]
    assert questions("solvable", env, settings_of(), said, hard_test=problems[4:], screened=screened) == problems[1:3]
    assert said == ["solvable: 1 problems are held out for the test, so they are left out"]
    with pytest.raises(arms.NothingLeft, match="screening found no problem"):
        questions("solvable", env, settings_of())


def test_groups_of_128_are_copies_of_one_problem_side_by_side():
    hard = [Problem(f"h{i}", f"h{i}", "0") for i in range(4)]
    plan = arms.arm_plan("hard_only_128", tiny_config("student.attempts=32", "student.prompts_per_step=8"), hard, [], 2)
    assert plan.copies == 4
    assert [[p.id for p in batch[::4]] for batch in plan.batches] == [[p.id for p in b[3::4]] for b in plan.batches]
    assert sorted(p.id for batch in plan.batches for p in batch) == sorted([p.id for p in hard] * 4)
    with pytest.raises(ConfigError, match=r"groups of 128 .* found 4 \* 24"):
        tiny_config("student.attempts=24", "student.prompts_per_step=4", 'arms.run=["hard_only_128"]')
    with pytest.raises(ConfigError, match=r"pq_correct, pq_sample, pq_well_posed need an exact oracle.*'f\.jsonl'"):
        settings_of("problems.source=f.jsonl", 'arms.run=["pq_correct"]')


SHORT = (*BRIEF, "teacher.steps=1", "teacher.datasets=2", "teacher.questions=2", "student.repeats=1", "student.steps=1")


def test_every_arm_gets_the_same_total_of_tokens(tmp_path, monkeypatch):
    """As one population, as on a GPU; search and hints included. The last step may go over by what a step can take; pass@k is
    measured on the way."""
    monkeypatch.setattr(arms, "arms_at_once", lambda backbone, count: count)
    monkeypatch.setattr(pipeline, "lost_alarms", lambda curve, end: [alarm("fell", f"{len(curve)} {end['arm']}")])
    names = ["base", "likelihood", "hinted", "solvable", "pq"]
    source = write_problems(tmp_path / "easy.jsonl", easy_problems(14, seed=1))
    keys = [f"arms.run={json.dumps(names)}", f'problems.source="{source}"', "arms.hint_tokens=5", *SHORT]
    student = tiny_config(*keys).student
    most = student.prompts_per_step * student.attempts * student.sampling.max_tokens
    run = run_tiny(tmp_path / "run", *keys, "arms.tokens=700", "arms.save_steps=100", "evaluate.every=4")["arms"]
    assert all(700 <= run[arm]["total_tokens"] < 700 + most for arm in names[1:])
    assert run["hinted"]["tokens"]["preparation"] > 0 == run["solvable"]["tokens"]["preparation"]
    assert run["pq"]["tokens"]["search"] > 0 == run["hinted"]["tokens"]["search"]
    for arm, row in run.items():
        assert row["total_tokens"] == sum(row["tokens"].values()) and row["evaluation_tokens"] > row["attempts"], arm
    curves = [row for row in events(tmp_path / "run", "curve") if row["arm"] == "hinted"]
    assert [row["step"] for row in curves] == [4 * i for i in range(1, len(curves) + 1)] and curves
    steps = [row for row in events(tmp_path / "run", "arm_step") if row["arm"] == "hinted"]
    told = run["hinted"]["tokens"]["preparation"] + sum(row["tokens"] for row in steps[:4])
    assert curves[0]["total_tokens"] == told and set(curves[0]["pass_at"]) == {"1", "4"}
    assert f"{len(curves)} hinted" in [row["message"] for row in events(tmp_path / "run", "alarm")]
    names = ["base", "base_t", "hinted", "pq", "variants"]
    left = run_tiny(tmp_path / "short", *keys, f"arms.run={json.dumps(names)}", "arms.tokens=400")["arms"]
    assert all(0 < left[arm]["tokens"]["preparation"] <= 200 < left[arm]["tokens"]["training"] for arm in names[1:3])
    alarms = [row for row in events(tmp_path / "short", "alarm") if "arm" in row]
    told = {"base_t": "preparation cut", "hinted": "preparation cut", "pq": "arm left out", "variants": "arm left out"}
    assert sorted((row["arm"], row["kind"]) for row in alarms) == sorted(told.items()), "one alarm for one cause"
    assert list(left) == names[:3]
    said = "".join(row["message"] for row in alarms)
    assert re.search(r"its search took \d+ of arms.tokens = 400; raise it", said)
    words = r"variants is left out: .*half of .*arms.tokens = 400, .*; raise it.*: no variant was solved"
    assert re.search(words, said)
    most = run["pq"]["tokens"]["search"]
    assert not run_tiny(tmp_path / "exact", *keys, 'arms.run=["pq"]', f"arms.tokens={most}")["arms"], "nothing is left"


def test_a_resume_amid_the_arms_counts_their_preparation_once(tmp_path):
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


def test_a_resume_amid_the_arm_real_wants_the_problems_that_it_began_with(tmp_path, monkeypatch):
    problems, out = easy_problems(9), tmp_path / "run"
    path = write_problems(tmp_path / "easy.jsonl", problems)
    keys = (*BRIEF, "teacher.steps=0", "screen.attempts=0", 'arms.run=["real"]', f'arms.real="{path}"')
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(pipeline.Run, "_curve", Mock(side_effect=InterruptedError))
        run_tiny(out, *keys)
    with monkeypatch.context() as patch, pytest.raises(RunFolderError, match="hard_set changed since the run began"):
        patch.setattr(pipeline, "split", lambda *given: split(*given)[::-1])
        run_tiny(out, *keys, resume=True)
    write_problems(path, problems[1:])
    with pytest.raises(RunFolderError, match="real changed since the run began"):
        run_tiny(out, *keys, resume=True)


def test_a_teacher_that_writes_nothing_costs_its_arm_only(tmp_path, monkeypatch):
    """And is not asked again on resume; the problems of another arm are read once, before the work."""
    real, path = arms.write_questions, write_problems(tmp_path / "easy.jsonl", easy_problems(9))
    monkeypatch.setattr(arms, "load_problems", reader := Mock(wraps=arms.load_problems))

    def write(env: Any, teacher: Any, *rest: Any) -> Any:
        if teacher is not None:
            raise TeacherError("the teacher wrote 0 acceptable pairs of 4")
        return real(env, teacher, *rest)

    monkeypatch.setattr(arms, "write_questions", write)
    overrides = ('arms.run=["base", "base_t", "teacher_t", "real"]', "arms.questions=4", "teacher.steps=0")
    overrides = (*overrides, f'arms.real="{path}"', "arms.save_steps=1", "arms.steps=2")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(pipeline.Run, "_curve", Mock(side_effect=[None, InterruptedError]))
        run_tiny(tmp_path / "run", *overrides)
    assert reader.call_count == 1
    assert list(run_tiny(tmp_path / "run", *overrides, resume=True)["arms"]) == ["base", "base_t", "real"]
    (alarm,) = events(tmp_path / "run", "alarm")
    assert (alarm["kind"], alarm["arm"], alarm["step"]) == ("arm left out", "teacher_t", None)
    assert alarm["message"] == "the arm teacher_t is left out: the teacher wrote 0 acceptable pairs of 4"
    rows = read_jsonl(tmp_path / "run" / "arms" / "real" / "questions.jsonl")
    assert set(rows[0]) == {"question", "answer", "topic", "well_posed", "correct"} and all(r["correct"] for r in rows)


def test_questions_and_screening_of_another_run(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(screen, "screen_call", lambda *given: pytest.fail("screened again"))
    voted = write_jsonl(tmp_path / "pq.jsonl", [{**row, "agreement": 0.5} for row in read_jsonl(tiny_run / "pq.jsonl")])
    sources = (f'arms.pq_from="{voted}"', f'arms.teacher_from="{tiny_run}"', f'screen.from_run="{tiny_run}"')
    overrides = (*sources, 'arms.run=["pq", "base_t", "teacher_t"]', "teacher.steps=0", "arms.questions=4")
    summary = run_tiny(tmp_path / "run", *overrides)
    assert [*summary["arms"], *summary["paired"]] == ["pq", "base_t", "teacher_t", "teacher_t - base_t"]
    assert summary["outer_steps"] == 0
    theirs = json.loads((tiny_run / "summary.json").read_text())["arms"]["pq"]
    assert theirs["search_rollouts"] and "search_rollouts" not in summary["arms"]["pq"]
    trained = read_jsonl(tmp_path / "run" / "arms" / "pq" / "questions.jsonl")
    assert [r["question"] for r in trained] == [r["question"] for r in read_jsonl(tiny_run / "pq.jsonl")]
    assert {r.get("agreement") for r in trained} == {0.5}
    hashes = json.loads((tmp_path / "run" / "manifest.json").read_text())["hashes"]
    assert hashes["pq_from"] == digest([[r["question"], r["answer"]] for r in trained]) and "teacher_from" in hashes
    assert "held-out reward" not in [row["kind"] for row in events(tmp_path / "run", "alarm")]
    # The same hard problems, questions, seeds and steps as in the run itself: the same student.
    for file in ("hard/test.jsonl", "arms/pq/adapter_model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tiny_run / file).read_bytes()
    sources = (f'arms.pq_from="{tiny_run / "pq.jsonl"}"', *sources[1:], "problems.test_share=0.75")
    run_tiny(tmp_path / "other", *sources, 'arms.run=["base"]', "teacher.steps=0")
    told = [row["message"] for row in events(tmp_path / "other", "alarm") if row["kind"] == "held-out reward"]
    assert [text.split(" = ")[0] for text in told] == ["arms.pq_from", "arms.teacher_from"]
    assert all("training half has 3 of the 9 problems that are held out here" in text for text in told)


def test_an_arm_trains_on_its_questions_for_what_the_loop_spent_rounded_up():
    config = tiny_config("arms.steps=0", "student.prompts_per_step=2", "student.attempts=4")
    assert [config.arm_steps("hard_only", n) for n in (0, 1, 8, 9, 800)] == [1, 1, 1, 2, 100]
    assert tiny_config("arms.steps=7").arm_steps("hard_only", 800) == 7
    state = TrainState(3, skills([0.5]), failed=True, metrics=[{"kl": 1.0}, {"kl": 2.0}])
    first, second, alarm = arms.arm_events("first", plan_of("first"), state)
    assert first == {"event": "arm_step", "arm": "first", "step": 1, "kl": 1.0}
    assert (second["step"], alarm["kind"], alarm["arm"]) == (2, "arm failed", "first")
    assert len(arms.arm_events("first", plan_of("first", steps=4), state)) == 2  # the alarm comes at the end
    over = plan_of("b", 9, tokens=99)  # who draws no tokens is
    assert over.finished(state) and not plan_of("b", 9).finished(state)
    hard, pq = ([Problem(f"{kind}-{i}", f"{kind} {i}", "0") for i in range(n)] for kind, n in (("hard", 6), ("pq", 4)))

    def asked(name: str, steps: int, *keys: str) -> list[list[str]]:
        return [[p.id for p in batch] for batch in arms.arm_plan(name, tiny_config(*keys), hard, pq, steps).batches]

    def counts(batches: list[list[str]]) -> dict[str, int]:
        return Counter(i for batch in batches for i in batch)

    only = asked("hard_only", 9)
    assert [len(batch) for batch in only] == [2] * 9
    assert counts(only) == {p.id: 3 for p in hard}  # three whole passes
    assert counts(asked("pq", 10)) == {p.id: 2 for p in [*hard, *pq]}
    curriculum = asked("pq", 10, "arms.curriculum_steps=4")
    assert counts(curriculum[:4]) == {p.id: 2 for p in pq} and counts(curriculum[4:]) == {p.id: 2 for p in hard}
    assert counts(asked("pq", 2, "arms.curriculum_steps=4")).keys() == {p.id for p in pq}
    assert asked("hard_only", 9, "seed=1") != only
    assert [len(batch) for batch in asked("hard_only", 4, "arms.prompts_per_step=3")] == [3] * 4
    wide = tiny_config("arms.prompts_per_step=3", "arms.tokens=1200")
    assert wide.arm_steps("pq", 0) == 1 + 1200 // (3 * wide.student.attempts)


def plan_of(name: str, steps: int = 3, tokens: int = 0) -> Plan:
    return Plan([[Problem(name, name, "0")]] * steps, 7, tokens=tokens)


def test_arms_of_one_step_train_together_until_one_is_at_its_end(monkeypatch):
    """On a GPU. Nothing is trained here: every step takes 10 tokens."""
    calls: list[tuple[list[str], list[int]]] = []

    def train(env: Any, tick: Any, config: Any, threads: int, due: Any, begun: Any) -> Any:
        plans, states = zip(*begun, strict=True)
        calls.append(([plan.batches[0][0].id for plan in plans], [state.step for state in states]))
        while True:
            tick()
            states = [replace(s, step=s.step + 1, tokens=s.tokens + 10, metrics=[{"kl": 0.5}]) for s in states]
            ends = [plan.finished(state) for plan, state in zip(plans, states, strict=True)]
            if due(states[0].step) or any(ends):
                return states

    monkeypatch.setattr(arms, "train_chunk", train)
    backbone = SimpleNamespace(device=torch.device("cuda"), config=tiny_config().model)
    env: Any = SimpleNamespace(backbone=backbone, threads=1, parallel=None)
    plans = {"a": plan_of("a"), "b": plan_of("b", 9, tokens=11), "d": plan_of("d", 5)}
    states = dict.fromkeys("ab", TrainState(0, skills([0.0]))) | {"d": TrainState(1, skills([0.0]))}
    ticks: list[int] = []
    begun = {name: (plan, states[name]) for name, plan in plans.items()}
    config = tiny_config("arms.save_steps=99", "evaluate.every=4")
    moved = list(arms.train_arms(env, begun, config, lambda: len(ticks) == 1, lambda: ticks.append(1)))
    # Asked to stop after the first step; b is out at 20 of 11 tokens; d is a step ahead until a and b have caught up, and is
    # saved after its fourth step.
    later = [(["a", "d"], [2, 2]), (["d"], [3]), (["d"], [4])]
    assert calls == [(["a", "b"], [0, 0]), (["a", "b", "d"], [1, 1, 1]), *later]
    last = {name: state.step for states in moved for name, state in states.items()}
    assert (last, len(ticks)) == ({"a": 3, "b": 2, "d": 5}, 5)


def test_arms_in_one_population_are_the_arms_trained_alone_and_each_has_its_own_method(env):
    """Hard-Only, groups over two prompts, hints and the dense reward side by side, saved and resumed in the middle."""
    config, problems = tiny_config("student.optimizer.lr=0.01", *BRIEF), easy_problems(2)
    two, twins = ([[problems[0], problems[i]]] * 3 for i in (1, 0))
    hints = {p.id: "add the two" for p in problems}
    plans = [Plan(two, 5), Plan(twins, 5, copies=2), Plan(two, 5, hints=hints), Plan(two, 5, likelihood=True)]
    fresh = [TrainState(0, random_stack(env.backbone, 1)) for _ in plans]

    def train(these: list[Plan], states: list[TrainState], until: int = 99) -> list[TrainState]:
        begun = list(zip(these, states, strict=True))
        return train_chunk(env, no_tick, config.student, 1, lambda step: step == until, begun)

    whole, half = train(plans, fresh), train(plans, fresh, until=2)
    for plan, start, state, middle in zip(plans, fresh, whole, half, strict=True):
        (alone,) = train([plan], [start])
        assert (alone.tokens, alone.rollouts, alone.levels) == (state.tokens, state.rollouts, state.levels)
        assert alone.metrics[0] == pytest.approx(state.metrics[0], rel=1e-3, abs=1e-4, nan_ok=True)
        (resumed,) = train([plan], [replace(middle, metrics=[])])
        assert (resumed.step, resumed.tokens, resumed.levels) == (3, state.tokens, state.levels)
        assert max((resumed.stack.tensors[k] - v).abs().max().item() for k, v in state.stack.tensors.items()) < 1e-3
    hinted, dense = whole[2], whole[3]
    assert set(hinted.levels) == {problems[0].id, problems[1].id} and not whole[0].levels
    assert dense.metrics[0]["reward_mean"] > 0 and dense.metrics[0]["pass_rate"] == whole[0].metrics[0]["pass_rate"]
    # Four of one prompt's attempts are right and three of its copy's: one group, and it is mixed.
    (large,) = train([Plan([[easy_problems(4)[3]] * 2], 5, copies=2)], [TrainState(0, env.backbone.new_stack(0))])
    assert (large.metrics[0]["pass_rate"], large.metrics[0]["frac_mixed"]) == (7 / 8, 1.0)
