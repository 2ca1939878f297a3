"""Reward functions as they are: shapes told from signatures, and scores that reach RLOO."""

from __future__ import annotations

from pathlib import Path

import pytest

from soar.config import SamplingConfig, load
from soar.loop.rollout import RolloutEnv
from soar.problems.domain import load_function
from soar.problems.pool import VerifierPool
from soar.problems.verify import VerifierError
from soar.problems.worker import adapt
from soar.run.setup import open_env
from soar.types import Problem, Verdict

FILE = """
from typing import Any

def trl_text(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
    return [float(text.endswith(gold)) for text, gold in zip(completions, answer)]

def trl_chat(prompts, completions, completion_ids, solution, level, **kwargs):
    assert prompts == [[{"role": "user", "content": "What is 1+1?"}]] and level == ["easy"]
    assert isinstance(completion_ids[0], list) and set(kwargs) >= {"trainer_state", "log_extra", "answer", "ground_truth"}
    return [1.0 if reply[0]["content"].endswith(gold) else None for reply, gold in zip(completions, solution)]

async def trl_async(completions, answer, log_metric, **kwargs):
    log_metric("seen", 1)
    return [0.5 if text.endswith(answer[0]) else 0 for text in completions]

def tokens(completion_ids: list[list[int]], **kwargs) -> list[float]:
    return [len(ids) / 4 for ids in completion_ids]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str.endswith(ground_truth)), "acc": True} if data_source == "gsm8k" else -1

def rubric(prompt, completion, answer, state, parser):
    assert state["answer"] == answer and prompt[-1]["content"]
    return 1.0 if parser.parse_answer(completion) == answer else 0.25

async def rubric_async(completion: "Messages", info, **kwargs) -> float:
    return float(completion[-1]["content"].endswith(info["target"]))

def plain(response, gold):
    return response.endswith(gold)

def plain_too(completion, answer):
    return 0.75 if answer in completion else None

class Callable_:
    def __call__(self, completions, answer, **kwargs):
        return [float(text.endswith(answer[0])) for text in completions]

instance = Callable_()

def three(a, b, c): return 1
def a_string(completions, **kwargs): return "1"
def two_values(completions, **kwargs): return [1.0, 1.0]
def a_word(completion, answer): return "yes"
def infinite(completion, answer): return float("inf")
def raises(completion, answer): return 1 / 0
def half(completion, answer): return 0.5
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(FILE, encoding="utf-8")
    return path


ROW = {
    "question": "What is 1+1?", "answer": "2", "level": "easy", "data_source": "gsm8k", "info": {"target": "2"},
    "completion_ids": [5, 6],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "chat", "right", "wrong"),
    [
        ("trl_text", "TRL", False, 1.0, 0.0),
        ("trl_chat", "TRL", True, 1.0, None),
        ("trl_async", "TRL", False, 0.5, 0.0),
        ("tokens", "TRL", False, 0.5, 0.5),
        ("compute_score", "verl", False, 1.0, 0.0),
        ("rubric", "verifiers", True, 1.0, 0.25),
        ("rubric_async", "verifiers", True, 1.0, 0.0),
        ("plain", "plain", False, 1.0, 0.0),
        ("plain_too", "verifiers", False, 0.75, None),
        ("instance", "TRL", False, 1.0, 0.0),
    ],
)
def test_shapes_are_told_from_the_signature(
    file: Path, name: str, shape: str, chat: bool, right: float | None, wrong: float | None
) -> None:
    reward = adapt(load_function(f"{file}:{name}"), name)
    assert (reward.shape, reward.chat) == (shape, chat)
    assert [reward("Answer: 2", ROW), reward("Answer: 3", ROW)] == [right, wrong]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("three", r"three\(a, b, c\): expected the shape of TRL"),
        ("a_string", "returned str; expected a list"),
        ("two_values", "returned 2 values for 1 completion"),
        ("a_word", r"returned a str \('yes'\)"),
        ("infinite", r"returned a float \(inf\)"),
    ],
)
def test_other_shapes_are_refused(file: Path, name: str, message: str) -> None:
    with pytest.raises(VerifierError, match=message):
        adapt(load_function(f"{file}:{name}"), name)("x", ROW)


def test_the_rewards_of_trl_work_as_they_are() -> None:
    rewards = pytest.importorskip("trl.rewards")
    accuracy = adapt(rewards.accuracy_reward, "trl.rewards:accuracy_reward")
    boxes = [r"so $\boxed{\frac{1}{2}}$", r"so $\boxed{\frac{1}{3}}$"]
    assert [accuracy(text, {"question": "q", "answer": r"\frac12"}) for text in boxes] == [1.0, 0.0]
    form = adapt(rewards.think_format_reward, "trl.rewards:think_format_reward")
    assert [form(text, ROW) for text in ("<think>\nx\n</think>\ny", "y")] == [1.0, 0.0]
    overlong = adapt(rewards.get_soft_overlong_punishment(4, 2), "overlong")
    assert [overlong("", {**ROW, "completion_ids": [0] * n}) for n in (2, 3, 5)] == [0.0, -0.5, -1.0]


def test_a_pool_keeps_scores_and_calls_solved_what_reaches_the_threshold(file: Path) -> None:
    texts, golds = ["Answer: 2", "Answer: 3", "none"], ["2", "2", "3"]
    with VerifierPool(f"{file}:rubric", workers=1, success_at=0.2) as pool:
        verdicts = pool.check(["\\boxed{2}", "\\boxed{3}"], ["2", "2"], {"question": ["q", "q"]})
        assert (verdicts, verdicts.scores) == ([Verdict.CORRECT] * 2, [1.0, 0.25])  # type: ignore[attr-defined]
    with VerifierPool(f"{file}:plain_too", workers=1, success_at=0.8) as pool:
        verdicts = pool.check(texts, golds)
        assert verdicts == [Verdict.WRONG, Verdict.UNSCORABLE, Verdict.UNSCORABLE]
        assert verdicts.scores == [0.75, 0.0, 0.0]  # type: ignore[attr-defined]
    with VerifierPool(f"{file}:raises", workers=1) as pool:
        assert pool.check(["x"], ["1"]) == [Verdict.CRASHED]


def test_graded_scores_and_tokens_reach_the_update(file: Path) -> None:
    problem, sampling = Problem("p", "47 a+8", "55"), SamplingConfig(max_tokens=6)
    for name, success_at in (("half", 0.6), ("tokens", 1.0)):
        keys = [f"problems.verifier={file}:{name}", f"problems.success_at={success_at}", "problems.verify_workers=1"]
        with open_env(load("tiny", [*keys, "threads=1", "model.device=cpu"])) as env:
            assert isinstance(env, RolloutEnv)
            batch = env.rollout(None, [[problem]], 2, [0], sampling)
        lengths = batch.rollouts.length_B.tolist()
        scores = [0.5, 0.5] if name == "half" else [length / 4 for length in lengths]
        assert batch.reward_P_Q_N.flatten().tolist() == scores
        assert batch.solved_P_Q_N.flatten().tolist() == [score >= success_at for score in scores]
