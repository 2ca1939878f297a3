"""Promotions on hold for a person: the file that shows one, and the decision in it. Needs no torch.

With promotion.review the run saves itself and ends at every promotion; `soar review` shows the questions and their effect
and takes the decision, and the resumed run does what it says.

The run folder: who may write in it, manifest, JSONL events, and checkpoints that remember how long those were.

A contract that other tools read; docs/run_folder.md has the fields. Files are replaced whole by write, fsync and rename;
JSONL files only grow, and a resumed run cuts off what came after its checkpoint. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from soar.config import HARMLESS, Config, ConfigError, build, difference
from soar.files import (
    HIDDEN,
    StorageError,
    digest_of_start,
    encodable,
    encoded,
    finite,
    odd_kind,
    read_jsonl,
    read_object,
    scrub,
    storage_errors,
    sync_file,
    sync_folder,
    visible,
    write_json,
)
from soar.report.runs import REVIEW_FILE as FILE
from soar.run.checkpoint import (
    SCHEMA,
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    changed_lines,
    check_schema,
    lost_lines,
    read_document,
)
from soar.types import VERSION, UserError

ACCEPTED, REJECTED = "accepted", "rejected"


class ReviewError(UserError):
    """There is nothing to review, or the file is damaged."""


def ask(folder: Path, promotion: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put a promotion up for review, unless it is up already (then its decision stays)."""
    known, _ = read_object(folder / FILE)
    if known.get("promotion") != promotion or known.get("questions") != rows:
        write_json(folder / FILE, {"promotion": promotion, "questions": rows, "decision": None, "by": None})


def answer(folder: Path, promotion: dict[str, Any]) -> tuple[str, str | None] | None:
    """(decision, by) on a promotion; None while there is none. A decision on another promotion does not count."""
    known, _ = read_object(folder / FILE)
    by = known.get("by")
    if known.get("promotion") != promotion or known.get("decision") not in (ACCEPTED, REJECTED):
        return None
    return known["decision"], by if by is None else str(by)


def close(folder: Path) -> None:
    """Take the file away once the events hold the decision."""
    (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any]:
    """The promotion that is up for review. Raises ReviewError."""
    if not (folder / FILE).is_file():
        raise ReviewError(
            f"{folder} has no promotion to review (no {FILE}); only runs with promotion.review = true ask"
        )
    known, notes = read_object(folder / FILE)
    rows = known.get("questions")
    whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not isinstance(known.get("promotion"), dict) or not whole:
        raise ReviewError(
            f"{folder / FILE} is damaged: {(notes or ['it holds no promotion'])[0]}; delete it, and the run will "
            "write it again when it is resumed"
        )
    return known


def decide(folder: Path, decision: str, by: str) -> None:
    """Write the decision on the promotion that is up for review. Raises ReviewError."""
    write_json(folder / FILE, finite({**read(folder), "decision": decision, "by": by}))


def lines(review: dict[str, Any]) -> list[str]:
    """What a person needs to decide, as lines for a terminal; text of the model has its control characters escaped."""
    promotion = review["promotion"]
    step, dataset = promotion.get("step"), promotion.get("dataset")
    found = [
        f"outer step {step}: dataset {dataset}, student {promotion.get('repeat')}",
        f"  reward {_number(promotion.get('reward'))}: pass rate on the hard reward questions "
        f"{_number(promotion.get('pass_rate'))}, baseline {_number(promotion.get('baseline_pass_rate'))}",
        f"  {len(review['questions'])} questions with the teacher's answers:",
    ]
    for number, row in enumerate(review["questions"], start=1):
        mark = {True: "", False: "  (wrong by the world's oracle)"}.get(row.get("correct"), "")
        found.append(f"  {number:3d}. {visible(_one_line(row.get('question')))}")
        found.append(f"       answer: {visible(_one_line(row.get('answer')))}{mark}")
    decision = review.get("decision")
    found.append(f"decision: {decision} by {visible(str(review.get('by')))}" if decision else "decision: none yet")
    return found


def _one_line(text: object) -> str:
    return str(text)[:1000].replace("\n", "\u2424")


def _number(value: object) -> str:
    return f"{value:+.4f}" if isinstance(value, int | float) else "-"


STREAMS = ("metrics.jsonl", "questions.jsonl", "pq.jsonl")  # cut back on resume
EVIDENCE = ("hard/screen.jsonl", "state/evaluation.jsonl")  # kept on resume: made again where lines are missing
BEFORE_FIRST = ("screen", "alarm")  # events that may stand in metrics.jsonl before there is a checkpoint
ADVICE = "What was saved before is intact: free space or permit writing, then continue with --resume"
PACKAGES = ("torch", "transformers", "numpy", "math-verify", "pebble", "pydantic", "safetensors")


class RunFolderError(UserError):
    """A run folder that cannot be used as asked; nothing in it was changed."""


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide numbers."""
    found = {"soar": VERSION, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def recorded_config(path: Path) -> Config:
    """The config that the run in a folder was begun with. Raises RunFolderError."""
    if not (path / "manifest.json").is_file():
        raise _no_run(path)
    config = _recorded(read_document(path / "manifest.json"), path)
    if HIDDEN in json.dumps(config.resolved()):
        raise RunFolderError(
            f"{path}/manifest.json holds a secret only as {HIDDEN}; give the recipe and the overrides that the run was "
            "begun with"
        )
    return config


def _recorded(manifest: dict[str, Any], path: Path) -> Config:
    """A key that the recording version did not have yet counts with its default."""
    try:
        return build(manifest.get("config", {}), f"{path}/manifest.json")
    except ConfigError as error:
        raise RunFolderError(f"{error}; resume with the version that began the run") from error


def _no_run(path: Path) -> RunFolderError:
    """Why nothing in a folder without a manifest can be resumed, and what to do."""
    if (path / "state").is_dir() or (path / "metrics.jsonl").is_file():
        kind = odd_kind(path / "manifest.json") or "missing"
        return RunFolderError(
            f"{path}/manifest.json is {kind}, though other files of a run are there; restore it from a copy, or start a new "
            "run with another --out"
        )
    return RunFolderError(f"{path} holds no run to resume (no manifest.json); leave out --resume to start one")


class RunFolder:
    """An open run folder, held by one process (use as a context manager).

    notes: what a person should be told about the folder. Raises RunFolderError when the folder holds a run and `resume`
    is False, when another process holds it, when there is nothing to resume, or when the config differs from the
    recorded one in a key that decides results; StorageError when it cannot be written.
    """

    def __init__(self, path: Path, config: Config, command: list[str], resume: bool = False) -> None:
        self.path = path
        self.on_events: Callable[[list[dict[str, Any]]], None] | None = None  # gets what goes to metrics.jsonl
        self.notes: list[str] = []
        self._checkpoints = CheckpointStore(path / "state")
        self._hashed: dict[str, tuple[int, Any]] = {}  # JSONL file -> (bytes, sha256 of them so far)
        self._lock = FileLock(str(path / ".lock"))
        exists = (path / "manifest.json").is_file()
        if not encodable(str(path)):
            raise RunFolderError(f"{path}: the name is not UTF-8, which checkpoints need; give another --out")
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, expected a folder; give another --out")
        others = [p.name for p in path.iterdir() if not _left_over(p.name)] if path.exists() else []
        if not resume and others:
            raise RunFolderError(
                f"{path} is not empty; give --resume to continue the run in it, or another --out"
                if exists
                else f"{path} is not empty and holds no run; give another --out"
            )
        # A run that was killed before its manifest was written leaves an empty folder: resuming it begins it.
        if resume and not exists and (others or not path.exists()):
            raise _no_run(path)
        with storage_errors(path, "Choose another --out, or permit writing there"):
            path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self.manifest = self._continue(config) if exists else self._begin(config, command)
            except BaseException:
                self._lock.release()
                raise

    def _acquire(self) -> None:
        """The lock is the system's own (flock), so that of a process that died is free."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunFolderError(
                f"{self.path} is in use by another process; wait for it or choose another --out"
            ) from None
        except NotImplementedError as error:
            raise StorageError(f"{self.path} is on a disk without file locks: {error}; choose another --out") from error

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def _begin(self, config: Config, command: list[str]) -> dict[str, Any]:
        manifest = {
            "schema": SCHEMA,
            "name": scrub(config.name),
            "seed": config.seed,
            "command": scrub(command),
            "config": scrub(config.resolved()),
            "versions": versions(),
            "hashes": {},
        }
        write_json(self.path / "manifest.json", manifest)
        return manifest

    def _continue(self, config: Config) -> dict[str, Any]:
        manifest: dict[str, Any] = read_document(self.path / "manifest.json")
        for name in (*STREAMS, *EVIDENCE):
            if (kind := odd_kind(self.path / name)) is not None:
                raise RunFolderError(f"{self.path / name} is {kind}, expected a file; restore it from a copy")
        hashes = manifest.get("hashes")
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            raise RunFolderError(
                f"{self.path}/manifest.json is damaged: hashes is no object of texts; restore it from a copy, or start a "
                "new run"
            )
        try:
            check_schema(manifest.get("schema"), self.path / "manifest.json")
        except CheckpointError as error:
            raise RunFolderError(str(error)) from None
        changed = difference(_recorded(manifest, self.path).resolved(), scrub(config.resolved()))
        refused = [line for line in changed if line.split(":", 1)[0] not in HARMLESS]
        if refused:
            raise RunFolderError(
                f"{self.path} was begun with another config; these keys decide results and cannot change on --resume:\n  "
                + "\n  ".join(refused)
            )
        self.notes += [f"changed on resume: {line}" for line in changed]
        self._compare_versions(manifest.get("versions"))
        for old in self.path.rglob(".*.tmp"):
            if old.is_file():
                old.unlink()  # what a killed process was writing
        return manifest

    def _compare_versions(self, recorded: Any) -> None:
        """Say what a person has to know who compares numbers: a resume is exact only with the same libraries."""
        known = recorded if isinstance(recorded, dict) else {}
        now = versions()
        changed = [f"{name} {known.get(name)} -> {now[name]}" for name in now if known.get(name) != now[name]]
        if changed:
            self.notes.append(
                f"begun with other versions ({', '.join(changed)}): what follows may differ in rounding from what would "
                "have followed"
            )

    def note_hashes(self, **hashes: str) -> None:
        """Add hashes to the manifest; raises RunFolderError when a recorded one differs (model or data changed)."""
        for name, value in hashes.items():
            old = self.manifest["hashes"].get(name, value)
            if old != value:
                raise RunFolderError(
                    f"{self.path}: {name} changed since the run began ({old[:12]} then, {value[:12]} now); "
                    "restore the old one or start a new run"
                )
        if {**self.manifest["hashes"], **hashes} != self.manifest["hashes"]:
            self.manifest["hashes"].update(hashes)
            with storage_errors(self.path, ADVICE):
                write_json(self.path / "manifest.json", self.manifest)

    def tell(self, say: Callable[[str], None]) -> None:
        """Say what is in `notes`, once: damage that was passed over, what changed on resume."""
        notes, self.notes = self.notes, []
        for line in notes:
            say(line)

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add lines to a JSONL file of the folder. Raises StorageError."""
        path = self.path / name
        lines = [json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with storage_errors(path, ADVICE):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.writelines(map(encoded, lines))
        if name == "metrics.jsonl" and self.on_events is not None:
            self.on_events(rows)

    def rows(
        self, name: str, usable: Callable[[int, dict[str, Any]], bool] = lambda number, row: True
    ) -> list[dict[str, Any]]:
        """All lines of a JSONL file of the folder ([] when it is absent); a half-written last line is cut off the file.

        A damaged line, as a loss of power may leave one: evidence is cut there and made again, since no checkpoint counts
        on it; in any other file it raises RunFolderError. usable(number, row): whether the row of a line says what it has
        to say; one that does not is damaged too.
        """
        path = self.path / name
        if not path.is_file():
            return []
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        found: list[dict[str, Any]] = []
        start = 0
        for number, line in enumerate(content[:whole].split(b"\n"), start=1):
            try:
                if line and not isinstance(row := json.loads(line), dict):
                    raise ValueError(f"it holds {type(row).__name__}, expected an object")
                if line and not usable(number, row):
                    raise ValueError("it does not hold what it should")
            except (ValueError, RecursionError) as error:
                if name in STREAMS:
                    raise RunFolderError(
                        f"{path}:{number} is damaged: {error}; restore the line from a copy, or start a new run"
                    ) from error
                self.notes.append(f"{path}:{number} is damaged: what follows is made again")
                whole = start
                break
            found += [row] if line else []
            start += len(line) + 1
        if whole < len(content):
            os.truncate(path, whole)
            self._hashed.pop(name, None)
        return found

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the one before is kept. Raises StorageError, and the one before is still in force."""
        with storage_errors(self.path / "state", ADVICE):
            for name in (*STREAMS, *EVIDENCE):  # the lines that the checkpoint counts on are on disk before it is
                if (self.path / name).is_file():
                    sync_file(self.path / name)
            sync_folder(self.path)
            sizes = self._sizes()
            digests = {name: self._digest(name, size) for name, size in sizes.items()}
            self._checkpoints.save(replace(checkpoint, sizes=sizes, digests=digests))

    def load(self) -> Checkpoint | None:
        """The last whole checkpoint, the JSONL files cut to the length they had; None when there is none yet.

        One that does not match its checksums, or counts on lines that are lost or changed, is passed over with a line in
        `notes`. Raises CheckpointError when none is left, RunFolderError when there is none though there was one.
        """
        self._hashed.clear()  # lines are about to be cut
        checkpoint = self._checkpoints.load(self._check_lines, self.notes.append)
        if checkpoint is None and self._past_first():
            raise RunFolderError(
                f"{self.path}/state holds no checkpoint, but the run was past its first: resuming would begin anew and "
                "drop what is recorded; restore state/ from a copy, or start a new run with another --out"
            )
        sizes = checkpoint.sizes if checkpoint else {}
        for name, size in self._sizes().items():
            if size > sizes.get(name, 0):
                os.truncate(self.path / name, sizes.get(name, 0))
        return checkpoint

    def _sizes(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in STREAMS if (self.path / name).is_file()}

    def _digest(self, name: str, size: int) -> str:
        """sha256 of the first `size` bytes of a JSONL file, which only grows while this process writes it."""
        done, digest = self._hashed.get(name, (0, hashlib.sha256()))
        if done > size:
            done, digest = 0, hashlib.sha256()
        with open(self.path / name, "rb") as file:
            file.seek(done)
            digest.update(file.read(size - done))
        self._hashed[name] = (size, digest)
        return str(digest.hexdigest())

    def _past_first(self) -> bool:
        """Whether the JSONL files hold lines that are written only after the first checkpoint."""
        if any(self._sizes().get(name) for name in STREAMS if name != "metrics.jsonl"):
            return True
        return any(row.get("event") not in BEFORE_FIRST for row in read_jsonl(self.path / "metrics.jsonl")[0])

    def _check_lines(self, checkpoint: Checkpoint) -> None:
        found = self._sizes()
        for name, wanted in checkpoint.sizes.items():
            if found.get(name, 0) < wanted:
                raise lost_lines(self.path / name, found.get(name, 0), wanted)
        for name, digest in checkpoint.digests.items():
            if digest_of_start(self.path / name, checkpoint.sizes[name]) != digest:
                raise changed_lines(self.path / name)


def _left_over(name: str) -> bool:
    """Whether a name is what a process leaves that was killed before it wrote its manifest."""
    return name == ".lock" or (name.startswith(".manifest.json.") and name.endswith(".tmp"))
