"""What is known of a run while it goes, read from its folder as the files grow. Needs no torch.

Nothing is asked of the process that runs: a watcher reads `metrics.jsonl` and `questions.jsonl`, so it can come and go, sit
on another machine with the same disk, and look at a run that ended long ago.

A run as it goes, shown: the lines of `soar run`, and the view that it shares with `soar watch`. Needs no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from soar.files import Row, read_object, visible
from soar.report import text as wording
from soar.report.runs import PAUSE_FILE, count, mean, number, numbers, read_arm, read_run, standard_error
from soar.types import UserError


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


RECENT = 5  # outer steps whose mean time predicts the rest
MAX_TEXT = 300
BARS = "▁▂▃▄▅▆▇█"
ASCII = str.maketrans(
    {"±": "+-", "τ": "tau", "\u2212": "-", "\u2013": "-", "→": ">", "\u00a0": " ", "«": '"', "»": '"'}
)


def one_line(text: object, limit: int = MAX_TEXT) -> str:
    """Text that a model wrote, on one line, controls made visible, at most `limit` characters."""
    shown = " ".join(visible(str(text)[: 4 * limit]).split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def signed(value: object) -> str:
    """`+0.0123`; a dash for what is no number."""
    known = number(value)
    return wording.DASH if known is None else f"{known:+.4f}"


def extremes(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """`best` and `worst` with the first question of the dataset that earned most and least; one row when all earned alike."""
    known = [row for row in rows if number(row.get("reward")) is not None]
    if not known:
        return []
    best = max(known, key=lambda row: number(row.get("reward")) or 0.0)
    worst = min(known, key=lambda row: number(row.get("reward")) or 0.0)
    if best.get("reward") == worst.get("reward"):
        return [("question", best)]
    return [("best", best), ("worst", worst)]


def question_text(row: Row, limit: int = MAX_TEXT) -> str:
    """A question with its answer and its dataset's reward on one line."""
    answer = one_line(row.get("answer", ""), limit // 3)
    return f"{signed(row.get('reward'))}  «{one_line(row.get('question', ''), limit)}» {answer}"


def step_lines(events: Sequence[Row], rows: Sequence[Row] = (), width: int = 118) -> list[str]:
    """One outer step as lines: its figures, its promotion, its alarms, and the best and worst question.

    Figures that find no room in `width` columns go on, indented, in a further line.
    """
    step = events[0]
    rewards = numbers(step.get("reward_G"))
    error = standard_error(rewards)
    spread = "" if error is None else f" ± {error:.4f}"
    vendi = number(step.get("vendi"))
    lines = [f"step {count(step.get('step')) or 0:3d}"]
    for part in (
        f"reward {signed(step.get('reward_mean'))}{spread} (best {signed(max(rewards, default=None))})",
        f"baseline {wording.decimal(step.get('baseline_pass_rate'))}",
        f"accepted {step.get('accepted')}/{step.get('sampled')}",
        f"distinct {number(step.get('distinct_share')) or 0:.2f}",
        *([] if vendi is None else [f"vendi {vendi:.1f}"]),
    ):
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"{'':8s}  {part}")
    lines += [f"  {name:8s} {question_text(row, max(30, width - 30))}" for name, row in extremes(rows)]
    for event in events[1:]:
        if event.get("event") == "promotion":
            lines.append(f"  {promotion_line(event)}")
        elif event.get("event") == "alarm":
            lines.append(f"  alarm: {one_line(event.get('kind'))}: {one_line(event.get('message'))}")
    return lines


def promotion_line(event: Row) -> str:
    """A promotion in words."""
    rates = [wording.decimal(event.get(key)) for key in ("baseline_pass_rate", "pass_rate")]
    return f"promoted dataset {count(event.get('dataset'))}: pass rate {' → '.join(rates)}"


def time_left(seen: Watched) -> float | None:
    """Seconds that the outer loop still needs at the pace of the last steps; None when unknown."""
    taken = numbers([step.get("seconds") for step in seen.steps[-RECENT:]])
    if not taken or seen.total is None or seen.loop_ended:
        return None
    return max(0, seen.total - len(seen.steps)) * (mean(taken) or 0.0)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars between their least and greatest."""
    shown = list(values[-width:])
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def view_rows(seen: Watched, width: int = 80) -> Iterator[tuple[str, str, str]]:
    """The view as (name, text, style), top to bottom."""
    name = one_line(seen.manifest.get("name") or seen.path.resolve().name)
    age = "" if seen.over or seen.age is None else f", last written {wording.duration(seen.age)} ago"
    yield "run", f"{name}: {seen.stage}{age}", "bold"
    if seen.paused:
        yield "paused", one_line(seen.paused.get("reason")), "bold yellow"
        yield "continue", one_line(seen.paused.get("resume")), "yellow"
    if seen.screen:
        hard, tried = wording.whole(seen.screen.get("hard")), wording.whole(seen.screen.get("candidates"))
        yield "hard", f"{hard} of {tried} candidates", ""
    if seen.steps:
        yield from _loop_rows(seen, width)
    for arm, steps in seen.arm_steps.items():
        if arm not in seen.evaluations:
            yield wording.arm_name(arm), f"{wording.plural(steps, 'training step')} done", ""
    for alarm in seen.alarms[-2:]:
        yield "alarm", f"{one_line(alarm.get('kind'))}: {one_line(alarm.get('message'))}", "bold red"
    if len(seen.alarms) > 2:
        yield "alarms", f"{len(seen.alarms)} in all", "red"
    for name, row in seen.evaluations.items():
        result = read_arm(name, row)
        if result.pass_at:
            ks = sorted({min(result.pass_at), max(result.pass_at)})
            shares = ", ".join(f"pass@{k} {wording.with_interval(result, k)}" for k in ks)
            yield wording.arm_name(name), shares, ""
    if seen.finished:
        yield "result", wording.headline(read_run(seen.path)), "bold"


def _loop_rows(seen: Watched, width: int) -> Iterator[tuple[str, str, str]]:
    last, left = seen.steps[-1], time_left(seen)
    done, total = len(seen.steps), seen.total
    ending = f", about {wording.duration(left)} left in the loop" if left and not seen.over else ""
    yield "steps", f"{done}{'' if total is None else f' of {total}'} done{ending}", ""
    rollouts = wording.whole(last.get("student_rollouts"))
    texts = wording.whole(sum(count(step.get("sampled")) or 0 for step in seen.steps))
    spent = wording.duration(sum(numbers([step.get("seconds") for step in seen.steps])))
    yield "cost", f"{rollouts} student rollouts, {texts} teacher texts, {spent}", ""
    rewards = numbers(last.get("reward_G"))
    error = standard_error(rewards)
    tau, window = seen.key("promotion", "tau"), number(last.get("window_mean"))
    parts = [signed(last.get("reward_mean")) + ("" if error is None else f" ± {error:.4f}")]
    parts += [f"window {signed(window)}"] if window is not None else []
    parts += [f"τ {tau:g}"] if tau is not None else []
    yield "reward", ", ".join(parts), "green" if (number(last.get("reward_mean")) or 0) > 0 else ""
    means = numbers([step.get("reward_mean") for step in seen.steps])
    if len(means) > 1:
        bars = sparkline(means, max(8, min(60, width - 30)))
        yield "", f"{bars} {min(means):+.3f} to {max(means):+.3f}", ""
    rates = [wording.decimal(last.get(key)) for key in ("baseline_pass_rate", "best_pass_rate")]
    yield "hard pass", f"baseline {rates[0]}, best student {rates[1]}", ""
    inner = [last.get(key) for key in ("student_first", "student_last")]
    if all(isinstance(part, dict) for part in inner):
        own = [wording.decimal(part.get("pass_rate")) for part in inner if isinstance(part, dict)]
        mixed = wording.decimal(inner[1].get("frac_mixed")) if isinstance(inner[1], dict) else wording.DASH
        yield "own pass", f"{own[0]} → {own[1]}, mixed groups {mixed}", ""
    if seen.promotions:
        event = seen.promotions[-1]
        rise = f"{wording.decimal(event.get('baseline_pass_rate'))} → {wording.decimal(event.get('pass_rate'))}"
        text = f"{len(seen.promotions)}, the last in step {count(event.get('step')) or 0}: {rise}"
        yield "promoted", text, "green"
    else:
        yield "promoted", "none yet" if not seen.finished else "none", ""
    for label, row in extremes(seen.questions):
        yield label, question_text(row), ""


def view(seen: Watched, width: int = 80, ascii_only: bool = False) -> RenderableType:
    """The view as a table of two columns that wraps at any width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text, style in view_rows(seen, width):
        table.add_row(Text(plain(name, ascii_only)), Text(plain(text, ascii_only), style=style))
    return table


def plain(text: str, ascii_only: bool) -> str:
    """The text as it is, or in ASCII with escapes for terminals that know nothing else."""
    if not ascii_only:
        return text
    known = text.translate(ASCII).translate({ord(bar): "_.-=+*#@"[i] for i, bar in enumerate(BARS)})
    return known.encode("ascii", "backslashreplace").decode()


def own_view(path: Path, console: Console) -> Callable[[], RenderableType]:
    """The view of a run for the terminal that it runs in; gives what was last known when a file cannot be read.

    Raises ReportError when `path` holds no run.
    """
    watcher = Watcher(path)
    shown: RenderableType = Text()

    def current() -> RenderableType:
        nonlocal shown
        try:
            watcher.update()
            watcher.seen.age = None  # the bars say that the run goes on
            shown = view(watcher.seen, console.width, console.options.ascii_only)
        except (OSError, UserError):
            return shown  # a view is never worth a run
        return shown

    return current


def follow(path: Path, console: Console, every: float = 2.0, once: bool = False) -> None:
    """Show a run until it is finished or paused: a live view on a terminal, elsewhere the view, then a line per event.

    Raises ReportError when `path` holds no run.
    """
    watcher = Watcher(path)
    watcher.update()
    ascii_only = console.options.ascii_only

    def current() -> RenderableType:
        return view(watcher.seen, console.width, ascii_only)

    if once or watcher.seen.over:
        console.print(current())
        return
    if console.is_terminal:
        from rich.live import Live

        with Live(current(), console=console, auto_refresh=False) as live:
            while not watcher.seen.over:
                time.sleep(every)
                watcher.update()
                live.update(current(), refresh=True)
        return
    console.print(current())
    while not watcher.seen.over:
        time.sleep(every)
        for line in event_lines(watcher.update(), watcher.seen.questions):
            console.print(Text(plain(line, ascii_only)), soft_wrap=True)
    console.print(current())


def event_lines(events: Sequence[Row], questions: Sequence[Row]) -> list[str]:
    """New events as lines: steps with what belongs to them, evaluations and other alarms; steps of arms are left out."""
    lines: list[str] = []
    group: list[Row] = []
    for event in [*events, {"event": None}]:
        kind = event.get("event")
        if group and not (kind in ("promotion", "alarm") and event.get("step") == group[0].get("step")):
            mine = [row for row in questions if row.get("step") == group[0].get("step")]
            lines += step_lines(group, mine)
            group = []
        if kind == "outer_step" or group:
            group.append(event)
        elif kind == "promotion":  # one that was held for a review, or came after its step had been shown
            lines.append(f"step {count(event.get('step')) or 0:3d}  {promotion_line(event)}")
        elif kind == "review":
            decided = f"{one_line(event.get('decision'))} by {one_line(event.get('by'))}"
            lines.append(f"step {count(event.get('step')) or 0:3d}  promotion {decided}")
        elif kind == "alarm":
            lines.append(f"alarm: {one_line(event.get('kind'))}: {one_line(event.get('message'))}")
        elif kind == "evaluation":
            shares: Any = event.get("pass_at")
            text = (
                ", ".join(f"pass@{k} {wording.decimal(v)}" for k, v in shares.items())
                if isinstance(shares, dict)
                else ""
            )
            lines.append(f"evaluated {one_line(event.get('arm'))}: {one_line(text)}")
    return lines
