"""A whole tiny run: the contract of the run folder field by field, and the ways in which a run ends early."""

from dataclasses import replace
from typing import Any

import pytest
from loop_helpers import BRIEF, easy_problems, events, read_jsonl, run_tiny, tiny_config, write_problems

from soar.domains.world import get_world
from soar.engine.policy import AdapterStack, load_adapter
from soar.files import read_object
from soar.loop.evaluate import summarize
from soar.loop.write import TeacherError
from soar.problems.load import DataError, read_hard
from soar.problems.prompts import FORMATS
from soar.report.alarms import hashed_ngrams, vendi_score
from soar.report.runs import summary_of
from soar.run import pipeline
from soar.run import screen as hardset
from soar.types import Problem, Screening

INNER = {
    "reward_mean", "pass_rate", "frac_all_wrong", "frac_all_right", "frac_mixed", "frac_reward_zero_std", "kl",
    "completions/mean_length", "completions/clipped_ratio", "logprob_gap", "grad_norm", "tokens", "not_judged",
}  # fmt: skip


def test_files(tiny_run):
    names = {str(p.relative_to(tiny_run)) for p in tiny_run.rglob("*") if p.is_file()}
    lines = ("metrics", "questions", "pq", "rollouts", "hard/screen", "arms/pq/questions")
    wanted = {f"{name}.jsonl" for name in lines}
    wanted |= {"manifest.json", "summary.json", "hashes.json", "report.html"}
    wanted |= {f"hard/{half}.jsonl{suffix}" for half in ("train", "test") for suffix in ("", ".evidence.json")}
    for folder in ("teacher", "student", "arms/hard_only", "arms/pq"):
        wanted |= {f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors"}
    left = {name for name in names if not name.startswith("state/") and name != ".lock"}
    assert left == wanted


def test_screen_event_and_hard_files(tiny_run):
    (event,) = events(tiny_run, "screen")
    train, screen_train, evidence = read_hard(tiny_run / "hard" / "train.jsonl")
    test, screen_test, evidence_test = read_hard(tiny_run / "hard" / "test.jsonl")
    assert (event["candidates"], event["hard"], event["attempts"], event["too_long"]) == (12, 12, 4, 0)
    assert (len(train), len(test)) == (6, 6)
    assert {p.question for p in [*train, *test]} == {p.question for p in get_world("tiny").problems("hard", 12, 0)}
    rows = [*screen_train, *screen_test]
    assert evidence == evidence_test
    header, *screened = read_jsonl(tiny_run / "hard" / "screen.jsonl")
    assert header == {"evidence": evidence}
    by_id = {row["id"]: (row["successes"], row["attempts"], row["truncated"]) for row in screened}
    for problem, row in zip([*train, *test], rows, strict=True):
        assert by_id[problem.id] == (row.successes, row.attempts, row.truncated)
    hashes = read_object(tiny_run / "manifest.json")[0]["hashes"]
    assert (evidence["model_sha256"], evidence["prompt"]) == (hashes["model"], hashes["prompts"])
    assert (evidence["attempts"], evidence["seed"], evidence["verifier"]) == (4, 0, "exact")


def test_outer_steps(tiny_run):
    steps = events(tiny_run, "outer_step")
    assert [row["step"] for row in steps] == [0, 1]
    for number, row in enumerate(steps):
        assert len(row["reward_G"]) == len(row["reward_se_G"]) == 3
        assert len({*row["reward_G"], 0.0}) > 2, "figures that are mixed up would not be noticed"
        assert row["window_mean"] == pytest.approx(row["reward_mean"]) == pytest.approx(sum(row["reward_G"]) / 3)
        assert (row["promoted"], row["accepted"], row["failed_students"]) == (True, 12, 0)
        assert row["sampled"] == 12 + sum(row["rejected"].values())
        assert set(row["student_first"]) == set(row["student_last"]) == INNER
        # students: 3 datasets x 2 repeats; steps: 2, then 3 after a promotion; then 4 questions x 2, baseline x 3 (at 4, and
        # after a promotion at all 6 of the training half).
        inner = 2 + number
        before = steps[number - 1]["student_rollouts"] if number else 0
        assert row["student_rollouts"] - before == 6 * inner * 2 * 4 + 6 * 4 * 2 + (6 if number else 4) * 3
        assert row["seconds"] > 0


def test_questions_and_promotion_questions(tiny_run):
    world, questions = get_world("tiny"), read_jsonl(tiny_run / "questions.jsonl")
    steps, promotions = events(tiny_run, "outer_step"), events(tiny_run, "promotion")
    places = [(step, dataset) for step in range(2) for dataset in range(3) for _ in range(4)]
    assert [(row["step"], row["dataset"]) for row in questions] == places
    for row in questions:
        assert row["reward"] == steps[row["step"]]["reward_G"][row["dataset"]]
        told, asked = (row["topic"], row["well_posed"], row["correct"]), row["question"]
        assert told == (world.read(asked)[0], world.solve(asked) is not None, world.solve(asked) == row["answer"])
    for row in steps:
        mine = [q["question"] for q in questions if q["step"] == row["step"]]
        assert row["vendi"] == pytest.approx(vendi_score(hashed_ngrams(mine)), abs=1e-6)
    pq = read_jsonl(tiny_run / "pq.jsonl")
    chosen = {(row["step"], row["dataset"]) for row in promotions}
    key = ("step", "dataset", "question", "answer", "reward", "topic", "well_posed", "correct")
    wanted = [[q[k] for k in key] for q in questions if (q["step"], q["dataset"]) in chosen]
    assert [[row[k] for k in key] for row in pq] == wanted


def test_evaluations_and_summary(tiny_run):
    config, summary, rows = tiny_config(), read_object(tiny_run / "summary.json")[0], events(tiny_run, "evaluation")
    last = events(tiny_run, "validation")[-1]
    loop_rollouts, searched = last["student_rollouts"], sum(last["tokens"].values())
    kinds = [(row["event"], row["arm"]) for row in read_jsonl(tiny_run / "metrics.jsonl") if "arm" in row]
    final = [kinds.index(("evaluation", arm)) for arm in ("base", "ps", "hard_only")]
    assert final[:2] == [0, 1] and final[2] < kinds.index(("arm_step", "pq")), "each is measured as soon as it is final"
    assert list(summary["arms"]) == ["base", "hard_only", "ps", "pq"]
    assert sorted(row["arm"] for row in rows) == sorted(summary["arms"])
    budget = {"base": 0, "hard_only": 16, "ps": loop_rollouts, "pq": 16}
    for row in rows:
        assert len(row["correct"]) == row["problems"] == 6
        seed = pipeline.seeds.derive(0, "evaluate")
        assert {k: row[k] for k in ("pass_at", "interval_95")} == summarize(row["correct"], config.evaluate, seed)
        arm = summary["arms"][row["arm"]]
        same = ("pass_at", "interval_95", "problems", "attempts", "student_rollouts")
        assert {k: arm[k] for k in same} == {k: row[k] for k in same}
        searches = {"search_rollouts"} if row["arm"] == "pq" else set()
        assert set(arm) - set(same) == {"total_tokens", "tokens", "evaluation_tokens"} | searches
        trained = sum(step["tokens"] for step in events(tiny_run, "arm_step") if step["arm"] == row["arm"])
        search = searched if row["arm"] in ("ps", "pq") else 0
        assert arm["total_tokens"] == sum(arm["tokens"].values()) == trained + search
        assert (arm["attempts"], arm["student_rollouts"]) == (4, budget[row["arm"]])
    state = read_object(max(tiny_run.glob("state/*/state.json")))[0]["data"]
    sampled = searched + sum(row["evaluation_tokens"] for row in rows)
    sampled += sum(step["tokens"] for step in events(tiny_run, "arm_step"))
    assert state["tokens"] == sampled, "every token after the screening is counted once"
    assert summary["arms"]["pq"]["search_rollouts"] == loop_rollouts
    assert (summary["promotions"], summary["outer_steps"], summary["seed"]) == (2, 2, 0)
    assert set(summary["wall_seconds"]) == {"screen", "loop", "arms", "evaluate"}
    assert set(summary) - {"teacher_rollouts", "wall_seconds"} == {
        "arms", "paired", "promotions", "outer_steps", "loop_end", "seed",
    }  # fmt: skip
    assert summary["loop_end"] == "teacher.steps = 2"
    assert set(summary["paired"]) == {"ps - hard_only", "pq - hard_only"}
    changed = {arm: {"correct": [4 * (arm == "ps")] * 6, "sampled": 7} for arm in (None, *summary["arms"])}
    told = [{**row, **changed[row.get("arm")]} for row in read_jsonl(tiny_run / "metrics.jsonl")]
    again = summary_of(told, tiny_config("limits.max_promotions=2"), {})
    assert [again["paired"][f"{arm} - hard_only"]["1"]["difference"] for arm in ("ps", "pq")] == [1.0, 0.0]
    assert (again["teacher_rollouts"], again["loop_end"]) == (2 * 7, "limits.max_promotions = 2")


def test_each_arm_is_judged_by_its_own_policy(tmp_path, monkeypatch, env):
    judged: list[list[str]] = []
    real = pipeline.count_correct

    def spy(env: Any, stack: AdapterStack, problems: list[Problem], *rest: Any, **more: Any) -> Any:
        judged.append([stack.digest(p) for p in range(stack.policies)])
        assert [p.id for p in problems] == [row["id"] for row in read_jsonl(tmp_path / "run" / "hard" / "test.jsonl")]
        assert rest[1] == pipeline.seeds.derive(0, "evaluate"), "every arm draws from the same seeds"
        return real(env, stack, problems, *rest, **more)

    monkeypatch.setattr(pipeline, "count_correct", spy)
    source = write_problems(tmp_path / "p.jsonl", easy_problems(14, seed=1))  # from which every arm learns something
    more = ("student.prompts_per_step=4", "arms.steps=3", "teacher.steps=2", *BRIEF)  # the first student is better
    changes = ("student.reward=paper", "student.attempts=8", "student.optimizer.lr=0.01", *more)
    run_tiny(tmp_path / "run", f'problems.source="{source}"', *changes)
    hard, student, pq = (
        load_adapter(env.backbone, tmp_path / "run" / name).digest()
        for name in ("arms/hard_only", "student", "arms/pq")
    )
    assert judged == [[env.backbone.new_stack(0).digest(), student], [hard], [pq]]
    assert student == events(tmp_path / "run", "promotion")[0]["student"] and len({hard, pq, *judged[0]}) == 4


def test_too_few_hard_problems(tmp_path, monkeypatch):
    def screen(env: Any, problems: list[Problem], *rest: Any) -> dict[str, Screening]:
        return {problem.id: Screening(int(i >= 3), 4) for i, problem in enumerate(problems)}

    monkeypatch.setattr(hardset, "screen", screen)
    with pytest.raises(DataError) as caught:
        run_tiny(tmp_path / "run", "problems.limit=6", "screen.max_successes=0")
    message = str(caught.value)
    assert "3 of 6 problems are hard (at most 0 of 4 attempts correct); left out before: none. A run" in message
    assert message.endswith("A run needs at least 4: give more or harder problems, or raise screen.max_successes.")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    said = r"0 of 0 .*; left out before: 6 too long for the context\. .* give more problems; .* a model with a longer"
    with pytest.raises(DataError, match=said):
        run_tiny(tmp_path / "long", "problems.limit=6", "student.sampling.max_tokens=126")


def test_a_teacher_that_falls_silent_ends_the_loop_and_not_the_run(tiny_run, tmp_path, monkeypatch):
    """And worker threads change no draw: what does not depend on training is equal; trained weights are up to rounding."""
    write = pipeline.OuterLoop.write

    def silent(loop: pipeline.OuterLoop, after: int) -> Any:
        if loop.state.step >= after:
            raise TeacherError("0 of 8 questions accepted")
        return write(loop)

    halves, written = pipeline.split, read_jsonl(tiny_run / "questions.jsonl")[0]["question"].upper()

    def split(*given: Any) -> Any:  # one of the held-out problems is what the teacher is going to write
        train, (first, *others) = halves(*given)
        return train, [replace(first, question=written), *others]

    monkeypatch.setattr(pipeline, "split", split)
    monkeypatch.setattr(pipeline.OuterLoop, "write", lambda loop: silent(loop, 1))
    summary = run_tiny(tmp_path / "run", "threads=2", 'arms.run=["hard_only"]')
    assert summary["outer_steps"] == 1 and summary["loop_end"] == "teacher silent" and "hard_only" in summary["arms"]
    (row,) = (e for e in events(tmp_path / "run", "alarm") if e["kind"] == "teacher silent")
    assert row["step"] == 1 and "0 of 8 questions accepted" in row["message"]
    (row,) = (e for e in events(tmp_path / "run", "alarm") if e["kind"] == "held-out question")
    assert row["step"] == 0 and row["message"].startswith("1 of the questions written in this step")
    one, two = (events(folder) for folder in (tiny_run, tmp_path / "run"))
    assert one[0] == two[0]
    first = [read_jsonl(folder / "questions.jsonl") for folder in (tiny_run, tmp_path / "run")]
    assert [q["question"] for q in first[0] if q["step"] == 0] == [q["question"] for q in first[1]]
    for key in ("baseline_pass_rate", "student_rollouts"):
        assert one[1][key] == two[1][key]
    assert one[1]["student_first"]["reward_mean"] == pytest.approx(two[1]["student_first"]["reward_mean"])
    monkeypatch.setattr(pipeline.OuterLoop, "write", lambda loop: silent(loop, 0))
    with pytest.raises(TeacherError):  # of the first step: nothing was found, so nothing is worth the arms
        run_tiny(tmp_path / "none")


def test_problems_that_do_not_fit_or_cannot_be_graded_are_counted_and_left_out(tmp_path, env):
    fits = [Problem(f"last-{i}", f"last 5{i}", str(i)) for i in range(6)]
    prompts = [len(FORMATS["tiny"].student_ids(env.backbone.tokenizer, p.question)) for p in fits]
    long = [Problem(f"long-{i}", f"last 5{i} " * 80, str(i)) for i in range(2)]
    words = [Problem("word-1", "last ab", "b"), Problem("word-2", "last cd", "d")]
    source = write_problems(tmp_path / "p.jsonl", [*long, *words, *fits])
    room = f"student.sampling.max_tokens={env.backbone.context - max(prompts)}"
    overrides = (f'problems.source="{source}"', "problems.verifier=number", "problems.limit=0", "arms.run=[]", room)
    overrides = (*overrides, "problems.test_share=0.2", "problems.max_hard=5", "seed=1")
    summary = run_tiny(tmp_path / "run", *overrides, "teacher.steps=1", "screen.attempts=1")
    (event,) = events(tmp_path / "run", "screen")
    assert (event["too_long"], event["ungradable"], event["candidates"]) == (2, 2, 6)
    assert summary["arms"] == {}
    assert {p["id"] for p in read_jsonl(tmp_path / "run" / "hard" / "screen.jsonl")[1:]} == {p.id for p in fits}
    for half, problems in zip(("train", "test"), pipeline.split(fits[:5], 1, 0.2), strict=True):
        assert [p["id"] for p in read_jsonl(tmp_path / "run" / "hard" / f"{half}.jsonl")] == [p.id for p in problems]
