"""The arms of a run after the outer loop: what is trained, on what, with which budget.

Hard-Only gets as many student rollouts as the whole outer loop spent on training and measuring students. Every other arm
trains a fresh base student on its questions (`training_sets`) and the hard training half; its own rollouts are counted,
and the search for the questions is reported beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from soar import seeds
from soar.config import Config
from soar.policy import AdapterStack
from soar.rollout import Examiner
from soar.settings import TrainedArm
from soar.student import Metrics, Midway, Population, shuffled_passes, train_population
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


@dataclass(frozen=True)
class ArmProgress:
    """An arm in the middle of its training."""

    arm: str
    midway: Midway


@dataclass(frozen=True)
class Listener:
    """Who hears of the arms' training.

    on_step(arm): after each step. on_midway(progress, events): after a step whose number of steps done is `due`, with
    the arm_step events since the last call. on_done(arm, population, events): once per arm, with the events that are left.
    """

    on_step: Callable[[str], None]
    on_midway: Callable[[ArmProgress, list[dict[str, Any]]], None]
    on_done: Callable[[str, Population, list[dict[str, Any]]], None]
    due: Callable[[int], bool]


def train_arms(
    examiner: Examiner,
    fresh: AdapterStack,
    batches: dict[str, list[list[Problem]]],
    config: Config,
    workers: int,
    listener: Listener,
    begun: ArmProgress | None = None,
) -> dict[str, Population]:
    """Train every named arm from the fresh adapter, one after another; sampling is shared out among `workers` threads.

    Arms are reported in the order of `batches`: one arm_step event a step, and an alarm when the student diverged.
    begun: the arm that an earlier process left in the middle.
    """
    done: dict[str, Population] = {}
    for name, arm_batches_S in batches.items():
        seed = seeds.derive(config.seed, "arm", name, "student")
        midway = begun.midway if begun is not None and begun.arm == name else None
        log = _ArmLog(name, midway.step if midway else 0, listener)
        population = train_population(
            examiner,
            fresh,
            [arm_batches_S],
            [seed],
            config.student,
            arm_learning_rate(name, config),
            workers,
            log.note,
            midway,
            log.keep,
            listener.due,
        )
        events = log.events(population.metrics)
        if population.failed_P.any():
            message = f"the student of the arm {name} produced NaN or inf in training; its result says nothing"
            events.append({"event": "alarm", "step": None, "kind": "arm failed", "arm": name, "message": message})
        done[name] = population
        listener.on_done(name, population, events)
    return done


class _ArmLog:
    """The events of one arm. told: steps whose events were handed on; first: the step that its metrics begin with."""

    def __init__(self, arm: str, first: int, listener: Listener) -> None:
        self.arm, self.first, self.told, self.listener = arm, first, first, listener

    def note(self, step: int, metrics: Metrics) -> None:
        self.listener.on_step(self.arm)

    def keep(self, midway: Midway) -> None:
        self.listener.on_midway(ArmProgress(self.arm, midway), self.events(midway.metrics))

    def events(self, metrics: list[Metrics]) -> list[dict[str, Any]]:
        """The events that nobody has got yet, of all metrics so far."""
        new = list(enumerate(metrics, start=self.first))[self.told - self.first :]
        self.told = self.first + len(metrics)
        return [{"event": "arm_step", "arm": self.arm, "step": step, **row} for step, row in new]
