"""The run folder: the one place that writes lines and checkpoints of a run; promotions on hold; `soar doctor`. No torch.

A contract that other tools read; docs/run_folder.md has the fields. JSONL files only grow, and a resumed run cuts off what
came after its checkpoint. With promotion.review a run ends at every promotion, for `soar review` to decide.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from soar import files
from soar.config import HARMLESS, Config, ConfigError, build, flat, load, parse_override, refuse_code
from soar.files import Row
from soar.report.runs import HASHES, ReportError, mapping, summary_of
from soar.run.checkpoint import FROM_COPY, OLD_SOAR, Checkpoint, CheckpointStore, Damaged, RunFolderError, read_document
from soar.types import VERSION, Interrupted, UserError, parse_json

SCHEMA = 4
REVIEW_FILE = "review.json"  # a promotion that waits for a person
ACCEPTED, REJECTED = "accepted", "rejected"
STREAMS = ("metrics.jsonl", "questions.jsonl", "pq.jsonl", "rollouts.jsonl")  # cut back on resume
TOLD = ("metrics.jsonl", "rollouts.jsonl")  # what the sinks get
EVIDENCE = "hard/screen.jsonl"  # kept on resume: made again where lines are missing
BEFORE_FIRST = ("screen", "alarm")  # events that may stand in metrics.jsonl before there is a checkpoint
ADVICE = "What was saved before is intact: free space or permit writing, then continue with --resume"
PACKAGES = ("torch", "transformers", "numpy", "mpmath", "pydantic", "safetensors")
UNTOUCHED = ("tensorboard", "wandb")  # folders of sinks, which write until they are closed
NOBODYS = re.compile(r"\.lock|\.manifest\.json\..*|manifest\.json|now\.json|tensorboard|wandb")  # before any event
REWRITTEN = (".lock", "hashes.json", "report.html", "paused.json", "now.json", REVIEW_FILE)  # not in the hash list


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide numbers."""
    numbers = {"soar": VERSION, "python": platform.python_version(), "platform": platform.platform()}
    numbers |= dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    return numbers


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for every key that differs between two resolved configs; two ways to one file do not."""
    a, b = ({key: value for key, value in flat(config).items() if value != {}} for config in (old, new))
    changed = sorted(key for key in a | b if a.get(key) != b.get(key) and not _one_file(a.get(key), b.get(key)))
    return [f"{key}: {json.dumps(a.get(key))} -> {json.dumps(b.get(key))}" for key in changed]


def _one_file(a: object, b: object) -> bool:
    """Two ways to one file; of a relative one from another working folder the end tells, and its hash what is in it."""
    if not isinstance(a, str) or not isinstance(b, str):
        return False
    short, long = sorted((a, b), key=os.path.isabs)
    if os.path.exists(short) or not os.path.isabs(long):
        return all(map(os.path.exists, (short, long))) and os.path.samefile(short, long)
    return os.path.exists(long) and long.endswith(f"{os.sep}{os.path.normpath(short)}")


def recorded_config(path: Path, overrides: list[str] | None = None) -> Config:
    """The config that the run in a folder was begun with, and `--set` overrides. Raises RunFolderError, ConfigError."""
    if files.no_file(path / "manifest.json"):
        raise _no_run(path)
    config = _recorded(read_document(path / "manifest.json"), path)
    if files.HIDDEN in json.dumps(config.resolved()):
        begun = "give the recipe and the overrides that the run was begun with"
        raise RunFolderError(f"{path}/manifest.json holds a secret only as {files.HIDDEN}; {begun}")
    return load(str(path / "manifest.json"), overrides)


def recorded_sets(definition: Path, seeds: Sequence[int]) -> list[str]:
    """The `--set` of a study by its definition.json, if texts. Raises ConfigError for code or a server, unless trusted."""
    extra = files.read_object(definition)[0].get("extra")
    sets: list[str] = extra if isinstance(extra, list) and all(isinstance(text, str) for text in extra) else []
    for text in (text.replace("{seed}", str(seed)) for text in sets for seed in seeds):
        refuse_code(definition, parse_override(text))
    return sets


def files_of(folder: Path) -> list[str]:
    """Names of the files of a run that stay as they are once it has ended: all but REWRITTEN and the sinks'."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [name for name in names if name not in REWRITTEN and name.split("/")[0] not in UNTOUCHED]


def refuse_links(folder: Path) -> None:
    """Raises RunFolderError for a link where a run or a study writes: what lies behind it may be anybody's."""
    for path in (path for places in ("*", "*/*", "*/*/*") for path in folder.glob(places)):
        if path.is_symlink() and not {*UNTOUCHED} & {*path.relative_to(folder).parts[:-1]}:  # sinks make some
            raise RunFolderError(f"{path} is a link: what is written there would lie elsewhere; put the original there")


def _recorded(manifest: Row, path: Path) -> Config:
    """A key that the recording version did not have yet counts with its default."""
    schema, hashes = manifest.get("schema"), manifest.get("hashes")
    if schema != SCHEMA:
        raise RunFolderError(f"{path}/manifest.json is of schema {schema!r}, this version resumes {SCHEMA}; {OLD_SOAR}")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise RunFolderError(f"{path}/manifest.json is damaged: hashes is no object of texts; restore it {FROM_COPY}")
    try:
        return build(manifest.get("config", {}), f"{path}/manifest.json")
    except ConfigError as error:
        raise RunFolderError(f"{error}; {OLD_SOAR}") from error


def _no_run(path: Path) -> RunFolderError:
    """Why nothing in a folder without a manifest can be resumed, and what to do."""
    if not (path / "state").is_dir() and not (path / "metrics.jsonl").is_file():
        return RunFolderError(f"{path} holds no run to resume (no manifest.json); leave out --resume to start one")
    why = f"{files.no_file(path / 'manifest.json')}, though other files of a run are there"
    return RunFolderError(f"{path}/manifest.json is {why}; restore it {FROM_COPY} with another --out")


class RunFolder(AbstractContextManager["RunFolder"]):
    """An open run folder, held by one process; a new one has its manifest with `note_hashes`. say: told what changed on
    resume, and damage that is passed over. Raises RunFolderError when it holds a run and `resume` is False, another process
    holds it, there is nothing to resume, or a key that decides results differs; Interrupted when it cannot be written.
    """

    def __init__(
        self, path: Path, config: Config, command: list[str], resume: bool = False, say: Callable[[str], Any] = print
    ) -> None:
        self.path, self.say = path, say
        self.on_events: Callable[[list[Row]], None] | None = None  # gets what goes to TOLD
        self._checkpoints = CheckpointStore(path / "state")
        self._lock = FileLock(str(path / ".lock"))
        self._left: dict[str, tuple[int, int]] = {}  # file -> (inode, bytes) as this process left it
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"{path} is a file, expected a folder; give another --out")
        self._made = [place for place in (path, *path.parents) if not place.exists()]  # by this process, inner first
        others = path.exists() and not all(map(NOBODYS.fullmatch, os.listdir(path)))
        exists = others and (path / "manifest.json").is_file()
        if not resume and others:
            advice = "; give --resume to continue the run in it, or" if exists else " and holds no run; give"
            raise RunFolderError(f"{path} is not empty{advice} another --out")
        # A run that ended before it had an event leaves a folder that is nobody's: resuming it begins it.
        if resume and not exists and (others or not path.exists()):
            raise _no_run(path)
        refuse_links(path)
        with files.storage_errors(path, "Choose another --out, or permit writing there"):
            path.mkdir(parents=True, exist_ok=True)
            try:  # the lock is the system's own (flock), so that of a process that died is free
                self._lock.acquire(timeout=0.2)  # a reader that looks whether it is held holds it for an instant
            except (Timeout, NotImplementedError) as error:
                busy = f"in use by another process; wait for it{'' if resume else ' or choose another --out'}"
                why = busy if isinstance(error, Timeout) else f"on a disk without locks: {error}; choose another --out"
                raise RunFolderError(f"{path} is {why}") from None
            self._remember(".lock")
            about = {"name": config.name, "seed": config.seed, "command": command, "config": config.resolved()}
            try:
                self.manifest: Row = {"schema": SCHEMA, **files.scrub(about), "versions": versions(), "hashes": {}}
                self.manifest = self._continue(config) if exists else self.manifest
            except BaseException:
                self._lock.release()
                raise

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """A folder that was made here goes again where nothing was worked out: what was asked for was refused."""
        refused = isinstance(error, UserError | ImportError) and not isinstance(error, Interrupted | RunFolderError)
        with suppress(OSError):  # somebody else uses it, or took it away
            if refused and self._made and all(map(NOBODYS.fullmatch, os.listdir(self.path))):
                shutil.rmtree(self.path)
                for place in self._made[1:]:
                    place.rmdir()
        self._lock.release()

    def _continue(self, config: Config) -> Row:
        manifest = read_document(self.path / "manifest.json")
        for name in (*STREAMS, EVIDENCE):
            if (why := files.no_file(self.path / name)) not in (None, "missing"):
                raise RunFolderError(f"{self.path / name} is {why}; restore it from a copy")
        changed = difference(_recorded(manifest, self.path).resolved(), files.scrub(config.resolved()))
        refused = [line for line in changed if line.split(":", 1)[0] not in HARMLESS]
        if refused:
            keys = "\n  ".join(["these keys decide results and cannot change on --resume:", *refused])
            raise RunFolderError(f"{self.path} was begun with another config; {keys}")
        for line in changed:
            self.say(f"changed on resume: {line}")
        before, now = mapping(manifest.get("versions")), versions()
        if other := [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            effect = "what follows may differ in rounding from what would have followed"
            self.say(f"begun with other versions ({', '.join(other)}): {effect}")
        for old in self.path.rglob(".*.tmp"):
            if old.is_file():
                old.unlink()  # what a killed process was writing
        self._remember("manifest.json", *STREAMS, EVIDENCE)
        return manifest

    def note_hashes(self, **hashes: str) -> None:
        """Add hashes to the manifest. Raises RunFolderError when a recorded one differs (model, data), or as `check` does."""
        self.check()
        for name, value in hashes.items():
            if (old := self.manifest["hashes"].get(name, value)) != value:
                changed = f"{name} changed since the run began ({old[:12]} then, {value[:12]} now)"
                raise RunFolderError(f"{self.path}: {changed}; restore the old one or start a new run")
        if "manifest.json" not in self._left or hashes.keys() - self.manifest["hashes"].keys():
            self.manifest["hashes"].update(hashes)
            with self._writing("manifest.json") as path:
                files.write_json(path, self.manifest)
            self._remember("manifest.json")

    def _state(self, name: str) -> tuple[int, int] | None:
        """(inode, bytes) of a file; None when it is not there."""
        with suppress(OSError):
            state = (self.path / name).stat()
            return state.st_ino, state.st_size
        return None

    def _remember(self, *names: str) -> None:
        self._left |= {name: state for name in names if (state := self._state(name)) is not None}

    def check(self) -> None:
        """Raises RunFolderError when a file of the run is not as this process left it."""
        for name, left in self._left.items():
            if (now := self._state(name)) != left:
                changed = f"has {now[1]} bytes, expected {left[1]}" if now and now[1] != left[1] else "is another file"
                why = "something else changed the folder while the run was at work in it. Nothing more is written"
                advice = "put back what was there, then continue with --resume"
                raise RunFolderError(f"{self.path / name} {changed if now else 'is gone'}: {why}; {advice}")

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of a file to write; what the disk has against it is named, or what else was taken away meanwhile."""
        with files.storage_errors(self.path / name, ADVICE):
            try:
                yield self.path / name
            except FileNotFoundError:
                self.check()
                raise

    def append(self, name: str, rows: list[Row]) -> None:
        """Add lines to a JSONL file of the folder. Raises Interrupted; RunFolderError when the folder was changed."""
        self.note_hashes()
        with self._writing(name) as path:
            if path.parent != self.path:  # which is not made again when it was moved away
                path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                file.writelines(files.json_bytes(files.finite(row)) for row in rows)
        self._remember(name)
        if name in TOLD and self.on_events is not None:
            self.on_events(rows)

    def rows(self, name: str, sound: Callable[[Row, int], bool] = lambda row, number: True) -> list[Row]:
        """All lines of a JSONL file ([] when absent); a half-written last line is cut off. At a damaged line, or one that is
        not sound(object, number), the screening is cut and made again; another file raises RunFolderError.
        """
        self.check()
        path, size, rows = self.path / name, 0, list[Row]()
        content = path.read_bytes() if path.is_file() else b""
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                if not sound(row := parse_json(line, dict), number):
                    raise ValueError("it does not say what came of a problem")
            except ValueError as error:
                where = f"{path}:{number} is damaged"
                if name in STREAMS:
                    raise RunFolderError(f"{where}: {error}; restore the line {FROM_COPY}") from error
                self.say(f"{where}: what follows is made again")
                break
            rows.append(row)
            size += len(line) + 1
        if size < len(content):
            self.cut(name, size)
        return rows

    def cut(self, name: str, size: int = 0) -> None:
        """Cut a JSONL file to its first `size` bytes."""
        os.truncate(self.path / name, size)
        self._remember(name)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint; the one before is kept. Raises Interrupted, and the one before is still in force."""
        self.note_hashes()
        with self._writing("state"):
            for name in (*STREAMS, EVIDENCE):  # the lines that the checkpoint counts on are on disk before it is
                if (self.path / name).is_file():
                    files.sync(self.path / name)
            files.sync(self.path)
            beside = {"lines": {name: self._start(name) for name in STREAMS}, "config": self.manifest["config"]}
            self._checkpoints.save(replace(checkpoint, beside=beside))
        self._remember(*(f"hard/{path.name}" for path in self.path.glob("hard/*")))

    def load(self) -> Checkpoint | None:
        """The last whole checkpoint, or None, and JSONL files cut to the length they had. Raises RunFolderError."""
        checkpoint = self._checkpoints.load(self._check_beside, self.say)
        rows = (row for name in STREAMS for row in files.read_jsonl(self.path / name)[0])
        if checkpoint is None and any(row.get("event") not in BEFORE_FIRST for row in rows):
            why = "the run was past its first: resuming would begin anew and drop what is recorded"
            advice = f"restore state/ {FROM_COPY} with another --out"
            raise RunFolderError(f"{self.path}/state holds no checkpoint, but {why}; {advice}")
        lines = checkpoint.beside["lines"] if checkpoint else {}
        for name in STREAMS:
            if (self.path / name).is_file():
                self.cut(name, lines.get(name, [0])[0])
        return checkpoint

    def _start(self, name: str, size: int | None = None) -> list[Any]:
        """[bytes, sha256] of the first `size` bytes of a file, or of all."""
        content = (self.path / name).read_bytes()[:size] if (self.path / name).is_file() else b""
        return [len(content), hashlib.sha256(content).hexdigest()]

    def _check_beside(self, checkpoint: Checkpoint) -> None:
        if changed := difference(checkpoint.beside["config"], self.manifest["config"]):
            effect = "was changed since the checkpoint, and half the run would have another config"
            keys = "\n  ".join(["restore it from a copy:", *changed])
            raise RunFolderError(f"{self.path}/manifest.json {effect}; {keys}")
        for name, (size, sha256) in checkpoint.beside["lines"].items():
            if self._start(name, size) != [size, sha256]:
                found = f"the {size} bytes that it had at the checkpoint have another checksum"
                raise Damaged(f"{self.path / name}: {found}: lines are lost or were changed")


def ask_review(folder: Path, promotion: Row, rows: list[Row]) -> tuple[str, str | None] | None:
    """Put a promotion up for review, unless it is up already; (decision, by) on it, None while there is none."""
    review, _ = files.read_object(folder / REVIEW_FILE)
    if review.get("promotion") != promotion or review.get("questions") != rows:
        review = {"promotion": promotion, "questions": rows, "decision": None, "by": None}
        files.write_json(folder / REVIEW_FILE, review)
    by, decision = review.get("by"), review.get("decision")
    return (decision, by if by is None else str(by)) if decision in (ACCEPTED, REJECTED) else None


def read_review(folder: Path) -> Row:
    """The promotion that is up for review. Raises RunFolderError."""
    review, notes = files.read_object(folder / REVIEW_FILE)
    rows = review.get("questions")
    if isinstance(review.get("promotion"), dict) and isinstance(rows, list) and all(isinstance(r, dict) for r in rows):
        return review
    if not (folder / REVIEW_FILE).is_file():
        raise RunFolderError(f"{folder} has no promotion to review (no {REVIEW_FILE}); promotion.review = true asks")
    why = (notes or ["it holds no promotion"])[0]
    advice = "delete it, and the run will write it again when it is resumed"
    raise RunFolderError(f"{folder / REVIEW_FILE} is damaged: {why}; {advice}")


def decide_review(folder: Path, decision: str, by: str) -> None:
    """Write the decision on the promotion that is up for review. Raises RunFolderError."""
    files.write_json(folder / REVIEW_FILE, files.finite({**read_review(folder), "decision": decision, "by": by}))


ALWAYS = ("manifest.json", "metrics.jsonl", "hard/train.jsonl", "hard/test.jsonl", "summary.json")  # of a finished run
ONCE = {"screen": "event", "outer_step": "step", "promotion": "step", "evaluation": "arm"}  # what tells events apart

Check = tuple[str, list[str]]  # what was looked at, and everything that is wrong with it


def write_hashes(folder: Path) -> None:
    """hashes.json: sha256 of every file of a finished run that stays as it is."""
    files.write_json(folder / HASHES, {name: files.sha256_of(folder / name) for name in files_of(folder)})


def examine(folder: Path) -> list[Check]:
    """The checks of a run folder, or of every run in a study folder. Raises ReportError when there is none."""
    runs = sorted(path.parent for path in folder.rglob("manifest.json"))
    if not runs:
        raise ReportError(f"{folder}: no run folder: it has no manifest.json; give one that a `soar` command wrote")
    names = {run: "" if run == folder else f"{run.relative_to(folder)}: " for run in runs}
    return [(f"{name}{what}", complaints) for run, name in names.items() for what, complaints in _checks(run)]


def _checks(run: Path) -> Iterator[Check]:
    events = files.read_jsonl(run / "metrics.jsonl")[0]
    manifest, complaints = files.read_object(run / "manifest.json")
    config = manifest.get("config", {})
    try:
        build(config, f"{run}/manifest.json")
    except ConfigError as error:
        complaints.append(str(error))
    lines = sorted([*run.glob("*.jsonl"), *run.glob("hard/*.jsonl")])
    complaints += [note for path in lines for note in files.read_jsonl(path, str(path.relative_to(run)))[1]]
    keys = [(kind, row.get(ONCE[kind])) for row in events for kind in ONCE if row.get("event") == kind]
    counts = Counter(f"{kind} {key!r:.40}" for kind, key in keys)
    complaints += [f"metrics.jsonl: {name} stands {n} times" for name, n in counts.items() if n > 1]
    yield f"{len(lines) + 1} files can be read, every line is whole, no event stands twice", complaints
    yield _hashes(run)
    saved = sorted(path for path in run.glob("state/[0-9]*/state.json") if path.parent.name.isdecimal())
    begun = mapping(files.read_object(saved[-1])[0].get("beside") if saved else None).get("config")
    changed = difference(begun, config) if isinstance(begun, dict) and isinstance(config, dict) else []
    yield "config of the newest checkpoint", [f"manifest.json: the config was changed: {line}" for line in changed]
    yield _summary(run, events, config)


def _hashes(run: Path) -> Check:
    if not (run / HASHES).is_file():
        complaints = [f"{HASHES} is missing: resume the run"] if (run / "summary.json").is_file() else []
        return (f"no {HASHES}: the end of a run writes it", complaints)
    hashes, complaints = files.read_object(run / HASHES)
    present = files_of(run)
    complaints += [f"{HASHES} lacks {name}, which every finished run has" for name in ALWAYS if name not in hashes]
    complaints += [f"{name} is missing" for name in sorted(set(hashes) - set(present))]
    complaints += [f"{name} was added after the run" for name in sorted(set(present) - set(hashes))]
    changed = [name for name in sorted(set(hashes) & set(present)) if files.sha256_of(run / name) != hashes[name]]
    complaints += [f"{name} was changed after the run: its sha256 is not that in {HASHES}" for name in changed]
    return (f"hashes of {len(hashes)} files", complaints)


def _summary(run: Path, events: list[Row], config: Any) -> Check:
    if not (run / "summary.json").is_file():
        if not events and (run / "screen.json").is_file():
            return ("screen.json: the screening is finished", files.read_object(run / "screen.json")[1])
        return ("no summary.json: the run is not finished", [])
    summary, complaints = files.read_object(run / "summary.json")
    try:
        wanted = summary_of(events, build(config), {})
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        complaints.append(f"the events of metrics.jsonl give no summary: {error!r}")
        wanted = summary
    for name in sorted((set(summary) | set(wanted)) - {"wall_seconds"}):
        if (recorded := summary.get(name)) != (recomputed := wanted.get(name)):
            complaints.append(f"summary.json: {name} is {recorded!r:.200}, recomputed {recomputed!r:.200}")
    return ("summary.json from metrics.jsonl", complaints)
