"""What the teacher is asked and what becomes of its texts; the teacher never meets a hard problem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from loop_helpers import easy_problems, rollouts_of, teacher_text, tiny_config

from soar.config import Config, ConfigError
from soar.domains.world import ANSWER_MARK, get_world
from soar.engine.policy import Backbone
from soar.engine.rollouts import Rollouts
from soar.loop import teacher
from soar.loop.rollout import RolloutEnv
from soar.loop.teacher import OuterLoop, new_state
from soar.loop.write import TeacherError
from soar.run.setup import open_env
from soar.types import Problem


@pytest.fixture(scope="module")
def env() -> Iterator[RolloutEnv]:
    torch.set_num_threads(1)
    with open_env(tiny_config()) as found:
        yield found


class ScriptedSampler:
    """Says the given texts, round and round; `calls` holds (seed, number of rollouts) of every call."""

    def __init__(self, backbone: Backbone, texts: Sequence[str]) -> None:
        self.backbone, self.texts = backbone, list(texts)
        self.calls: list[tuple[int, int]] = []
        self.said = 0

    def sample(
        self, stack: Any, prompts_P_Q: Any, attempts: int, seed_P_Q: Any, sampling: Any, greedy: bool = False
    ) -> Rollouts:
        self.calls.append((seed_P_Q[0][0], attempts))
        texts = [self.texts[(self.said + i) % len(self.texts)] for i in range(attempts)]
        self.said += attempts
        return rollouts_of(self.backbone, texts, prompts_P_Q[0][0])


def writer(env: RolloutEnv, texts: Sequence[str], config: Config) -> tuple[OuterLoop, ScriptedSampler]:
    sampler = ScriptedSampler(env.backbone, texts)
    scripted = RolloutEnv(env.backbone, sampler, env.fmt, env.verifier, env.scheme)
    return OuterLoop(scripted, easy_problems(4, seed=9), config, new_state(scripted, config)), sampler


def test_pairs_fill_the_datasets_in_order_and_keep_their_rollouts(env: RolloutEnv) -> None:
    problems = easy_problems(12)
    bad = f"no mark here {ANSWER_MARK}"
    texts = [text for problem in problems for text in (bad, teacher_text(problem))]
    loop, _ = writer(env, texts, tiny_config())
    question_sets = loop.write()
    asked = [[(p.question, p.answer) for p in problems[k * 4 : k * 4 + 4]] for k in range(3)]
    assert [[(p.question, p.answer) for p in row] for row in question_sets.problems_G_Q] == asked
    said = question_sets.rollouts.texts(env.backbone)
    assert ["".join(text.split()) for text in said] == ["".join(teacher_text(p).split()) for p in problems]
    assert question_sets.sampled == 24
    assert question_sets.rejected == {"empty": 12}
    assert loop.state.teacher_rollouts == 24


def test_teacher_error_names_reasons_and_last_outputs(env: RolloutEnv) -> None:
    texts = [f"output {i % 10} \x1b[2J" for i in range(7)]
    loop, sampler = writer(env, texts, tiny_config("teacher.max_tries=3"))
    with pytest.raises(TeacherError) as caught:
        loop.write()
    message = str(caught.value)
    assert "wrote 0 acceptable pairs of 12 in 36 samples (rejected: no_answer 36)" in message
    assert sampler.said == 36
    shown = message.partition("Its last outputs:\n")[2].split("\n")[:5]
    assert all(line.startswith("  '") for line in shown)
    assert len({*shown}) == 5
    assert "\x1b" not in message
    assert "problems.format" in message


def test_a_question_without_room_for_an_answer_is_too_long(env: RolloutEnv) -> None:
    short = easy_problems(1)[0]
    room = env.backbone.context - len(env.prompt(short))

    def loop(tokens: int) -> OuterLoop:
        config = tiny_config(f"student.sampling.max_tokens={tokens}", "teacher.max_tries=1")
        return writer(env, [teacher_text(short)], config)[0]

    assert len(loop(room).write().problems_G_Q) == 3
    with pytest.raises(TeacherError, match="too_long 12"):
        loop(room + 1).write()


def test_a_teacher_prompt_without_room_is_refused_before_anything_runs(env: RolloutEnv) -> None:
    config = tiny_config(f"teacher.sampling.max_tokens={env.backbone.context}")
    with pytest.raises(
        ConfigError, match=r"teacher\.sampling\.max_tokens = \d+: with the teacher prompt of \d+ tokens"
    ):
        writer(env, ["x"], config)


class Recorder:
    """A sampler that notes, for every call, whether the teacher's own stack was used, and the prompts."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.teacher = inner, None
        self.calls: list[tuple[bool, list[list[int]]]] = []

    def sample(self, stack: Any, prompts_P_Q: Any, *rest: Any, **more: Any) -> Rollouts:
        self.calls.append((stack is self.teacher, [ids for prompts in prompts_P_Q for ids in prompts]))
        return self.inner.sample(stack, prompts_P_Q, *rest, **more)


def found_in(prompts: Sequence[Sequence[int]], problems: Sequence[Problem], backbone: Backbone) -> set[str]:
    """Ids of the problems whose question stands in one of the decoded prompts, whatever the spacing."""
    texts = ["".join(text.split()) for text in backbone.tokenizer.batch_decode([list(ids) for ids in set(prompts)])]
    return {p.id for p in problems if any("".join(p.question.split()) in text for text in texts)}


@pytest.mark.parametrize("leak", [False, True])
def test_the_teacher_never_receives_a_hard_problem_and_a_leak_would_be_found(
    env: RolloutEnv, monkeypatch: pytest.MonkeyPatch, leak: bool
) -> None:
    """Two real outer steps: the teacher's prompts and training rows, and the students' prompts."""
    config, backbone = tiny_config(), env.backbone
    hard = get_world("tiny").hard_problems(12, 0)
    recorder = Recorder(env.sampler)
    watched = RolloutEnv(backbone, recorder, env.fmt, env.verifier, env.scheme)
    loop = OuterLoop(watched, hard, config, new_state(watched, config))
    recorder.teacher = loop.state.teacher
    trained: list[tuple[int, ...]] = []
    real = teacher.update

    def spy(backbone: Any, stack: Any, optimizer: Any, rollouts: Rollouts, *rest: Any) -> Any:
        assert stack is loop.state.teacher
        trained.extend(rollouts.prompts)
        return real(backbone, stack, optimizer, rollouts, *rest)

    monkeypatch.setattr(teacher, "update", spy)
    if leak:
        loop.prompt = [*backbone.tokenizer.encode(hard[3].question, add_special_tokens=False), *loop.prompt]
    for _ in range(2):
        loop.step()
    asked, others = ([tuple(ids) for own, ps in recorder.calls if own is of for ids in ps] for of in (True, False))
    assert asked
    assert len(trained) == 24
    leaked = {hard[3].id} if leak else set()
    assert found_in(asked, hard, backbone) == found_in(trained, hard, backbone) == leaked
    assert len(found_in(others, hard, backbone)) >= 4  # the reward questions are found where they belong
    assert loop.state.promotions == 2
