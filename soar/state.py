"""The state of a run between two of its steps, and its way into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from soar.config import Config
from soar.policy import AdapterStack
from soar.record import Checkpoint
from soar.teacher import LoopState
from soar.update import StackOptimizer

STAGES = ("loop", "arms", "evaluate", "done")
COUNTERS = ("step", "promotions", "window", "pq", "pass_rates", "student_rollouts", "teacher_rollouts")


@dataclass
class RunState:
    """What a checkpoint holds: the stage to do next, the loop's state, finished arms, seconds per phase."""

    stage: str
    loop: LoopState
    arms: dict[str, AdapterStack] = field(default_factory=dict)
    arm_rollouts: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def to_checkpoint(state: RunState) -> Checkpoint:
    """Stage, counters and every tensor of a run. Seeds are derived, so there is no random state to keep."""
    loop = state.loop
    tensors = {f"teacher/{k}": v for k, v in loop.teacher.tensors.items()}
    tensors |= {f"baseline/{k}": v for k, v in loop.baseline.tensors.items()}
    tensors |= {f"optimizer/{k}": v for k, v in loop.optimizer.state().items()}
    for arm, stack in state.arms.items():
        tensors |= {f"arm:{arm}/{k}": v for k, v in stack.tensors.items()}
    data = {name: getattr(loop, name) for name in COUNTERS}
    data |= {
        "kind": loop.baseline.kind,
        "scale": loop.baseline.scale,
        "arm_rollouts": state.arm_rollouts,
        "seconds": state.seconds,
    }
    return Checkpoint(state.stage, data, tensors)


def from_checkpoint(checkpoint: Checkpoint, device: torch.device, config: Config) -> RunState:
    """Inverse of `to_checkpoint`, tensors on `device`."""
    data = checkpoint.data

    def stack(prefix: str) -> AdapterStack:
        start = f"{prefix}/"
        named = {k.removeprefix(start): v.to(device) for k, v in checkpoint.tensors.items() if k.startswith(start)}
        return AdapterStack(data["kind"], named, data["scale"])

    teacher = stack("teacher")
    optimizer = StackOptimizer(teacher, config.teacher.optimizer)
    start = "optimizer/"
    optimizer.restore({k.removeprefix(start): v for k, v in checkpoint.tensors.items() if k.startswith(start)})
    loop = LoopState(teacher, optimizer, stack("baseline"), **{name: data[name] for name in COUNTERS})
    arms = {arm: stack(f"arm:{arm}") for arm in data["arm_rollouts"]}
    return RunState(checkpoint.stage, loop, arms, data["arm_rollouts"], data["seconds"])
