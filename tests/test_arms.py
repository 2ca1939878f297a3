"""The arms after the loop: their budget, what they train on, and how they report."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import random_stack
from loop_helpers import easy_problems, hard_problems, skills, tiny_config

from soar.loop import arms
from soar.loop.arms import arm_events, arm_plan, arm_steps, train_arms
from soar.loop.parallel import no_tick
from soar.loop.population import train_chunk
from soar.loop.student import Plan, TrainState
from soar.run.setup import open_env
from soar.types import Problem


def test_budget_is_what_the_loop_spent_rounded_up() -> None:
    config = tiny_config("arms.steps=0", "student.prompts_per_step=2", "student.attempts=4")
    assert [arm_steps("hard_only", config, n) for n in (0, 1, 8, 9, 800)] == [1, 1, 1, 2, 100]
    assert arm_steps("hard_only", tiny_config("arms.steps=7"), 800) == 7


def test_what_the_arms_train_on() -> None:
    hard, pq = hard_problems(6), [Problem(f"pq-{i}", f"easier {i}", "0") for i in range(4)]

    def asked(name: str, steps: int, *keys: str) -> list[list[str]]:
        return [[p.id for p in batch] for batch in arm_plan(name, tiny_config(*keys), hard, pq, steps).batches]

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
    assert arm_steps("pq", wide, 0) == 1 + 1200 // (3 * wide.student.attempts)


def plan_of(name: str, steps: int = 3, tokens: int = 0) -> Plan:
    return Plan([[Problem(name, name, "0")]] * steps, 7, tokens=tokens)


def test_arms_of_one_step_train_together_until_one_is_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU. Nothing is trained here: every step takes 10 tokens."""
    calls: list[tuple[list[str], list[int]]] = []

    def train(env: Any, tick: Any, config: Any, lr: float, threads: int, due: Any, plans: Any, states: Any) -> Any:
        calls.append(([plan.batches[0][0].id for plan in plans], [state.step for state in states]))
        while True:
            tick()
            states = [replace(s, step=s.step + 1, tokens=s.tokens + 10, metrics=[{"kl": 0.5}]) for s in states]
            ends = [plan.finished(state) for plan, state in zip(plans, states, strict=True)]
            if due(states[0].step) or any(ends):
                return states

    monkeypatch.setattr(arms, "train_chunk", train)
    env: Any = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cuda"), config=tiny_config().model))
    plans = {"a": plan_of("a"), "b": plan_of("b", 9, tokens=11), "d": plan_of("d", 5)}
    states = dict.fromkeys("ab", TrainState(0, skills([0.0]))) | {"d": TrainState(1, skills([0.0]))}
    ticks: list[int] = []
    config = tiny_config("arms.save_steps=99", "evaluate.every=4")
    moved = list(train_arms(env, plans, states, config, 1, lambda: len(ticks) == 1, lambda: ticks.append(1)))
    # Asked to stop after the first step; b is out at 20 of 11 tokens; d is a step ahead until a and b have caught up, and is
    # saved after its fourth step.
    assert calls == [
        (["a", "b"], [0, 0]),
        (["a", "b", "d"], [1, 1, 1]),
        (["a", "d"], [2, 2]),
        (["d"], [3]),
        (["d"], [4]),
    ]
    last = {name: state.step for states in moved for name, state in states.items()}
    assert last == {"a": 3, "b": 2, "d": 5}
    assert len(ticks) == 1 + 1 + 1 + 1 + 1


def test_events_of_an_arm_go_on_where_it_was_left_and_a_diverged_one_is_an_alarm() -> None:
    state = TrainState(3, skills([0.5]), failed=True, metrics=[{"kl": 1.0}, {"kl": 2.0}])
    first, second, alarm = arm_events("first", plan_of("first"), state)
    assert first == {"event": "arm_step", "arm": "first", "step": 1, "kl": 1.0}
    assert (second["step"], alarm["kind"], alarm["arm"]) == (2, "arm failed", "first")
    assert len(arm_events("first", plan_of("first", steps=4), state)) == 2  # the alarm comes at the end


def test_arms_in_one_population_are_the_arms_trained_alone_and_each_has_its_own_method() -> None:
    """Hard-Only, groups over two prompts, hints and the dense reward side by side, saved and resumed in the middle."""
    config, problems = tiny_config("student.optimizer.lr=0.01"), easy_problems(2)
    two, twins = ([[problems[0], problems[i]]] * 3 for i in (1, 0))
    hints = {p.id: "add the two" for p in problems}
    plans = [Plan(two, 5), Plan(twins, 5, copies=2), Plan(two, 5, hints=hints), Plan(two, 5, likelihood=True)]
    with open_env(config) as env:
        fresh = [TrainState(0, random_stack(env.backbone, 1)) for _ in plans]

        def train(these: list[Plan], states: list[TrainState], until: int = 99) -> list[TrainState]:
            return train_chunk(env, no_tick, config.student, 0.01, 1, lambda step: step == until, these, states)

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
    assert hinted.metrics[0]["hint_share"] <= 1.0
    assert dense.metrics[0]["reward_mean"] > 0 and dense.metrics[0]["pass_rate"] == whole[0].metrics[0]["pass_rate"]
