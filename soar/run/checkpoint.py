"""Checkpoints in a folder of their own: numbered folders, a pointer to the newest, the one before kept.

A checkpoint is written into a temporary folder, every file is on disk before the folder gets its name, and only then
does the pointer move; so a crash at any moment leaves a whole one in force. Checksums are verified on loading, and the
one before is used when the newest is damaged. JSON and safetensors only; nothing is pickled.

The state of a run between two of its steps, and its way into a checkpoint and back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soar.files import finite, sha256_of, sync_file, sync_folder, tensor_errors, write_json
from soar.types import UserError

if TYPE_CHECKING:  # `soar review` and `soar run --dry-run` read run folders without torch
    import torch
    from torch import Tensor

    from soar.config import Config
    from soar.engine.policy import AdapterStack
    from soar.loop.arms import ArmProgress
    from soar.loop.teacher import LoopState

SCHEMA = 3
POINTER, CHECKSUMS, STATE, TENSORS = "latest.json", "checksums.json", "state.json", "tensors.safetensors"


class CheckpointError(UserError):
    """No checkpoint of a run can be used; nothing in the folder was changed."""


@dataclass
class Checkpoint:
    """stage: what was going on. data: JSON-ready state. tensors: named arrays. sizes: bytes of each JSONL file then.

    digests: sha256 of those bytes.
    """

    stage: str
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    sizes: dict[str, int] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


def check_schema(schema: object, where: Path) -> None:
    """Raises CheckpointError for a document that another version wrote."""
    if schema == SCHEMA and type(schema) is int:
        return
    written = "written by soar 0.1" if schema in (1, 2, None) else f"of schema {schema!r}, this version reads {SCHEMA}"
    raise CheckpointError(f"{where} is {written}; resume with that version")


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError when there is none, OSError when it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it from a copy, or start a new run") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is damaged: it holds {type(value).__name__}, expected an object; restore it from a copy, or start a "
            "new run"
        )
    return value


def save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' own; the import waits until there is something to save."""
    from safetensors.torch import save_file

    save_file(tensors, path)


class CheckpointStore:
    """The checkpoints under one folder, written by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_force: int | None = None  # the newest that was written or loaded whole

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and point at it; the one in force before is kept, others go. Raises OSError."""
        number = max([*self.numbers(), -1]) + 1
        temporary, final = self.folder / f"{number:06d}.tmp", self._path(number)
        for old in (temporary, final):
            shutil.rmtree(old, ignore_errors=True)
            if old.is_symlink() or old.is_file():
                old.unlink()
        temporary.mkdir(parents=True)
        try:
            self._write(temporary, checkpoint)
            digests = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / CHECKSUMS, digests)
            sync_folder(temporary)
            os.replace(temporary, final)
            sync_folder(self.folder)
            write_json(self.folder / POINTER, {"number": number, "sha256": digests})
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk every byte counts
            raise
        before, self._in_force = self._in_force, number
        keep = {self._path(number).name} | ({self._path(before).name} if before is not None else set())
        for old in self.folder.iterdir():  # only what a store made: six digits, finished or not
            if old.is_dir() and old.name not in keep and re.fullmatch(r"\d{6,}(\.tmp)?", old.name):
                shutil.rmtree(old, ignore_errors=True)

    def _write(self, folder: Path, checkpoint: Checkpoint) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        with tensor_errors(folder / TENSORS):
            save_file(tensors, folder / TENSORS)
        sync_file(folder / TENSORS)
        document = {"schema": SCHEMA, "stage": checkpoint.stage, "sizes": checkpoint.sizes}
        write_json(folder / STATE, {**document, "digests": checkpoint.digests, "data": checkpoint.data})

    def numbers(self) -> list[int]:
        """Numbers of the checkpoint folders, the newest first."""
        if not self.folder.is_dir():
            return []
        found = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted((int(name) for name in found if name.isdecimal()), reverse=True)

    def load(self, usable: Callable[[Checkpoint], None], say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None when none was ever in force.

        usable(checkpoint) raises a UserError when the files beside it do not fit. Every one that is passed over is named
        through `say`. Raises CheckpointError when there were some and none is left; a checkpoint of another schema is
        not damage, so it is refused at once.
        """
        damage: list[str] = []
        # The pointer is written last: when the first checkpoint was cut short there is none, and nothing was in force.
        first = not (self.folder / POINTER).is_file() and self.numbers() in ([], [0])
        for number, checksums in self._in_order(damage):
            try:
                checkpoint = self._read(number, checksums)
                usable(checkpoint)
            except _Damaged as error:
                damage.append(str(error))
                continue
            for line in damage if not first else []:
                say(f"{line}. Going on from the checkpoint before, {self._path(number)}")
            self._in_force = number
            return checkpoint
        if damage and not first:
            raise CheckpointError(
                f"{damage[0]}. No other checkpoint is left; restore the file from a copy, or start a new run"
            )
        return None

    def _in_order(self, damage: list[str]) -> Iterator[tuple[int, dict[str, str] | None]]:
        """(number, its checksums, None where they are in its own folder), the one in force first."""
        pointer = self.folder / POINTER
        newest: int | None = None
        if not pointer.is_file():
            damage.append(f"{pointer} is missing")
            yield from ((number, None) for number in self.numbers())
            return
        try:
            latest = read_document(pointer)
            newest = int(latest["number"])
            yield newest, dict(latest["sha256"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            words = (
                str(error).split(";")[0] if isinstance(error, CheckpointError) else f"{pointer} is damaged: {error!r}"
            )
            damage.append(words)
        for number in self.numbers():
            if newest is None or number < newest:
                yield number, None

    def _read(self, number: int, checksums: dict[str, str] | None) -> Checkpoint:
        from safetensors.torch import load_file

        folder = self._path(number)
        try:
            known = checksums if checksums is not None else read_document(folder / CHECKSUMS)
        except OSError as error:
            raise _Damaged(f"{folder / CHECKSUMS} is damaged: {error.strerror}") from error
        except CheckpointError as error:
            raise _Damaged(str(error).split(";")[0]) from error
        if missing := sorted({STATE, TENSORS} - known.keys()):
            raise _Damaged(f"{folder} is damaged: no checksum of {missing[0]} is recorded")
        for name, digest in known.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != digest:
                raise _Damaged(f"{folder / name} is damaged: its checksum is not the recorded one")
        state = read_document(folder / STATE)
        check_schema(state.get("schema"), folder / STATE)
        return Checkpoint(state["stage"], state["data"], load_file(folder / TENSORS), state["sizes"], state["digests"])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"


class _Damaged(CheckpointError):
    """One checkpoint that is not whole; the one before may be."""


def lost_lines(path: Path, found: int, wanted: int) -> CheckpointError:
    """The damage that a JSONL file shorter than at the checkpoint is."""
    return _Damaged(f"{path} has {found} bytes, but had {wanted} at the checkpoint: lines are lost")


def changed_lines(path: Path) -> CheckpointError:
    """The damage that a JSONL file with other content than at the checkpoint is."""
    return _Damaged(f"{path} was changed: its lines up to the checkpoint have another checksum than the recorded one")


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

    tokens: sampled since screening. arm_progress: arms in the middle of their training.
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
        "arm_progress": [],
        "pending": None,
    }
    for arm, progress in state.arm_progress.items():
        training = progress.train_state
        tensors |= _prefixed(f"train_state:{arm}", training.stack.tensors)
        tensors |= _prefixed(f"train_state:{arm}_optimizer", training.optimizer)
        data["arm_progress"].append(
            {
                "arm": arm,
                "step": training.step,
                "rollouts": training.rollouts,
                "failed_P": training.failed_P.tolist(),
                "untold": finite(progress.untold),
            }
        )
    if pending is not None:
        tensors |= _prefixed("held", pending.baseline.tensors)
        data["pending"] = {
            "promotion": pending.promotion,
            "rows": pending.rows,
            "pass_rates": pending.pass_rates,
        }
    return Checkpoint(state.stage, data, tensors)


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def from_checkpoint(checkpoint: Checkpoint, device: torch.device, config: Config) -> RunState:
    """Inverse of `to_checkpoint`, tensors on `device`."""
    import torch

    from soar.engine.policy import AdapterStack
    from soar.engine.update import StackOptimizer
    from soar.loop.arms import ArmProgress
    from soar.loop.student import TrainState
    from soar.loop.teacher import LoopState

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
    for row in data["arm_progress"]:
        arm, failed_P = row["arm"], torch.tensor(row["failed_P"])
        training = TrainState(
            row["step"],
            stack(f"train_state:{arm}"),
            named(f"train_state:{arm}_optimizer"),
            failed_P,
            row["rollouts"],
            [],
        )
        state.arm_progress[arm] = ArmProgress(arm, training, row["untold"])
    if (held := data["pending"]) is not None:
        state.pending = Pending(held["promotion"], held["rows"], stack("held"), held["pass_rates"])
    return state
