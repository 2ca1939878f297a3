"""The arms after the loop: their budget, what they train on, and how they report."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import hard_problems, run_tiny, skills, tiny_config
from safetensors.torch import load_file

from soar.loop import arms
from soar.loop.arms import ArmProgress, Listener, arm_batches, arms_left, budget_steps, train_arms
from soar.loop.student import Population, TrainState
from soar.types import Problem


def test_budget_is_what_the_loop_spent_rounded_up() -> None:
    config = tiny_config("arms.steps=0", "student.prompts_per_step=2", "student.attempts=4")
    assert [budget_steps(config, n) for n in (0, 1, 8, 9, 800)] == [1, 1, 1, 2, 100]
    assert budget_steps(tiny_config("arms.steps=7"), 800) == 7


def asked(batches: list[list[Problem]]) -> list[str]:
    return [problem.id for batch in batches for problem in batch]


def test_what_the_arms_train_on() -> None:
    config, hard = tiny_config(), hard_problems(6)
    pq = [Problem(f"pq-{i}", f"easier {i}", "0") for i in range(4)]
    only = arm_batches("hard_only", config, hard, pq, 9)
    assert [len(batch) for batch in only] == [2] * 9
    assert Counter(asked(only)) == {p.id: 3 for p in hard}  # three whole passes
    going_on = arm_batches("ps_hard", config, hard, [], 9)
    assert Counter(asked(going_on)) == Counter(asked(only)) and going_on != only
    mixed = arm_batches("pq", config, hard, pq, 10)
    assert Counter(asked(mixed)) == {p.id: 2 for p in [*hard, *pq]}
    config = tiny_config("arms.pq_mode=curriculum", "arms.curriculum_steps=4")
    curriculum = arm_batches("pq", config, hard, pq, 10)
    assert Counter(asked(curriculum[:4])) == {p.id: 2 for p in pq}
    assert Counter(asked(curriculum[4:])) == {p.id: 2 for p in hard}
    short = arm_batches("pq", config, hard, pq, 2)
    assert set(asked(short)) == {p.id for p in pq}
    assert arm_batches("hard_only", tiny_config("seed=1"), hard, pq, 9) != only
    with pytest.raises(ValueError, match="arm 'ps' is not trained"):
        arm_batches("ps", config, hard, pq, 2)


def test_arms_report_in_order_and_a_diverged_one_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, tuple[float, list[int], int]] = {}

    def train(
        env: Any,
        fresh: Any,
        batches: Any,
        seeds: list[int],
        config: Any,
        lr: float,
        workers: int,
        on_step: Any,
        begun: TrainState | None,
        on_state: Any,
        due: Any,
    ) -> Population:
        assert due(10)
        name = batches[0][0][0].id
        given[name] = (lr, seeds, workers)
        on_step()
        first = begun.step if begun else 0
        metrics = [{"kl": 0.5}] if begun is None else []
        for step in range(first + len(metrics), 3):
            metrics.append({"kl": float(step)})
            on_state(TrainState(step + 1, skills([0.5]), {}, torch.tensor([False]), 8, list(metrics)))
        return Population(skills([1.0]), torch.tensor([name == "second"]), [*metrics, {"kl": 9.0}], 8)

    monkeypatch.setattr(arms, "train_population", train)
    batches = {name: [[Problem(name, name, "0")]] for name in ("first", "second")}
    parts: list[tuple[str, int, int]] = []
    steps: list[str] = []
    told: list[tuple[str, list[dict[str, Any]]]] = []
    config = tiny_config("arms.learning_rate=0.25")
    listener = Listener(
        lambda: steps.append("step"),
        lambda begun, rows: parts.extend((arm, found.train_state.step, len(rows)) for arm, found in begun.items()),
        lambda name, population, rows: told.append((name, rows)),
        lambda step: step == 10,
    )
    found = train_arms(None, dict.fromkeys(batches, skills([0.0])), batches, config, 2, listener)  # type: ignore[arg-type]
    assert list(found) == [name for name, _ in told] == ["first", "second"]
    assert steps == ["step", "step"]
    assert parts == [("first", 2, 2), ("first", 3, 1), ("second", 2, 2), ("second", 3, 1)]
    assert told[0][1] == [{"event": "arm_step", "arm": "first", "step": 3, "kl": 9.0}]
    alarm = told[1][1][1]
    assert (alarm["event"], alarm["kind"], alarm["arm"]) == ("alarm", "arm failed", "second")
    assert given["first"][0] == 0.25
    assert given["first"][1] != given["second"][1]
    assert given["first"][2] == 2


def test_an_arm_goes_on_where_it_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, TrainState | None] = {}

    def train(*args: Any) -> Population:
        asked[args[2][0][0][0].id] = args[8]
        return Population(skills([1.0]), torch.tensor([False]), [{"kl": 1.0}, {"kl": 2.0}], 8)

    monkeypatch.setattr(arms, "train_population", train)
    told: list[dict[str, Any]] = []
    listener = Listener(lambda: None, lambda *args: None, lambda name, found, rows: told.extend(rows), bool)
    begun = {"first": ArmProgress("first", TrainState(5, skills([0.5]), {}, torch.tensor([False]), 40, []))}
    batches = {name: [[Problem(name, name, "0")]] for name in ("first", "second")}
    train_arms(None, dict.fromkeys(batches, skills([0.0])), batches, tiny_config(), 1, listener, begun)  # type: ignore[arg-type]
    assert asked == {"first": begun["first"].train_state, "second": None}
    assert [(row["arm"], row["step"]) for row in told] == [("first", 5), ("first", 6), ("second", 0), ("second", 1)]


def test_without_a_promotion_nothing_goes_on_from_its_student() -> None:
    config, said = tiny_config('arms.run=["ps", "ps_hard", "hard_only", "pq"]'), list[str]()
    assert arms_left(config, {"pq"}, 1, said.append) == ["hard_only", "ps_hard"] and not said
    assert arms_left(config, set(), 0, said.append) == ["hard_only", "pq"]
    assert said == ["no promotion, so there is no promoted student: the arm ps_hard is left out"]
    assert arms_left(config, {"ps_hard"}, 0, said.append) == ["hard_only", "pq"] and len(said) == 1


def test_the_promoted_student_goes_on_with_the_hard_problems(tmp_path: Path) -> None:
    """With a rate of nearly nothing an arm stays where it starts."""
    run = tmp_path / "run"
    keys = ['arms.run=["base", "ps", "ps_hard", "hard_only"]', "arms.steps=2", "arms.learning_rates.ps_hard=1e-12"]
    summary = run_tiny(run, *keys, "arms.learning_rates.hard_only=1e-12")
    assert summary["promotions"] > 0
    promoted, going_on, alone = (
        load_file(run / folder / "adapter_model.safetensors")
        for folder in ("student", "arms/ps_hard", "arms/hard_only")
    )
    away = max((promoted[key] - alone[key]).abs().max().item() for key in promoted)
    assert away > 1e-6
    assert max((promoted[key] - going_on[key]).abs().max().item() for key in promoted) < away / 100
    arm = summary["arms"]["ps_hard"]
    assert arm["search_rollouts"] == summary["arms"]["ps"]["student_rollouts"]
    assert arm["student_rollouts"] == summary["arms"]["hard_only"]["student_rollouts"]
    assert "ps_hard - hard_only" in summary["paired"]
