"""The arms of a run after the outer loop: what is trained, on what, with which budget.

Hard-Only gets as many student rollouts as the whole outer loop spent on training and measuring students. PQ trains a fresh
base student on the promotion questions and the hard training half; its own rollouts are counted, and the search for the
questions is reported beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from soar import seeds
from soar.config import Config
from soar.policy import AdapterStack
from soar.rollout import Examiner
from soar.student import Population, shuffled_passes, train_population
from soar.types import Problem

TRAINED = ("hard_only", "pq")


def budget_steps(config: Config, loop_rollouts: int) -> int:
    """RLOO steps of Hard-Only: arms.steps, or enough to spend the outer loop's student rollouts (rounded up)."""
    per_step = config.student.prompts_per_step * config.student.attempts
    return config.arms.steps or max(1, math.ceil(loop_rollouts / per_step))


def arm_batches(
    name: str, config: Config, hard_train: list[Problem], pq: list[Problem], steps: int
) -> list[list[Problem]]:
    """Training batches [steps][prompts_per_step] of an arm."""
    seed, per_step = seeds.derive(config.seed, "arm", name), config.student.prompts_per_step
    if name == "hard_only":
        return shuffled_passes(hard_train, seed, steps, per_step)
    if name != "pq":
        raise ValueError(f"arm {name!r} is not trained")
    if config.arms.pq_mode == "mixed":
        return shuffled_passes([*pq, *hard_train], seed, steps, per_step)
    first = min(steps, config.arms.curriculum_steps)
    rest = shuffled_passes(hard_train, seed + 1, steps - first, per_step) if steps > first else []
    return shuffled_passes(pq, seed, first, per_step) + rest


def train_arms(
    examiner: Examiner,
    fresh: AdapterStack,
    batches: dict[str, list[list[Problem]]],
    config: Config,
    workers: int,
    on_step: Callable[[str], None],
    on_done: Callable[[str, Population, list[dict[str, Any]]], None],
) -> dict[str, Population]:
    """Train every named arm from the fresh adapter, one after another; sampling is shared out among `workers` threads.

    on_step(arm) after each step; on_done(arm, population, events) once per arm, in the order of `batches`: one arm_step
    event a step, and an alarm when the student diverged.
    """
    lr = config.arms.learning_rate or config.student.optimizer.lr

    done: dict[str, Population] = {}
    for name, arm_batches_S in batches.items():
        seed = seeds.derive(config.seed, "arm", name, "student")

        def note(step: int, metrics: dict[str, float], arm: str = name) -> None:
            on_step(arm)

        population = train_population(examiner, fresh, [arm_batches_S], [seed], config.student, lr, workers, note)
        events = [
            {"event": "arm_step", "arm": name, "step": step, **metrics}
            for step, metrics in enumerate(population.metrics)
        ]
        if population.failed_P.any():
            message = f"the student of the arm {name} produced NaN or inf in training; its result says nothing"
            events.append({"event": "alarm", "step": None, "kind": "arm failed", "arm": name, "message": message})
        done[name] = population
        on_done(name, population, events)
    return done
