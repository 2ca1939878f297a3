"""The arms of a run after the outer loop: what is trained, on what, with which budget.

Hard-Only gets as many student rollouts as the whole outer loop spent on training and measuring students. Every other arm
trains a fresh base student on its questions (`training_sets`) and the hard training half; its own rollouts are counted,
and the search for the questions is reported beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from soar import seeds
from soar.config import Config, TrainedArm
from soar.policy import AdapterStack
from soar.rollout import Examiner
from soar.student import Population, shuffled_passes, train_population
from soar.types import Problem

TRAINED: tuple[str, ...] = get_args(TrainedArm)


def arm_steps(name: str, config: Config, loop_rollouts: int) -> int:
    """RLOO steps of an arm: those of Hard-Only, or arms.pq_steps where it has questions."""
    own = 0 if name == "hard_only" else config.arms.pq_steps
    return own or budget_steps(config, loop_rollouts)


def arm_learning_rate(name: str, config: Config) -> float:
    """arms.learning_rates of the arm, else arms.learning_rate, else the student's."""
    return config.arms.learning_rates.get(name) or config.arms.learning_rate or config.student.optimizer.lr  # type: ignore[call-overload]


def budget_steps(config: Config, loop_rollouts: int) -> int:
    """RLOO steps of Hard-Only: arms.steps, or enough to spend the outer loop's student rollouts (rounded up)."""
    per_step = config.student.prompts_per_step * config.student.attempts
    return config.arms.steps or max(1, math.ceil(loop_rollouts / per_step))


def arm_batches(
    name: str, config: Config, hard_train: list[Problem], questions: list[Problem], steps: int
) -> list[list[Problem]]:
    """Training batches [steps][prompts_per_step] of an arm.

    Mixed: passes over questions and hard problems together. Curriculum: arms.curriculum_steps of questions only, then
    hard problems only. The arms pq_mixed and pq_curriculum say it in their name, for the others arms.pq_mode decides.
    """
    seed, per_step = seeds.derive(config.seed, "arm", name), config.student.prompts_per_step
    if name == "hard_only":
        return shuffled_passes(hard_train, seed, steps, per_step)
    if name not in TRAINED:
        raise ValueError(f"arm {name!r} is not trained")
    mode = {"pq_mixed": "mixed", "pq_curriculum": "curriculum"}.get(name, config.arms.pq_mode)
    if mode == "mixed":
        return shuffled_passes([*questions, *hard_train], seed, steps, per_step)
    first = min(steps, config.arms.curriculum_steps)
    rest = shuffled_passes(hard_train, seed + 1, steps - first, per_step) if steps > first else []
    return shuffled_passes(questions, seed, first, per_step) + rest


def left_out(name: str, message: str) -> dict[str, Any]:
    """The alarm that an arm of arms.run could not be trained, and why."""
    return {"event": "alarm", "step": None, "kind": "arm left out", "arm": name, "message": message}


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
    done: dict[str, Population] = {}
    for name, arm_batches_S in batches.items():
        seed = seeds.derive(config.seed, "arm", name, "student")

        def note(step: int, metrics: dict[str, float], arm: str = name) -> None:
            on_step(arm)

        lr = arm_learning_rate(name, config)
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
