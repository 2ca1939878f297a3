"""What is known of a run while it goes, read from its folder as the files grow. Needs no torch.

Nothing is asked of the process that runs: a watcher reads `metrics.jsonl` and `questions.jsonl`, so it can come and go, sit
on another machine with the same disk, and look at a run that ended long ago.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from soar.runs import PAUSE_FILE, Row, count, number, read_object, read_run


class Tail:
    """The rows of a JSONL file as they are added. A file that became shorter (a resumed run) is read again from its start."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def new(self) -> tuple[list[Row], bool]:
        """Rows since the last call, and whether everything before must be forgotten. Half a last line waits."""
        if not self.path.is_file():
            return [], False
        size = self.path.stat().st_size
        again = size < self.offset
        self.offset = 0 if again else self.offset
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(size - self.offset)
        whole = content.rfind(b"\n") + 1
        self.offset += whole
        rows = []
        for line in content[:whole].split(b"\n"):
            try:
                row = json.loads(line.decode("utf-8", errors="surrogateescape")) if line.strip() else None
            except (ValueError, RecursionError):
                row = None  # the report names lines that cannot be read
            if isinstance(row, dict):
                rows.append(row)
        return rows, again


@dataclass
class Watched:
    """What is known of a run: its config, all events but the arms' steps, and the questions of the last outer step."""

    path: Path
    manifest: Row = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    promotions: list[Row] = field(default_factory=list)
    alarms: list[Row] = field(default_factory=list)
    screen: Row = field(default_factory=dict)
    arm_steps: dict[str, int] = field(default_factory=dict)
    evaluations: dict[str, Row] = field(default_factory=dict)
    questions: list[Row] = field(default_factory=list)
    finished: bool = False
    paused: Row = field(default_factory=dict)  # reason and command to continue of a run that stopped at a safe point
    age: float | None = None  # seconds since metrics.jsonl was written

    def key(self, section: str, name: str) -> float | None:
        """A number of the recorded config, None where it has none."""
        config = self.manifest.get("config")
        part = config.get(section) if isinstance(config, dict) else None
        return number(part.get(name)) if isinstance(part, dict) else None

    @property
    def total(self) -> int | None:
        return count(self.key("teacher", "steps"))

    @property
    def loop_ended(self) -> bool:
        """Whether the outer loop has made its steps or its promotions (`summary.loop_end`)."""
        most = self.key("limits", "max_promotions")
        steps_done = self.total is not None and len(self.steps) >= self.total
        return steps_done or bool(most and len(self.promotions) >= most)

    @property
    def over(self) -> bool:
        """Whether nothing more will come: the run is finished, or a person has to continue it."""
        return self.finished or bool(self.paused)

    @property
    def stage(self) -> str:
        if self.finished:
            return "finished"
        if self.evaluations:
            return "evaluation"
        if self.loop_ended:
            return "arms and evaluation"
        return "outer loop" if self.screen else "screening"


class Watcher:
    """Keeps a `Watched` up to date. Raises ReportError when the folder holds no run."""

    def __init__(self, path: Path) -> None:
        if not (path / "manifest.json").is_file():
            read_run(path)
        self.seen = Watched(path)
        self._metrics, self._questions = Tail(path / "metrics.jsonl"), Tail(path / "questions.jsonl")

    def update(self) -> list[Row]:
        """Read what is new; returns the new events."""
        seen = self.seen
        if not seen.manifest:
            seen.manifest, _ = read_object(seen.path / "manifest.json")
        # Looked at before the events: a run that is over has written them all.
        finished = (seen.path / "summary.json").is_file()
        paused = not finished and (seen.path / PAUSE_FILE).is_file()
        events, again = self._metrics.new()
        if again:
            self.seen = seen = Watched(seen.path, seen.manifest)
        for event in events:
            self._take(event)
        rows, _ = self._questions.new()
        last = max((step for row in rows if (step := count(row.get("step"))) is not None), default=None)
        if last is not None:
            seen.questions = [row for row in rows if count(row.get("step")) == last]
        seen.finished = finished
        seen.paused = read_object(seen.path / PAUSE_FILE)[0] if paused else {}
        if (seen.path / "metrics.jsonl").is_file():
            seen.age = max(0.0, time.time() - (seen.path / "metrics.jsonl").stat().st_mtime)
        return events

    def _take(self, event: Row) -> None:
        seen, kind = self.seen, event.get("event")
        if kind == "screen":
            seen.screen = event
        elif kind == "arm_step":
            arm = str(event.get("arm"))
            seen.arm_steps[arm] = seen.arm_steps.get(arm, 0) + 1
        elif kind == "evaluation":
            seen.evaluations[str(event.get("arm"))] = event
        elif kind in ("outer_step", "promotion", "alarm"):
            {"outer_step": seen.steps, "promotion": seen.promotions, "alarm": seen.alarms}[str(kind)].append(event)
