"""Reading a run folder: finished, still running, interrupted or damaged. Needs no torch.

A reader never fails on what it finds: a missing file, half a last line or a value of the wrong type is left out and
named in `Run.notes`, so that what a report shows is always what the files say. `summary_of` makes summary.json from the
events of a run and its config; nothing but the wall times comes from anywhere else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config
from soar.files import Row, read_jsonl, read_object, sha256_of
from soar.loop.evaluate import paired_difference
from soar.types import UserError

HASHES = "hashes.json"  # sha256 of every file of a finished run
PAUSE_FILE = "paused.json"  # why a run that is not finished has stopped
REVIEW_FILE = "review.json"  # a promotion that waits for a person
BEGINS_WITH = {"questions.jsonl": "outer_step", "pq.jsonl": "promotion"}  # without such an event there is no file
LARGEST = 1e15  # no count, share or duration of a run comes near; a larger one is damage


class ReportError(UserError):
    """A folder that holds no run."""


@dataclass(frozen=True)
class Arm:
    """Held-out result of one arm.

    pass_at: k -> pass@k as a share. interval: k -> 95 % interval (low, high), for the k that have one.
    problems, attempts, student_rollouts: counts, None where the file has none. search_rollouts: what the loop spent
    on finding what the arm was trained on or starts from, over and above student_rollouts.
    """

    name: str
    pass_at: dict[int, float]
    interval: dict[int, tuple[float, float]]
    problems: int | None = None
    attempts: int | None = None
    student_rollouts: int | None = None
    search_rollouts: int | None = None


@dataclass(frozen=True)
class Run:
    """What a run folder says. Lists are in file order; `steps` has one outer step event per step, ascending."""

    path: Path
    manifest: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    events: dict[str, list[Row]] = field(default_factory=dict)
    questions: list[Row] = field(default_factory=list)
    pq: list[Row] = field(default_factory=list)
    hard_train: list[Row] = field(default_factory=list)
    hard_test: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    paused: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.manifest.get("name") or self.path.resolve().name)

    @property
    def config(self) -> Row:
        config = self.manifest.get("config")
        return config if isinstance(config, dict) else {}

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    def _last_by_step(self, kind: str) -> list[Row]:
        by_step = {count(row.get("step")): row for row in self.events.get(kind, [])}
        return [by_step[step] for step in sorted(s for s in by_step if s is not None)]

    @property
    def steps(self) -> list[Row]:
        """The outer step events, the last one of a step that was done again after an interruption."""
        return self._last_by_step("outer_step")

    @property
    def promotions(self) -> list[Row]:
        """One event per promotion, ascending by step."""
        return self._last_by_step("promotion")

    @property
    def arms(self) -> dict[str, Arm]:
        """Arms of the summary; while the run is unfinished, the arms evaluated so far."""
        named = self.summary.get("arms")
        rows = dict(named) if isinstance(named, dict) else {}
        if not rows:
            rows = {str(row.get("arm")): row for row in self.events.get("evaluation", []) if row.get("arm")}
        arms = {name: read_arm(name, row) for name, row in rows.items() if isinstance(row, dict)}
        return {name: arm for name, arm in arms.items() if arm.pass_at}


def number(value: object) -> float | None:
    """`value` as a float, or None for anything else: text, booleans, NaN, and sizes beyond LARGEST."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if abs(result) <= LARGEST else None


def numbers(values: object) -> list[float]:
    """The finite numbers of a list; nothing for anything else."""
    if not isinstance(values, list | tuple):
        return []
    return [x for x in map(number, values) if x is not None]


def count(value: object) -> int | None:
    """`value` as an integer, or None for anything else."""
    result = number(value)
    return int(result) if result is not None else None


def natural(key: object) -> int | None:
    """The number that a JSON key such as "32" spells, or None."""
    text = str(key)
    return int(text) if text.isdecimal() and len(text) <= 9 else None


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, sample standard deviation over sqrt(n); None of fewer than two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    variance = math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def read_arm(name: str, row: Row) -> Arm:
    """One arm from its entry in summary.json or from an evaluation event."""

    def by_k(key: str) -> list[tuple[int, Any]]:
        values = row.get(key)
        entries = values.items() if isinstance(values, dict) else ()
        return sorted((k, value) for text, value in entries if (k := natural(text)))

    bounds = {k: numbers(value) for k, value in by_k("interval_95")}
    return Arm(
        name=name,
        pass_at={k: share for k, value in by_k("pass_at") if (share := number(value)) is not None},
        interval={k: (pair[0], pair[1]) for k, pair in bounds.items() if len(pair) == 2},
        **{key: count(row.get(key)) for key in ("problems", "attempts", "student_rollouts", "search_rollouts")},
    )


def changed_after_run(run_dir: Path, name: str) -> bool:
    """Whether a file of a finished run has another sha256 than the run left it with (`hashes.json`)."""
    recorded = read_object(run_dir / HASHES)[0].get(name) if (run_dir / HASHES).is_file() else None
    return recorded is not None and (run_dir / name).is_file() and sha256_of(run_dir / name) != recorded


def read_run(run_dir: Path) -> Run:
    """Read a run folder. Raises ReportError when it has neither manifest.json nor metrics.jsonl."""
    if not (run_dir / "manifest.json").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise ReportError(
            f"{run_dir}: no run folder: it has neither manifest.json nor metrics.jsonl; "
            "give the folder that `soar run --out` wrote"
        )
    notes: list[str] = []

    def content(name: str) -> Row:
        there = name == "manifest.json" or os.path.lexists(run_dir / name)
        value, remarks = read_object(run_dir / name) if there else ({}, [])
        notes.extend(remarks)
        return value

    def rows(name: str) -> list[Row]:
        lines, remarks = read_jsonl(run_dir / name, name)
        awaited = name not in BEGINS_WITH or os.path.lexists(run_dir / name) or BEGINS_WITH[name] in events
        notes.extend(remarks if awaited else [])
        return lines

    events: dict[str, list[Row]] = {}
    manifest = content("manifest.json")
    for row in rows("metrics.jsonl"):
        events.setdefault(str(row.get("event")), []).append(row)
    return Run(
        path=run_dir,
        manifest=manifest,
        events=events,
        summary=content("summary.json"),
        paused=content(PAUSE_FILE),
        questions=rows("questions.jsonl"),
        pq=rows("pq.jsonl"),
        hard_train=rows("hard/train.jsonl"),
        hard_test=rows("hard/test.jsonl"),
        notes=notes,
    )


def summary_of(rows: Sequence[Row], config: Config, wall_seconds: dict[str, float]) -> Row:
    """The summary of a run with the events `rows`. docs/metrics.md has its fields."""
    steps = [row for row in rows if row["event"] == "outer_step"]
    evaluations = {row["arm"]: row for row in rows if row["event"] == "evaluation"}
    arms = {
        arm: {k: v for k, v in row.items() if k not in ("event", "arm", "correct")} for arm, row in evaluations.items()
    }
    promotions = sum(row["event"] == "promotion" for row in rows)
    for arm, entry in arms.items():
        trained_here = {"pq": not config.arms.pq_from, "teacher_t": not config.arms.teacher_from, "ps_hard": True}
        if trained_here.get("pq" if arm.startswith("pq") else arm):
            entry["search_rollouts"] = steps[-1]["student_rollouts"] if steps else 0
    reference, seed, settings = evaluations.get("hard_only"), seeds.derive(config.seed, "paired"), config.evaluate
    paired = {
        f"{arm} - hard_only": {
            str(k): paired_difference(
                row["correct"], reference["correct"], settings.attempts, k, seed, settings.bootstrap
            )
            for k in settings.ks
        }
        for arm, row in evaluations.items()
        if reference is not None and arm not in ("base", "hard_only")
    }
    return {
        "arms": arms,
        "paired": paired,
        "promotions": promotions,
        "outer_steps": len(steps),
        "loop_end": loop_end(config, len(steps), promotions),
        "seed": config.seed,
        "teacher_rollouts": sum(row["sampled"] for row in steps),
        "wall_seconds": {name: round(seconds, 1) for name, seconds in wall_seconds.items()},
    }


def loop_end(config: Config, steps: int, promotions: int) -> str | None:
    """Which key ends the outer loop after so many steps and promotions; None while it goes on."""
    limit = config.limits.max_promotions
    if limit and promotions >= limit:
        return f"limits.max_promotions = {limit}"
    return f"teacher.steps = {config.teacher.steps}" if steps >= config.teacher.steps else None
