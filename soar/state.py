"""The state of a run between two of its steps, and its way into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from soar.arms import ArmProgress
from soar.checkpoints import Checkpoint
from soar.config import Config
from soar.files import finite
from soar.policy import AdapterStack
from soar.student import Midway
from soar.teacher import LoopState
from soar.update import StackOptimizer

STAGES = ("loop", "arms", "evaluate", "done")
COUNTERS = ("step", "promotions", "window", "pq", "pass_rates", "student_rollouts", "teacher_rollouts")


@dataclass
class Pending:
    """A promotion on hold. promotion: its event; rows: its questions; the rest is the baseline that a refusal restores."""

    promotion: dict[str, Any]
    rows: list[dict[str, Any]]
    baseline: AdapterStack
    pass_rates: dict[str, float | None]


@dataclass
class RunState:
    """What a checkpoint holds: the stage to do next, the loop's state, arms, a promotion on hold, seconds per phase.

    tokens: sampled since screening. arm_progress: arms in the middle of their training; all but one of them have steps
    that no event tells of yet, and such an arm is kept apart (`arms_ahead`), so that older checkpoints stay readable.
    """

    stage: str
    loop: LoopState
    arms: dict[str, AdapterStack] = field(default_factory=dict)
    arm_rollouts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    arm_progress: dict[str, ArmProgress] = field(default_factory=dict)
    pending: Pending | None = None
    tokens: int = 0


def adapters_of(state: RunState) -> dict[str, AdapterStack]:
    """Teacher, promoted student and trained arms, by their folders in the run folder."""
    arms = {f"arms/{name}": stack for name, stack in state.arms.items()}
    return {"teacher": state.loop.teacher, "student": state.loop.baseline, **arms}


def to_checkpoint(state: RunState) -> Checkpoint:
    """Stage, counters and every tensor of a run. Seeds are derived, so there is no random state to keep."""
    loop, pending = state.loop, state.pending
    tensors = _prefixed("teacher", loop.teacher.tensors)
    tensors |= _prefixed("baseline", loop.baseline.tensors)
    tensors |= _prefixed("optimizer", loop.optimizer.state())
    for arm, stack in state.arms.items():
        tensors |= _prefixed(f"arm:{arm}", stack.tensors)
    data: dict[str, Any] = {name: getattr(loop, name) for name in COUNTERS}
    data |= {
        "kind": loop.baseline.kind,
        "scale": loop.baseline.scale,
        "arm_rollouts": state.arm_rollouts,
        "seconds": state.seconds,
        "tokens": state.tokens,
        "arm_progress": None,
        "arms_ahead": [],
        "pending": None,
    }
    for arm, progress in state.arm_progress.items():
        prefix, midway = f"midway:{arm}" if progress.untold else "midway", progress.midway
        tensors |= _prefixed(prefix, midway.stack.tensors) | _prefixed(f"{prefix}_optimizer", midway.optimizer)
        known = {"arm": arm, "step": midway.step, "rollouts": midway.rollouts, "failed_P": midway.failed_P.tolist()}
        if progress.untold:
            data["arms_ahead"].append({**known, "untold": finite(progress.untold)})
        else:
            data["arm_progress"] = known
    if pending is not None:
        tensors |= _prefixed("held", pending.baseline.tensors)
        known = {"promotion": pending.promotion, "rows": pending.rows}
        data["pending"] = {**known, "pass_rates": pending.pass_rates}
    return Checkpoint(state.stage, data, tensors)


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def from_checkpoint(checkpoint: Checkpoint, device: torch.device, config: Config) -> RunState:
    """Inverse of `to_checkpoint`, tensors on `device`."""
    data = checkpoint.data

    def named(prefix: str) -> dict[str, Tensor]:
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in checkpoint.tensors.items() if k.startswith(start)}

    def stack(prefix: str) -> AdapterStack:
        return AdapterStack(data["kind"], {k: v.to(device) for k, v in named(prefix).items()}, data["scale"])

    teacher = stack("teacher")
    optimizer = StackOptimizer(teacher, config.teacher.optimizer)
    optimizer.restore(named("optimizer"))
    loop = LoopState(teacher, optimizer, stack("baseline"), **{name: data[name] for name in COUNTERS})
    arms = {arm: stack(f"arm:{arm}") for arm in data["arm_rollouts"]}
    state = RunState(checkpoint.stage, loop, arms, data["arm_rollouts"], data["seconds"], tokens=data["tokens"])
    first = [{**known, "untold": []}] if (known := data["arm_progress"]) is not None else []
    for known in [*first, *data.get("arms_ahead", [])]:
        arm, failed_P = known["arm"], torch.tensor(known["failed_P"])
        prefix = f"midway:{arm}" if known["untold"] else "midway"
        midway = Midway(known["step"], stack(prefix), named(f"{prefix}_optimizer"), failed_P, known["rollouts"], [])
        state.arm_progress[arm] = ArmProgress(arm, midway, known["untold"])
    if (held := data["pending"]) is not None:
        state.pending = Pending(held["promotion"], held["rows"], stack("held"), held["pass_rates"])
    return state
