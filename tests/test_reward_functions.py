"""Reward functions as they are: shapes told from signatures, and scores that reach RLOO."""

from pathlib import Path

import pytest
from helpers import ROOT
from tables import cases

from soar.config import SamplingConfig, load
from soar.loop.rollout import RolloutEnv
from soar.problems.domain import load_function
from soar.problems.pool import VerifierPool, adapt
from soar.problems.verify import VerifierError
from soar.run.setup import open_env
from soar.types import Problem, Verdict

SHAPES = ROOT / "examples" / "rewards.py"
OTHERS = """
def three(a, b, c): return 1
def a_string(completions, **kwargs): return "1"
def two_values(completions, **kwargs): return [1.0, 1.0]
def a_word(completion, answer): return "yes"
def infinite(completion, answer): return float("inf")
def raises(completion, answer): return 1 / 0
def half(completion, answer): return 0.5
def plain_too(completion, answer): return 0.75 if answer in completion else None
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "others.py"
    path.write_text(OTHERS, encoding="utf-8")
    return path


ROW = {
    "question": "What is 1+1?", "answer": "2", "level": "easy", "data_source": "gsm8k", "info": {"target": "2"},
    "completion_ids": [5, 6],
}  # fmt: skip


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


def test_graded_scores_and_tokens_reach_the_update(file):
    problem, sampling = Problem("p", "47 a+8", "55"), SamplingConfig(max_tokens=6)
    for name, source, success_at in (("half", file, 0.6), ("tokens", SHAPES, 1.0)):
        keys = [f"problems.verifier={source}:{name}", f"problems.success_at={success_at}", "problems.verify_workers=1"]
        with open_env(load("tiny", [*keys, "threads=1", "model.device=cpu"])) as env:
            assert isinstance(env, RolloutEnv)
            batch = env.rollout(None, [[problem]], 2, [0], sampling)
        lengths = batch.rollouts.length_B.tolist()
        scores = [0.5, 0.5] if name == "half" else [length / 4 for length in lengths]
        assert batch.reward_P_Q_N.flatten().tolist() == scores
        assert batch.solved_P_Q_N.flatten().tolist() == [score >= success_at for score in scores]
