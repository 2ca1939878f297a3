"""A population trained together is the students trained one by one; rollouts are of the right problem and policy."""

import builtins
import copy
import itertools
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from helpers import random_stack, rows_of, same_stacks, some_problems, tiny_backbone, tiny_examiner
from hypothesis import given
from hypothesis import strategies as st
from loop_helpers import events, rollouts_of, run_tiny
from tables import cases

from soar import seeds
from soar.config import OptimizerConfig, SamplingConfig, StudentConfig
from soar.engine.policy import AdapterStack
from soar.engine.rloo import leave_one_out
from soar.engine.update import StackOptimizer, UpdateStats, update
from soar.loop import population
from soar.loop.population import Population, choose_chunk, train_population
from soar.loop.rollout import RolloutBatch, RolloutEnv
from soar.loop.student import Plan, Training, TrainState, hinted, inner_steps, mean_metrics, rloo_steps, shuffled_passes
from soar.run import pipeline
from soar.run.interrupts import saved_run
from soar.types import Interrupted, Problem, Verdict, Verdicts

STUDENTS, STEPS, LR = 5, 3, 0.02
SMALL: dict[str, Any] = {"prompts_per_step": 2, "attempts": 6, "sampling": SamplingConfig(max_tokens=8)}
CONFIG = StudentConfig(**SMALL, optimizer=OptimizerConfig(lr=LR, kl=0.01, eps=1e-5), reward="binary")


def batches(students: int = STUDENTS) -> list[list[list[Problem]]]:
    return [shuffled_passes(some_problems(3, first=4 * p), p, STEPS, 2) for p in range(students)]


def plans(students: Iterable[int] = range(STUDENTS)) -> list[Plan]:
    """Student p draws from seed 100 + p."""
    return [Plan(batches()[p], 100 + p) for p in students]


def train(chunk: int = 0, threads: int = 1, students: int = STUDENTS, start: Any = None, **more: Any) -> Population:
    """more: `adapter` (lora), `kl` (0.01)."""
    adapter, kl = more.get("adapter", "lora"), more.get("kl", 0.01)
    env = tiny_examiner(tiny_backbone(adapter=adapter, chunk=chunk))
    first = start or random_stack(env.backbone, 1)
    env.threads = threads
    config = CONFIG.model_copy(update={"optimizer": CONFIG.optimizer.model_copy(update={"kl": kl})})
    return train_population(env, first, plans(range(students)), config)


def near(one: AdapterStack, other: AdapterStack) -> None:
    """Equal up to the rounding of batched products, which is small beside one step."""
    for name, tensor in one.tensors.items():
        assert (tensor - other.tensors[name]).abs().max() < 0.05 * LR, name


def test_a_student_is_trained_by_the_written_out_loop():
    env = tiny_examiner(tiny_backbone())
    start = random_stack(env.backbone, 1)
    found = train(chunk=1, students=1)
    stack = start.select([0])
    optimizer = StackOptimizer(stack, CONFIG.optimizer)
    for step, problems in enumerate(batches(1)[0]):
        attempts = env.rollout(stack, [problems], 6, [seeds.derive(100, "attempts", step)], CONFIG.sampling)
        advantage = leave_one_out(attempts.reward_P_Q_N).reshape(-1)
        update(env.backbone, optimizer, attempts.rollouts, advantage, LR, CONFIG.sampling)
        assert found.metrics[step]["reward_mean"] == pytest.approx(attempts.reward_P_Q_N.mean().item())
    assert same_stacks(found.stack, stack)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_any_chunk_gives_the_same_students(adapter):
    whole = train(chunk=STUDENTS, adapter=adapter)
    for chunk in (1, 2):
        parts = train(chunk=chunk, adapter=adapter)
        near(parts.stack, whole.stack)
        for one, other in zip(parts.metrics, whole.metrics, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
    assert max(metrics["frac_mixed"] for metrics in whole.metrics) > 0.3
    assert max(metrics["logprob_gap"] for metrics in whole.metrics) < 1e-4


def test_students_depend_on_their_own_seed_and_batches_and_not_on_threads():
    """Their order does not matter, and neither baseline nor base model are changed."""
    whole = train(chunk=STUDENTS)
    env, order = tiny_examiner(tiny_backbone()), [3, 0, 3]
    start = random_stack(env.backbone, 1)
    before = start.digest(), env.backbone.base_digest()
    found = train_population(env, start, plans(order), CONFIG)
    assert (start.digest(), env.backbone.base_digest()) == before
    assert not any(tensor.requires_grad for tensor in (*start.tensors.values(), *found.stack.tensors.values()))
    assert found.rollouts == 3 * STEPS * 2 * 6 and not found.failed_P.any()
    near(found.stack, whole.stack.select(order))
    assert same_stacks(found.stack.select([0]), found.stack.select([2]))
    one, two = train(chunk=2), train(chunk=2, threads=2)
    assert same_stacks(one.stack, two.stack) and one.metrics == two.metrics


def test_students_that_workers_trained_stay_on_the_host_until_one_is_promoted(monkeypatch):
    """They are measured by workers again; a GPU of this process has no use for them."""
    env = tiny_examiner(tiny_backbone())
    start, trained = random_stack(env.backbone, 1), [TrainState(0, random_stack(env.backbone, 1), metrics=[{}])]
    monkeypatch.setattr(population, "map_tasks", lambda *given: [trained])
    env.backbone.device = torch.device("meta")
    found = train_population(env, start, plans(range(1)), CONFIG)
    assert found.stack.digest() == trained[0].stack.digest()


@pytest.mark.parametrize(("chunk", "kl"), [(STUDENTS, 0.01), (1, 0.0)])
def test_a_diverged_student_is_reported_and_leaves_the_others_alone(chunk, kl):
    """Alone and without KL its rows have no advantage, so the update never meets the NaN; the sampler does."""
    starts = random_stack(tiny_backbone(), STUDENTS)
    ill = starts.select(list(range(STUDENTS)))
    ill.tensors["model.layers.1.self_attn.v_proj.B"][2] = torch.nan
    well, found = (train(chunk=chunk, start=stack, kl=kl) for stack in (starts, ill))
    assert well.failed_P.tolist() == [False] * STUDENTS
    assert found.failed_P.tolist() == [p == 2 for p in range(STUDENTS)]
    near(found.stack.select([0, 1, 3, 4]), well.stack.select([0, 1, 3, 4]))
    assert train(chunk=2, start=ill, kl=kl).metrics[0]["kl"] == pytest.approx(found.metrics[0]["kl"], nan_ok=True)


@given(st.integers(1, 12), st.integers(0, 2**40), st.integers(1, 7), st.integers(1, 6))
def test_shuffled_passes(count, seed, steps, per_step):
    problems = some_problems(count)
    found = shuffled_passes(problems, seed, steps, per_step)
    assert [len(batch) for batch in found] == [per_step] * steps
    ids = [problem.id for batch in found for problem in batch]
    passes = [ids[first : first + count] for first in range(0, len(ids), count)]
    assert all(len(set(part)) == len(part) for part in passes)
    assert found == shuffled_passes(problems, seed, steps + 3, per_step)[:steps]


def test_steps_grow_with_promotions_up_to_the_limit():
    configs = [StudentConfig(steps=steps, extra_steps_per_promotion=5, max_steps=20) for steps in (10, 30)]
    assert [[inner_steps(config, n) for n in range(4)] for config in configs] == [[10, 15, 20, 20], [30, 30, 30, 30]]
    free, fixed = tiny_backbone(), tiny_backbone(chunk=3)

    def chunk(backbone: Any, policies: int, threads: int, workers: int = 0) -> int:
        parallel = SimpleNamespace(size=workers) if workers else None
        return choose_chunk(SimpleNamespace(backbone=backbone, threads=threads, parallel=parallel), policies)  # type: ignore[arg-type]

    assert [chunk(free, 16, threads) for threads in (1, 2, 3)] == [8, 8, 6]
    assert [chunk(free, policies, 2) for policies in (1, 2, 5)] == [1, 1, 3]
    assert [chunk(fixed, policies, 1) for policies in (2, 3, 9)] == [2, 3, 3]
    assert chunk(free, 16, 2, workers=2) == 8  # on a CPU as without them
    free.device = torch.device("cuda")
    assert [chunk(free, 16, 1), chunk(free, 15, 1, workers=2)] == [16, 8]


@pytest.mark.parametrize(("adapter", "stop"), [("lora", 1), ("full", 2)])
def test_a_training_that_is_continued_gives_the_same_bytes(adapter, stop):
    env = tiny_examiner(tiny_backbone(adapter=adapter))
    start = random_stack(env.backbone, 1)

    def run(begun: list[TrainState], steps: int) -> list[TrainState]:
        given = list(zip(map(Plan, batches(2), [7, 8]), begun, strict=True))
        students = Training(env.backbone, given, CONFIG)
        for _ in rloo_steps(env, students, CONFIG):
            if students.step == steps:
                break
        return students.states(True)

    whole = run([TrainState(0, start)] * 2, STEPS)
    begun = copy.deepcopy(run([TrainState(0, start)] * 2, stop))
    rest = run([replace(state, metrics=[]) for state in begun], STEPS)
    for one, other, middle in zip(rest, whole, begun, strict=True):
        assert same_stacks(one.stack, other.stack)
        assert (middle.step, len(middle.metrics)) == (stop, stop)
        assert (one.rollouts, one.tokens, one.failed) == (other.rollouts, other.tokens, False)
        assert middle.metrics + one.metrics == other.metrics
    assert run([replace(state, failed=True) for state in begun], STEPS)[0].failed  # a failure is remembered


def test_hints_fade_with_success_and_come_back_without(monkeypatch):
    problem = Problem("p", "question", "0")
    shown = [hinted(problem, "one two three four five six", level).question for level in range(5)]
    assert shown[0] == "question" and shown[4] == "question\n\nHint: one two three four five six"
    assert [len(text.split()) for text in shown] == [1, 4, 5, 7, 8]  # a quarter of six words, rounded up
    backbone, no, zero = tiny_backbone(), torch.tensor([False]), torch.zeros(1)
    plan = Plan([[problem, Problem("q", "without one", "1")]], 0, hints={"p": "a hint"})
    students = Training(backbone, [(plan, TrainState(0, random_stack(backbone, 1)))], CONFIG)
    (state,), levels, rollouts = students.states_P, [], rollouts_of(backbone, [*"abab"], [1])
    for solved in (False, True, True, True, True, True, False):
        attempts = torch.tensor([[[False, solved], [False, False]]])
        batch = RolloutBatch(plan.batches, 1.0, rollouts, [], attempts.float(), attempts, attempts | True, no)
        students.record(batch, UpdateStats(zero, zero, zero, no))
        levels.append(state.levels["p"])
    assert levels == [4, 3, 2, 1, 0, 0, 1] and state.metrics[-1]["hint_share"] == 0.25
    reward, valid = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[True, True, False]]])
    judged = replace(batch, reward_P_Q_N=reward, valid_P_Q_N=valid)
    assert students.advantages(judged, False).tolist() == [1.0, -1.0, 0.0], "what cannot be scored has no say"
    monkeypatch.setattr("soar.loop.student.likelihood", lambda *given: torch.full((1, 1, 2), 0.5))
    students.plans = (replace(plan, likelihood=True),)
    paid = students.with_dense_rewards(SimpleNamespace(scheme="paper"), batch)  # type: ignore[arg-type]
    assert paid.reward_P_Q_N.tolist() == [[[60.0, 60.0]] * 2]
    students.record(batch, UpdateStats(zero, zero, zero, ~no))
    assert students.failed_P.all(), "NaN in the update alone"
    rows = [{"kl": float("nan"), "reward_mean": 1.0}, {"kl": 0.5, "reward_mean": 3.0}]
    assert mean_metrics(rows) == {"kl": 0.5, "reward_mean": 2.0}


SAMPLING = SamplingConfig(max_tokens=12)


@pytest.fixture(scope="module")
def env() -> RolloutEnv:
    return tiny_examiner(tiny_backbone())


def texts(env: RolloutEnv, batch: RolloutBatch) -> list[str]:
    return batch.rollouts.texts(env.backbone)


def test_rows_are_policy_question_attempt(env):
    stack = random_stack(env.backbone, 2)
    problems = [some_problems(3), some_problems(3, first=5)]
    batch = env.rollout(stack, problems, 4, [1, 2], SAMPLING)
    written = texts(env, batch)
    for row, (p, q, n) in enumerate(itertools.product(range(2), range(3), range(4))):
        assert batch.rollouts.prompts[row] == tuple(env.prompt(problems[p][q]))
        solved = problems[p][q].answer in written[row].split()
        assert batch.solved_P_Q_N[p, q, n].item() is solved is batch.verdicts[row].solved
        assert batch.reward_P_Q_N[p, q, n].item() == float(solved)
    assert 0 < batch.solved_P_Q_N.sum() < 24
    torch.testing.assert_close(batch.pass_rate_P(), batch.solved_P_Q_N.float().mean((1, 2)))


def test_an_attempt_depends_on_its_problem_and_number_alone(env):
    problems = some_problems(5)
    stack = random_stack(env.backbone, 2)
    whole = texts(env, env.rollout(stack, [problems, problems], 3, [7, 8], SAMPLING))
    order = [4, 1, 3]
    part = env.rollout(stack.select([1]), [[problems[i] for i in order]], 2, [8], SAMPLING)
    expected = [whole[15 + i * 3 + n] for i in order for n in range(2)]
    assert texts(env, part) == expected
    assert whole[:15] != whole[15:]
    later = env.rollout(stack, [problems, problems], 2, [7, 8], SAMPLING, first=1)  # as screening does, wave by wave
    assert texts(env, later) == [text for row, text in enumerate(whole) if row % 3]
    problem = some_problems(1)[0]
    batch = texts(env, env.rollout(None, [[problem, problem]], 4, [3], SAMPLING))
    once = texts(env, env.rollout(None, [[problem]], 4, [3], SAMPLING))
    assert batch[:4] == once != batch[4:] and len({*batch}) == 8
    nothing = env.rollout(None, [[Problem("no gold", "a b", "?")]], 2, [1], SAMPLING)
    assert nothing.pass_rate_P().tolist() == [0.0]
    stack = random_stack(env.backbone, 1)
    problems = [some_problems(5)]
    alone = env.rollout(stack, problems, 4, [3], SAMPLING)
    shared = env.rollout(stack, problems, 4, [3], SAMPLING, threads=3)
    assert (shared.rollouts.prompts, texts(env, shared)) == (alone.rollouts.prompts, texts(env, alone))
    torch.testing.assert_close(shared.rollouts.logprob_B_T, alone.rollouts.logprob_B_T, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("scheme", "points"), [("binary", [0.9, 0.2, 0.1, 0.0]), ("paper", [120.0, 10.0, 10.0, 0.0])])
def test_scores_are_rewards_under_binary_and_only_what_cannot_be_scored_is_left_out(env, monkeypatch, scheme, points):
    verdicts = Verdicts([Verdict.CORRECT, Verdict.WRONG, Verdict.TIMEOUT, Verdict.UNSCORABLE])
    verdicts.scores = [0.9, 0.2, 0.1, 0.0]
    verifier = SimpleNamespace(check=Mock(return_value=verdicts), compares=False)
    monkeypatch.setattr(env, "verifier", verifier)
    monkeypatch.setattr(env, "scheme", scheme)
    monkeypatch.setattr("soar.loop.rollout.opens_thinking", lambda *given: scheme == "paper")
    batch = env.rollout(None, [[Problem("p", "a b", "z"), Problem("q", "a b", "z")]], 2, [1], SAMPLING)
    assert batch.reward_P_Q_N.flatten().tolist() == pytest.approx(points)
    assert batch.valid_P_Q_N.flatten().tolist() == [True, True, True, False], "late is wrong"
    assert batch.pass_rate_P().item() == 0.25, "1 of 2 and 0 of 1: questions count alike, as they do for the baseline"
    assert verifier.check.call_args.args[2]["completion_ids"] == rows_of(batch.rollouts)
    assert [text.startswith("<think>") for text in batch.texts] == [scheme == "paper"] * 4, "an open block stays one"


@pytest.mark.parametrize(("kind", "text", "named"), cases("student", "faults"))
def test_a_fault_in_a_run_is_named(kind, text, named):
    fault = {**vars(builtins), "OutOfMemoryError": torch.cuda.OutOfMemoryError}[kind](text)
    with pytest.raises(Exception) as caught, saved_run("soar run --out DIR --resume"):
        raise fault
    assert isinstance(caught.value, Interrupted if named else type(fault)) and (caught.value is fault or named)
    assert not named or (named in str(caught.value) and "soar run --out DIR --resume" in str(caught.value))


def test_all_students_failing_is_a_named_error_and_the_run_can_go_on(tmp_path, monkeypatch):
    changes = ("teacher.steps=2", "arms.run=[]")
    real = pipeline.OuterLoop.teach

    def diverge(self: Any, question_sets: Any) -> Any:
        population = real(self, question_sets)
        population.failed_P[:] = True
        return population

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(pipeline.OuterLoop, "teach", diverge)
        run_tiny(tmp_path / "run", *changes)
    assert "every student of outer step 0 produced NaN or inf" in str(caught.value)
    first, alarm = events(tmp_path / "run")[1:]
    assert (first["failed_students"], first["reward_mean"], first["teacher_kl"]) == (6, None, None)
    assert alarm["kind"] == "all students failed"
    assert run_tiny(tmp_path / "run", *changes, resume=True)["outer_steps"] == 2
    assert [row["failed_students"] for row in events(tmp_path / "run", "outer_step")] == [6, 0]
