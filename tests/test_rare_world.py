"""The world tiny-rare: its text, its shipped model, its recipe, and the script that says what its teachers ask."""

from __future__ import annotations

import random

from soar.config import load
from soar.domains.world import TEACHER_PROMPT, RareWorld, World, get_world
from soar.loop.write import teacher_prompt
from soar.problems.parse import parse_all
from soar.run.setup import open_env
from soar.types import Problem


def useful_share(world: World, count: int) -> float:
    """Of the teacher's part of the pretraining text."""
    rng = random.Random(3)
    texts = [world.pretraining_text(rng) for _ in range(count)]
    asked = [text.split(" <ans> ")[0].strip() for prompt, text in texts if prompt == TEACHER_PROMPT]
    return sum(map(world.useful, asked)) / len(asked)


def test_useful_questions_are_rare_in_its_text_and_it_is_the_same_task() -> None:
    rare, tiny = get_world("tiny-rare"), get_world("tiny")
    assert isinstance(rare, RareWorld)
    assert useful_share(rare, 4000) < 0.5 * useful_share(tiny, 4000)
    assert [p.question for p in rare.hard_problems(20, 5)] == [p.question for p in tiny.hard_problems(20, 5)]


def test_its_untrained_teacher_seldom_asks_a_useful_question() -> None:
    shares = {}
    for recipe in ("tiny-rare", "tiny"):
        config = load(recipe, ["threads=1", "model.device=cpu"])
        world = get_world(recipe)
        with open_env(config) as env:
            prompt = teacher_prompt(env, config)
            rollouts = env.sampler.sample(None, [[prompt]], 600, [[1]], config.teacher.sampling)
            cut = [not ended for ended in rollouts.ended_B.tolist()]
            texts = rollouts.texts(env.backbone)
            pairs = parse_all(texts, env.fmt, env.verifier, truncated=cut)
        useful = [p for p in pairs if isinstance(p, Problem) and world.useful(p.question)]
        shares[recipe] = len(useful) / len(pairs)
        assert sum(world.solve(p.question) == p.answer for p in useful) / len(useful) > 0.5
    assert 0.09 < shares["tiny-rare"] < 0.18 < 0.35 < shares["tiny"]
