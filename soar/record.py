"""The run folder: manifest, JSONL events, checkpoints.

A contract that other tools read; docs/run_folder.md has the fields. Files are replaced whole by write, fsync and rename;
JSONL files only grow, and a checkpoint remembers how long each was, so that a resumed run cuts off what came after it.
Nothing is pickled: JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor

import soar
from soar.config import Config, difference
from soar.files import write_json
from soar.types import UserError

SCHEMA = 1
STREAMS = ("metrics.jsonl", "questions.jsonl", "pq.jsonl")  # cut back on resume
# A resumed run may change these: they say where and how fast the run computes, not what.
HARMLESS = (
    "name",
    "threads",
    "model.device",
    "model.chunk",
    "model.micro_batch_tokens",
    "problems.verify_workers",
    "screen.from_run",
)
PACKAGES = ("torch", "transformers", "numpy", "math-verify", "pebble", "pydantic", "safetensors")


class RunFolderError(UserError):
    """A run folder that cannot be used as asked; nothing in it was changed."""


@dataclass
class Checkpoint:
    """stage: what was going on. data: JSON-ready state. tensors: named arrays."""

    stage: str
    data: dict[str, Any]
    tensors: dict[str, Tensor]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{path} is damaged: it holds {type(value).__name__}, expected an object")
    return value


def finite(value: Any) -> Any:
    """The value with every NaN and infinity replaced by None: JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide numbers."""
    found = {"soar": soar.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunFolder:
    """An open run folder, held by one process (use as a context manager).

    Raises RunFolderError when the folder holds a run and `resume` is False, when another process holds it, when there is
    nothing to resume, or when the config differs from the recorded one in a key that decides results.
    """

    def __init__(self, path: Path, config: Config, command: list[str], resume: bool = False) -> None:
        self.path = path
        self._lock = FileLock(str(path / ".lock"))
        exists = (path / "manifest.json").is_file()
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, expected a folder; give another --out")
        if not resume and path.exists() and any(p.name != ".lock" for p in path.iterdir()):
            raise RunFolderError(
                f"{path} is not empty; give --resume to continue the run in it, or another --out"
                if exists
                else f"{path} is not empty and holds no run; give another --out"
            )
        if resume and not exists:
            raise RunFolderError(f"{path} holds no run to resume (no manifest.json); leave out --resume to start one")
        path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(f"{path} is in use by another process; wait for it or choose another --out") from None
        try:
            self.manifest = self._continue(config) if resume else self._begin(config, command)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _begin(self, config: Config, command: list[str]) -> dict[str, Any]:
        manifest = {
            "schema": SCHEMA,
            "name": config.name,
            "seed": config.seed,
            "command": command,
            "config": config.resolved(),
            "versions": versions(),
            "hashes": {},
        }
        write_json(self.path / "manifest.json", manifest)
        return manifest

    def _continue(self, config: Config) -> dict[str, Any]:
        manifest: dict[str, Any] = _read_json(self.path / "manifest.json")
        if manifest.get("schema") != SCHEMA:
            raise RunFolderError(
                f"{self.path}/manifest.json has schema {manifest.get('schema')!r}, this version reads {SCHEMA}; "
                "resume with the version that began the run"
            )
        changed = difference(manifest["config"], config.resolved())
        refused = [line for line in changed if line.split(":", 1)[0] not in HARMLESS]
        if refused:
            raise RunFolderError(
                f"{self.path} was begun with another config; these keys decide results and cannot change on --resume:\n  "
                + "\n  ".join(refused)
            )
        return manifest

    def note_hashes(self, **hashes: str) -> None:
        """Add hashes to the manifest; raises RunFolderError when a recorded one differs (model or data changed)."""
        for name, value in hashes.items():
            old = self.manifest["hashes"].get(name, value)
            if old != value:
                raise RunFolderError(
                    f"{self.path}: {name} changed since the run began ({old[:12]} then, {value[:12]} now); "
                    "restore the old one or start a new run"
                )
        self.manifest["hashes"].update(hashes)
        write_json(self.path / "manifest.json", self.manifest)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to a JSONL file of the folder."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All lines of a JSONL file of the folder ([] when it is absent); a half-written last line is cut off the file."""
        path = self.path / name
        if not path.is_file():
            return []
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        return [json.loads(line) for line in content[:whole].split(b"\n") if line]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint: a new folder, then the pointer to it; the one before is kept, older ones go."""
        state = self.path / "state"
        latest = self._pointer()
        number = latest["number"] + 1 if latest else 0
        temporary, final = state / f"{number:06d}.tmp", state / f"{number:06d}"
        for folder in (temporary, final):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()}, temporary / "tensors.safetensors"
        )
        sizes = {n: (self.path / n).stat().st_size for n in STREAMS if (self.path / n).is_file()}
        write_json(temporary / "state.json", {"stage": checkpoint.stage, "sizes": sizes, "data": checkpoint.data})
        digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(temporary.iterdir())}
        os.replace(temporary, final)
        write_json(state / "latest.json", {"number": number, "sha256": digests})
        for old in state.iterdir():
            if old.is_dir() and old.name not in (f"{number:06d}", f"{number - 1:06d}"):
                shutil.rmtree(old, ignore_errors=True)

    def _pointer(self) -> dict[str, Any] | None:
        path = self.path / "state" / "latest.json"
        return _read_json(path) if path.is_file() else None

    def load(self) -> Checkpoint | None:
        """The last checkpoint, its JSONL files cut to the length they had; None when there is none yet.

        Raises RunFolderError when a file does not match its checksum, or a JSONL file is shorter than it was.
        """
        pointer = self._pointer()
        if pointer is None:
            self._cut({})
            return None
        folder = self.path / "state" / f"{pointer['number']:06d}"
        for name, digest in pointer["sha256"].items():
            if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise RunFolderError(f"{folder / name} is damaged: its checksum is not the recorded one")
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self._cut(state["sizes"])
        return Checkpoint(state["stage"], state["data"], load_file(folder / "tensors.safetensors"))

    def _cut(self, sizes: dict[str, int]) -> None:
        found = {name: (self.path / name).stat().st_size for name in STREAMS if (self.path / name).is_file()}
        for name, wanted in sizes.items():
            if found.get(name, 0) < wanted:
                raise RunFolderError(
                    f"{self.path / name} has {found.get(name, 0)} bytes, but had {wanted} at the checkpoint: lines are lost; "
                    "start a new run"
                )
        for name, size in found.items():
            if size > sizes.get(name, 0):
                os.truncate(self.path / name, sizes.get(name, 0))
