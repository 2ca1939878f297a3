"""Checkpoints in a folder of their own, the last two kept.

Every file is on disk before the temporary folder gets its number, and that rename puts the checkpoint in force; so a crash
at any moment leaves a whole one. Checksums are verified; the one before is used if the newest is damaged. Nothing pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from soar.files import Row, read_object, sha256_of, sync, write_atomic, write_json
from soar.types import UserError

if TYPE_CHECKING:  # `soar review` and `soar run --dry-run` read run folders without torch
    from torch import Tensor

CHECKSUMS, STATE, TENSORS = "checksums.json", "state.json", "tensors.safetensors"
FROM_COPY, OLD_SOAR = "from a copy, or start a new run", "resume with the version that began the run"


class RunFolderError(UserError):
    """A run or study folder that cannot be used as asked; nothing in it was changed."""


class Damaged(RunFolderError):
    """One checkpoint that is not whole, or counts on files that are not; the one before may be."""


@dataclass
class Checkpoint:
    """stage: what was going on. data: JSON-ready state. tensors: named arrays. beside: what the files beside it were."""

    stage: str
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)


def read_document(path: Path) -> Row:
    """The JSON object in a file. Raises RunFolderError when there is none."""
    value, notes = read_object(path)
    if notes:
        raise RunFolderError(f"{path.parent}/{notes[0]}; restore it {FROM_COPY}")
    return value


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace a file by safetensors on the CPU."""
    from safetensors.torch import save

    write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"format": "pt"}))


class CheckpointStore:
    """The checkpoints under one folder, written by one process at a time. Only folders of six digits are its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_force: Path | None = None  # the newest that was written or loaded whole

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the one in force before is kept, others go. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        numbers = [int(path.name) for path in self.folder.iterdir() if re.fullmatch("[0-9]{6,}", path.name)]
        final = self.folder / f"{max(numbers, default=-1) + 1:06d}"
        temporary = final.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed process was writing
        temporary.mkdir()
        try:
            write_tensors(temporary / TENSORS, checkpoint.tensors)
            state = {"stage": checkpoint.stage, "beside": checkpoint.beside, "data": checkpoint.data}
            write_json(temporary / STATE, state)
            write_json(temporary / CHECKSUMS, {name: sha256_of(temporary / name) for name in (STATE, TENSORS)})
            os.replace(temporary, final)
            sync(self.folder)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)  # on a full disk every byte counts
            raise
        keep, self._in_force = (final, self._in_force), final
        for old in self.folder.iterdir():
            if re.fullmatch(r"[0-9]{6,}(\.tmp)?", old.name) and old not in keep and old.is_dir():
                shutil.rmtree(old, ignore_errors=True)

    def load(self, fits: Callable[[Checkpoint], None], say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None when there is none. fits(checkpoint) raises Damaged when the files
        beside it are not those it counts on. say: told of each that is not whole. Raises RunFolderError when none is.
        """
        damage: list[str] = []
        folders = [path for path in self.folder.glob("*") if re.fullmatch(r"[0-9]{6,}", path.name) and path.is_dir()]
        for folder in sorted(folders, key=lambda path: int(path.name), reverse=True):
            try:
                fits(checkpoint := _read(folder))
            except (Damaged, SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
                damage.append(str(error) if isinstance(error, Damaged) else f"{folder} is damaged: {error!r:.200}")
                continue
            for line in damage:
                say(f"{line}. Going on from the checkpoint before, {folder}")
            self._in_force = folder
            return checkpoint
        if not damage:
            return None
        raise RunFolderError(f"{damage[0]}. No other checkpoint is left; restore the file {FROM_COPY}")


def _read(folder: Path) -> Checkpoint:
    from safetensors.torch import load

    checksums, notes = read_object(folder / CHECKSUMS)
    if notes:
        raise Damaged(f"{folder / CHECKSUMS} is damaged: {folder}/{notes[0]}")
    for name in (STATE, TENSORS):
        if not (folder / name).is_file() or sha256_of(folder / name) != checksums.get(name):
            raise Damaged(f"{folder / name} is damaged: its checksum is not the recorded one")
    state = read_object(folder / STATE)[0]  # whose checksum can be made to fit anything
    return Checkpoint(state["stage"], state["data"], load((folder / TENSORS).read_bytes()), state["beside"])
