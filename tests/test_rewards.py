"""Teacher text to problems with a reason for every refusal, rewards of students and teacher as numbers; reward functions."""

import math
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ROOT, WordChecker, random_stack
from loop_helpers import (
    BRIEF,
    Says,
    ScriptedLoop,
    easy_problems,
    events,
    read_jsonl,
    rollouts_of,
    run_tiny,
    tiny_config,
)
from tables import CASES, cases
from world_text import ANSWER_MARK

from soar import seeds
from soar.config import Config, ConfigError, SamplingConfig, load
from soar.loop.likelihood import answer_marks, likelihood
from soar.loop.population import Population
from soar.loop.rewards import grounded, shuffle_answers
from soar.loop.rollout import RolloutBatch, RolloutEnv, student_reward
from soar.loop.teacher import Measurement, OuterLoop, new_state
from soar.loop.write import QuestionSets
from soar.problems.domain import Domain, Grader, load_function
from soar.problems.load import fingerprint
from soar.problems.pool import VerifierPool, adapt
from soar.problems.prompts import FORMATS, PromptFormat
from soar.problems.verify import VerifierError
from soar.run.interrupts import Stopped
from soar.run.setup import open_env
from soar.types import Problem, Reason, Rejection, Verdict

TAGS = FORMATS["tags"]


def read(text: str, fmt: PromptFormat = TAGS, truncated: bool = False) -> list[str] | Reason:
    outcome = Grader(Domain(fmt.name, fmt)).read(text, truncated)
    if isinstance(outcome, Rejection):
        assert outcome.text == text
        return outcome.reason
    assert outcome.id == fingerprint(outcome.question)[:16]
    return [outcome.question, outcome.answer]


def tags(question: str, answer: str) -> str:
    return f"Let me think.\n<question>\n{question}\n</question>\n<answer>\n{answer}\n</answer>\nDone."


@pytest.mark.parametrize("name", ["tags", "question_answer", "tiny"])
def test_what_is_read_in_a_teachers_text(name):
    rows = cases("rewards", name)
    assert [[text, read(text, FORMATS[name])] for text, _ in rows] == rows
    assert read(TAGS.teacher_template) is Reason.PLACEHOLDER
    assert Grader(Domain("tags", TAGS, "math")).read(tags("?", r"\boxed{1/0}")).reason is Reason.UNPARSABLE_ANSWER
    assert {read(tags(q, rf"\boxed{{{a}}}")) for q, a in (("x" * 5_000, "4"), ("?", "1" * 3_000))} == {Reason.TOO_LONG}


@pytest.mark.parametrize("fmt", FORMATS.values())
def test_truncated_text_is_no_problem(fmt):
    for text in (tags("What is 6 times 7?", r"\boxed{42}"), " Q?\nAnswer: 42", "47 <ans> 47", ""):
        assert read(text, fmt, truncated=True) is Reason.TRUNCATED
    assert read("", fmt) is Reason.EMPTY
    assert isinstance(read("x", fmt), Reason)


def test_student_reward():
    for verdict, text, *points in cases("rewards", "reward"):
        assert [student_reward(Verdict(verdict), text, "42", s) for s in ("binary", "paper")] == points, text
    rewards, errors = grounded([[0.1, 0.3, 0.2], [0.5], [], [0.0, 0.0]])
    assert rewards == [pytest.approx(0.2), 0.5, None, 0.0]
    assert errors == [pytest.approx(0.1 / math.sqrt(3)), None, None, 0.0]
    assert answer_marks(FORMATS["tags"]) == ("\\boxed{", "}")
    assert answer_marks(FORMATS["question_answer"]) == ("Answer:", "")
    with pytest.raises(ConfigError, match="whose answer stands behind one mark"):
        answer_marks(PromptFormat("mine", "marker", "", ""))


def config_of(reward: str, *more: str) -> Config:
    return tiny_config(f"teacher.reward={reward}", "intrinsic.attempts=4", "reward.mode=sampled", *more)


def test_known_attempts_give_the_known_learnability(env):
    """What four attempts say at each of six questions (-: nothing), of which the last one has no gold answer."""
    said = ["" if answer == "-" else answer for answer in "2234111111221-34----1111"]
    problems = [replace(problem, answer=gold) for problem, gold in zip(easy_problems(6), "11111?", strict=True)]
    question_sets = QuestionSets([problems[:3], problems[3:]], None, 6, {})  # type: ignore[arg-type]
    loop = ScriptedLoop(config_of("learnability"), [])
    loop.env = RolloutEnv(env.backbone, Says(env.backbone, said), env.fmt, WordChecker())  # type: ignore[arg-type]
    loop.env.rollout = rollout = Mock(wraps=loop.env.rollout)
    loop.state.step = 3
    reward_U, reward_G = loop.assign_credit(question_sets, Measurement([0.5, 0.5], [None, None], 0.0, []))
    assert reward_U == [0.0, 0.0, 0.5, 0.75, 0.0, None]
    assert reward_G == pytest.approx([0.5 / 3, 0.75 / 2]) and loop.state.student_rollouts == 24
    asked, _, _, place, _ = rollout.call_args.args
    assert asked is loop.state.baseline and place == [seeds.derive(0, "intrinsic", 3)]


def test_shuffled_answers_stay_in_their_dataset_and_leave_their_question(log):
    sets = [[Problem(f"{k}{i}", f"q{k}{i}", f"a{k}{i}") for i in range(n)] for k, n in enumerate((7, 3, 2))]
    question_sets = QuestionSets(sets, None, 12, {})  # type: ignore[arg-type]
    shuffled = shuffle_answers(question_sets, 0, 2).problems_G_Q
    for before, after in zip(sets, shuffled, strict=True):
        assert [p.question for p in after] == [p.question for p in before]
        assert Counter(p.answer for p in after) == Counter(p.answer for p in before)
        assert all(a.answer != b.answer for a, b in zip(after, before, strict=True))
    assert shuffle_answers(question_sets, 0, 2).problems_G_Q == shuffled
    assert [p.answer for p in shuffle_answers(question_sets, 0, 3).problems_G_Q[0]] != [p.answer for p in shuffled[0]]
    rows, plain = (ScriptedLoop(config_of(reward), [[[1, 1]] * 3]).step()[1] for reward in ("shuffled", "grounded"))
    assert [row["answer"] for row in plain[:4]] == ["0", "1", "2", "3"]
    assert [row["answer"] for row in rows[:4]] != ["0", "1", "2", "3"] == sorted(row["answer"] for row in rows[:4])
    assert len(log.advantages) == 2, "its teacher is paid, too"


def test_the_teacher_learns_from_its_reward_and_students_are_promoted_by_improvement(log, monkeypatch):
    """The reward of each of 12 questions against the mean of the 11 others."""
    paid = [0.5, 0.0, 0.75, 0.0] * 3
    plain = ("teacher.optimizer.normalize_advantages=false", "reward.mode=greedy", "reward.questions=8")
    loop = ScriptedLoop(config_of("learnability", "promotion.tau=0.01", *plain), [[[8, 8], [0, 0], [4, 4]]])
    monkeypatch.setattr(loop, "assign_credit", lambda *given: (paid, [0.3125] * 3))
    (event, promotion), _ = loop.step()
    assert (event["teacher_reward_G"], event["reward_G"], promotion["dataset"]) == ([0.3125] * 3, [1.0, 0.0, 0.5], 0)
    wanted = [(reward - 0.3125) * 12 / 11 for reward in paid]
    assert log.advantages[0].flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_dense_reward_is_the_mean_probability_of_the_gold_answer_behind_the_reasoning(env):
    """By hand: a softmax over the model's logits at the places before the answer's tokens and the end token."""
    problem, temperature, no = easy_problems(1)[0], 0.5, torch.zeros(2, 1, 3)
    backbone, stack = env.backbone, random_stack(env.backbone, 2)
    tokenizer, prompt = backbone.tokenizer, env.prompt(problem)
    texts = [f"{problem.question} {ANSWER_MARK} 1", f"1 {ANSWER_MARK} 2 {ANSWER_MARK} 3", "1 2"]
    rollouts = rollouts_of(backbone, [*texts, *texts], prompt)
    asked, failed_P = [[problem], [problem]], torch.zeros(2).bool()
    batch = RolloutBatch(asked, temperature, rollouts, [], no, no.bool(), ~no.bool(), failed_P)
    reward = likelihood(env, stack, batch, [1])
    for n, reasoning in enumerate((texts[0][:-2], texts[1][:-2])):
        start = [*prompt, *tokenizer.encode(reasoning, add_special_tokens=False)]
        answer = [*tokenizer.encode(f" {problem.answer}", add_special_tokens=False), min(backbone.end_ids)]
        ids = torch.tensor([[*start, *answer]])
        with torch.no_grad(), backbone.use(stack.select([1])):
            logits = backbone.model(input_ids=ids).logits[0, len(start) - 1 : -1].float()
        share = (logits / temperature).softmax(-1)[range(len(answer)), answer].mean().item()
        assert reward[0, 0, n].item() == pytest.approx(share, rel=1e-4)
    assert reward.shape == (1, 1, 3) and reward[0, 0, 2] == 0  # who never answers earns nothing


@pytest.mark.parametrize(("fmt", "text", "gold", "forced", "wanted", "last"), cases("rewards", "dense"))
def test_what_the_dense_reward_is_asked_of(monkeypatch, fmt, text, gold, forced, wanted, last):
    """The text that is read, a token a character, and how many of its last tokens count. 40 fit with a prompt of 10."""
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(map(ord, text)))
    backbone = SimpleNamespace(tokenizer=tokenizer, end_id=ord("$"), context=40, pad_id=0)
    chosen = SimpleNamespace(prompts=[[1] * 10], texts=lambda backbone: [text])
    batch: Any = SimpleNamespace(problems_P_Q=[[Problem("p", "q", gold)]], reward_P_Q_N=torch.zeros(1, 1, 1))
    batch.rollouts, batch.temperature = SimpleNamespace(select=lambda rows: chosen), 1.0
    read = Mock(side_effect=lambda *given: torch.arange(given[2].tokens_B_T.shape[1])[None].log())
    monkeypatch.setattr("soar.loop.likelihood.score", read)
    stack: Any = SimpleNamespace(policies=1, select=lambda policies: None)
    env: Any = SimpleNamespace(fmt=FORMATS[fmt], backbone=backbone)
    paid = likelihood(env, stack, batch, forced=forced).item()
    assert "".join(map(chr, read.call_args.args[2].tokens_B_T[0].tolist())) == wanted
    assert paid == pytest.approx(len(wanted) - (last + 1) / 2 if last else 0.0), "share t at place t"


@pytest.mark.parametrize("mode", ["likelihood", "forced"])
def test_dense_grounding_pays_the_gain_in_likelihood(env, mode):
    """Students against the baseline on the same questions, by `likelihood` itself."""
    keys = [f"reward.mode={mode}", "reward.attempts=3", "reward.baseline_attempts=2", "reward.questions=2"]
    config = tiny_config(*keys, "teacher.datasets=2", "student.repeats=1", "teacher.questions=4")
    problems = easy_problems(2)
    loop = OuterLoop(env, problems, config, new_state(env, config))
    population = Population(random_stack(env.backbone, 2), torch.zeros(2).bool(), [{}], 0)
    measured = loop.measure(population)
    by_hand = []
    for stack, attempts, name in ((population.stack, 3, "measure"), (loop.state.baseline, 2, "baseline")):
        asked, seed = [problems] * stack.policies, [seeds.derive(config.seed, name, 0)] * stack.policies
        batch = env.rollout(stack, asked, attempts, seed, config.student.sampling)
        paid = likelihood(env, stack, batch, forced=mode == "forced")
        by_hand.append(paid.mean((1, 2)))
    assert measured.reward_G == pytest.approx((by_hand[0] - by_hand[1]).tolist(), abs=1e-6)
    assert measured.baseline == pytest.approx(by_hand[1].item(), abs=1e-6) and measured.baseline > 0


SHAPES = ROOT / "examples" / "rewards.py"
OTHERS = (CASES / "reward_shapes.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "others.py"
    path.write_text(OTHERS, encoding="utf-8")
    return path


def test_questions_of_a_teacher_have_what_all_rows_of_the_file_say(file, tmp_path):
    """A function that goes by verl's data_source judges them too; the halves of the hard set keep all columns."""
    texts = [{"question": problem.question, "answer": problem.answer} for problem in easy_problems(12)]
    alike = {"data_source": "x", "made": date(2026, 1, 2), "prompt": "Solve it."}
    told = [{**alike, "level": level, **row} for level, row in enumerate(texts)]
    pq.write_table(pa.Table.from_pylist(told), tmp_path / "p.parquet")
    keys = [f"problems.source={tmp_path / 'p.parquet'}", f"problems.verifier={file}:by_source", *BRIEF]
    run_tiny(tmp_path / "run", *keys, "teacher.steps=1", 'arms.run=["base"]')
    (event,), half = events(tmp_path / "run", "outer_step"), read_jsonl(tmp_path / "run" / "hard" / "test.jsonl")
    assert event["student_first"]["not_judged"] == 0.0
    assert {(row["data_source"], row["made"], row["level"] < 12) for row in half} == {("x", "2026-01-02", True)}
    with pytest.raises(Stopped, match="outer step 0 waits"):
        run_tiny(tmp_path / "sets", *keys, "backend.kind=files")
    rows = read_jsonl(tmp_path / "sets" / "sets" / "0000" / "0-0" / "train.jsonl")
    made = {(row["made"], row.get("level"), row["question"] in row["prompt"]) for row in rows}
    assert made == {("2026-01-02", None, True)}, "what a single row says is not said of them"


((ROW,),) = cases("reward_functions", "row")


@pytest.mark.parametrize(("name", "shape", "chat", "right", "wrong"), cases("reward_functions", "shape"))
def test_shapes_are_told_from_the_signature(name, shape, chat, right, wrong):
    reward = adapt(load_function(f"{SHAPES}:{name}"), name)
    assert (reward.shape, reward.chat) == (shape, chat)
    assert [reward("Answer: 2", ROW), reward("Answer: 3", ROW)] == [right, wrong]


@pytest.mark.parametrize(("name", "message"), cases("reward_functions", "refused"))
def test_other_shapes_are_refused(file, name, message):
    with pytest.raises(VerifierError, match=message):
        adapt(load_function(f"{file}:{name}"), name)("x", ROW)


def test_the_rewards_of_trl_work_as_they_are():
    rewards = pytest.importorskip("trl.rewards")
    accuracy = adapt(rewards.accuracy_reward, "trl.rewards:accuracy_reward")
    boxes = [r"so $\boxed{\frac{1}{2}}$", r"so $\boxed{\frac{1}{3}}$"]
    assert [accuracy(text, {"question": "q", "answer": r"\frac12"}) for text in boxes] == [1.0, 0.0]
    form = adapt(rewards.think_format_reward, "trl.rewards:think_format_reward")
    assert [form(text, ROW) for text in ("<think>\nx\n</think>\ny", "y")] == [1.0, 0.0]
    overlong = adapt(rewards.get_soft_overlong_punishment(4, 2), "overlong")
    assert [overlong("", {**ROW, "completion_ids": [0] * n}) for n in (2, 3, 5)] == [0.0, -0.5, -1.0]


def test_a_pool_keeps_scores_and_calls_solved_what_reaches_the_threshold(file):
    assert adapt(load_function(f"{file}:by_helper"), "by_helper")("x", ROW) == 1.0, "its helper reads messages"
    texts, golds = ["Answer: 2", "Answer: 3", "none"], ["2", "2", "3"]
    with VerifierPool(f"{SHAPES}:rubric", workers=1, success_at=0.2) as pool:
        verdicts = pool.check(["\\boxed{2}", "\\boxed{3}"], ["2", "2"], {"question": ["q", "q"]})
        assert (verdicts, verdicts.scores) == ([Verdict.CORRECT] * 2, [1.0, 0.25])  # type: ignore[attr-defined]
    with VerifierPool(f"{file}:plain_too", workers=1, success_at=0.8) as pool:
        verdicts = pool.check(texts, golds)
        assert verdicts == [Verdict.WRONG, Verdict.UNSCORABLE, Verdict.UNSCORABLE]
        assert verdicts.scores == [0.75, 0.0, 0.0]  # type: ignore[attr-defined]
    with VerifierPool(f"{file}:raises", workers=1) as pool:
        assert pool.check(["x"], ["1"]) == [Verdict.CRASHED]


def test_graded_scores_and_tokens_reach_the_update(file, monkeypatch):
    problem, sampling = Problem("p", "47 a+8", "55"), SamplingConfig(max_tokens=6)
    monkeypatch.setattr("soar.run.setup.turn_end_ids", lambda tokenizer: frozenset({7}))
    for name, source, success_at, fmt in (("half", file, 0.6, "tags"), ("tokens", SHAPES, 1.0, "tiny")):
        keys = [f"problems.verifier={source}:{name}", f"problems.success_at={success_at}", "problems.verify_workers=1"]
        with open_env(load("tiny", [*keys, f"problems.format={fmt}", "threads=1", "model.device=cpu"])) as env:
            assert isinstance(env, RolloutEnv) and (env.backbone.end_id == 7) is (fmt == "tags")  # has turns
            batch = env.rollout(None, [[problem]], 2, [0], sampling)
        lengths = batch.rollouts.length_B.tolist()
        scores = [0.5, 0.5] if name == "half" else [length / 4 for length in lengths]
        assert batch.reward_P_Q_N.flatten().tolist() == scores
        assert batch.solved_P_Q_N.flatten().tolist() == [score >= success_at for score in scores]
