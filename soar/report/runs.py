"""Reading a run folder: finished, still running, interrupted or damaged. Needs no torch.

A reader never fails on what it finds: a missing file, half a last line or a value of the wrong type is left out and named in
`Run.notes`. `summary_of` makes summary.json from the events of a run and its config, and the wall times.
"""

import fcntl
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from soar import seeds
from soar.config import Config
from soar.files import Row, read_jsonl, read_object, sha256_of, shell_words
from soar.loop.evaluate import paired_differences
from soar.types import UserError

HASHES = "hashes.json"  # sha256 of every file of a finished run
PAUSE_FILE = "paused.json"  # why a run that is not finished has stopped
NOW_FILE = "now.json"  # where a run is that is at work
LARGEST = 1e15  # no count, share or duration of a run comes near; a larger one is damage


class ReportError(UserError):
    """A folder that holds no run, or that cannot be used for the export asked for."""


class Arm(NamedTuple):
    """Held-out result of one arm; None where the file has no figure.

    pass_at: k -> pass@k as a share. interval: k -> 95 % interval (low, high), for the k that have one. rollouts by students
    and total_tokens: with the search for its questions or its start, without the evaluation.
    """

    name: str
    pass_at: dict[int, float]
    interval: dict[int, tuple[float, float]]
    problems: int | None = None
    attempts: int | None = None
    rollouts: int | None = None
    total_tokens: int | None = None
    evaluation_tokens: int | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder says. Lists are in file order. held: by the process that works in it, as far as can be seen."""

    path: Path
    manifest: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    events: dict[str, list[Row]] = field(default_factory=dict)
    questions: list[Row] = field(default_factory=list)
    pq: list[Row] = field(default_factory=list)
    rollouts: list[Row] = field(default_factory=list)
    hard_train: list[Row] = field(default_factory=list)
    hard_test: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    paused: Row = field(default_factory=dict)
    now: Row = field(default_factory=dict)
    held: bool = True

    @property
    def name(self) -> str:
        return str(self.manifest.get("name") or self.path.resolve().name)

    @property
    def config(self) -> Row:
        return mapping(self.manifest.get("config"))

    def setting(self, section: str, name: str) -> float | None:
        """A number of the recorded config, None where it has none."""
        return number(mapping(self.config.get(section)).get(name))

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def state(self) -> str:
        """`finished`, `paused`, `at work` or, where its process is gone without a word, `stopped`."""
        if self.finished or (not self.events and (self.path / "screen.json").is_file()):  # of a screening
            return "finished"
        return "paused" if self.paused else "at work" if self.held else "stopped"

    @property
    def resume_command(self) -> str:
        """What goes on with it, by its own path; of paused.json, which may be a stranger's, the number of tokens alone."""
        command = self.manifest.get("command")
        words = [word for word in command if word != "--trust-run"] if isinstance(command, list) else []
        with_function = words[:1] == ["soar.train"] and len(words) > 1  # a teacher's reward
        if with_function or words[:2] in (["soar", "screen"], ["soar.screen"]):
            return "the command that began it and --resume"
        more = "".join(re.findall(r" --max-tokens \d{1,15}\Z", str(self.paused.get("resume"))))
        return f"soar run --out {shell_words(self.path)} --resume{more}"

    @property
    def steps(self) -> list[Row]:
        """The outer step events."""
        return [row for row in self.events.get("outer_step", []) if count(row.get("step")) is not None]

    @property
    def written(self) -> dict[int, list[Row]]:
        """Outer step -> its questions, first step first."""
        by_step: dict[int, list[Row]] = {}
        for row in self.questions:
            if (step := count(row.get("step"))) is not None:
                by_step.setdefault(step, []).append(row)
        return dict(sorted(by_step.items()))

    @property
    def promotions(self) -> list[Row]:
        """One event per promotion."""
        return [row for row in self.events.get("promotion", []) if count(row.get("step")) is not None]

    @property
    def left_out(self) -> list[str]:
        """What is said of arms that were left out."""
        alarms = self.events.get("alarm", [])
        return [str(row.get("message")) for row in alarms if row.get("kind") == "arm left out"]

    @property
    def arms(self) -> dict[str, Arm]:
        """Arms of the summary; while the run is unfinished, the arms evaluated so far."""
        evaluated = {str(row.get("arm")): row for row in self.events.get("evaluation", []) if row.get("arm")}
        rows = mapping(self.summary.get("arms")) or evaluated
        arms = {name: read_arm(name, row) for name, row in rows.items() if isinstance(row, dict)}
        return {name: arm for name, arm in arms.items() if arm.pass_at}


def number(value: object) -> float | None:
    """`value` as a float, or None for anything else: text, booleans, NaN, and sizes beyond LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST <= value <= LARGEST:
        return None
    return float(value)


def numbers(values: object) -> list[float]:
    """The finite numbers of a list; nothing for anything else."""
    return [x for x in map(number, values) if x is not None] if isinstance(values, list | tuple) else []


def count(value: object) -> int | None:
    """`value` as an integer, or None for anything else."""
    result = number(value)
    return int(result) if result is not None else None


def mapping(value: object) -> Row:
    """`value` as a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def read_arm(name: str, row: Row) -> Arm:
    """One arm from its entry in summary.json or from an evaluation event."""

    def by_k(key: str) -> list[tuple[int, Any]]:
        entries = mapping(row.get(key)).items()
        return sorted(((int(k), value) for k, value in entries if k.isdecimal() and len(k) < 10), key=itemgetter(0))

    bounds = {k: numbers(value) for k, value in by_k("interval_95")}
    trained, search = count(row.get("student_rollouts")), count(row.get("search_rollouts")) or 0
    return Arm(
        name=name,
        pass_at={k: share for k, value in by_k("pass_at") if (share := number(value)) is not None},
        interval={k: (pair[0], pair[1]) for k, pair in bounds.items() if len(pair) == 2},
        rollouts=None if trained is None else trained + search,
        **{key: count(row.get(key)) for key in ("problems", "attempts", "total_tokens", "evaluation_tokens")},
    )


def changed_after_run(run_dir: Path, name: str) -> bool:
    """Whether a file of a finished run has another sha256 than the run left it with (`hashes.json`)."""
    recorded = read_object(run_dir / HASHES)[0].get(name) if (run_dir / HASHES).is_file() else None
    return recorded is not None and (run_dir / name).is_file() and sha256_of(run_dir / name) != recorded


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Raises ReportError when it has neither manifest.json nor metrics.jsonl."""
    if not (run_dir / "manifest.json").is_file() and not (run_dir / "metrics.jsonl").is_file():
        missing = "it has neither manifest.json nor metrics.jsonl; give the folder that `soar run --out` wrote"
        raise ReportError(f"{run_dir}: no run folder: {missing}")
    notes: list[str] = []

    def content(name: str) -> Any:
        path, rows = run_dir / name, name.endswith(".jsonl")
        value, remarks = read_jsonl(path, name) if rows else read_object(path)
        needed = name == "manifest.json" or (name == "metrics.jsonl" and not (run_dir / "screen.json").is_file())
        if needed or os.path.lexists(path):
            notes.extend(remarks)  # which of the others must be there, soar doctor knows
        return value

    # The lock before the summary, that before the events: a run that is over has written them all.
    held = True  # as well where the disk does not tell
    with suppress(OSError):
        if (lock := run_dir / ".lock").is_file():  # a pipe would be waited for
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go at once, and RunFolder asks more than once
            held = False
    parts = {name: content(f"{name}.json") for name in ("manifest", "summary", "paused", "now")}
    events: dict[str, list[Row]] = {}
    for row in content("metrics.jsonl"):
        events.setdefault(str(row.get("event")), []).append(row)
    lists = ("questions", "pq", "rollouts", "hard_train", "hard_test")
    parts |= {name: content(f"{name.replace('_', '/')}.jsonl") for name in lists}
    return Run(run_dir, events=events, notes=notes, held=held, **parts)


def summary_of(rows: Sequence[Row], config: Config, wall_seconds: dict[str, float]) -> Row:
    """The summary of a run with the events `rows`. docs/metrics.md has its fields."""
    steps = [row for row in rows if row["event"] == "outer_step"]
    promotions = sum(row["event"] == "promotion" for row in rows)
    measured = {row["arm"]: row for row in rows if row["event"] == "evaluation"}
    evaluations: dict[str, Row] = {arm: measured[arm] for arm in config.arms.run if arm in measured}
    search = max((row["student_rollouts"] for row in rows if row["event"] in ("outer_step", "validation")), default=0)
    arms, seed = {}, seeds.derive(config.seed, "paired")
    for arm, row in evaluations.items():
        arms[arm] = {key: value for key, value in row.items() if key not in ("event", "arm", "correct")}
        arms[arm] |= {"search_rollouts": search} if arm != "ps" and config.uses_search(arm) else {}
    pairs = [(arm, "hard_only") for arm in evaluations if arm not in ("base", "hard_only")] + [("teacher_t", "base_t")]
    paired: Row = {}
    for arm, other in (pair for pair in pairs if evaluations.keys() >= {*pair}):
        a_H, b_H = (evaluations[name]["correct"] for name in (arm, other))
        paired[f"{arm} - {other}"] = paired_differences(a_H, b_H, config.evaluate, seed)
    silent = TEACHER_SILENT if any(row.get("kind") == TEACHER_SILENT for row in rows) else None
    return {
        "arms": arms,
        "paired": paired,
        "promotions": promotions,
        "outer_steps": len(steps),
        "loop_end": loop_end(config, len(steps), promotions) or silent,
        "seed": config.seed,
        "teacher_rollouts": sum(row["sampled"] for row in steps),
        "wall_seconds": {name: round(seconds, 1) for name, seconds in wall_seconds.items()},
    }


TEACHER_SILENT = "teacher silent"  # alarm: too few acceptable questions, so the loop ended and the arms followed


def loop_end(config: Config, steps: int, promotions: int) -> str | None:
    """Which key ends the outer loop after so many steps and promotions; None while it goes on."""
    limit = config.limits.max_promotions
    if limit and promotions >= limit:
        return f"limits.max_promotions = {limit}"
    return f"teacher.steps = {config.teacher.steps}" if steps >= config.teacher.steps else None
