"""A run as it goes: the lines of `soar run`, and the view that it shares with `soar watch`. Needs no torch.

Nothing is asked of the process that runs: a watcher reads `metrics.jsonl` and `questions.jsonl` as they grow, so it can come
and go, sit on another machine with the same disk, and look at a run that ended long ago.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from soar.files import Row, read_object, visible
from soar.report import text as wording
from soar.report.runs import PAUSE_FILE, Run, count, mean, number, numbers, read_arm, read_run, standard_error
from soar.types import UserError

RECENT = 5  # outer steps whose mean time predicts the rest
MAX_TEXT = 300
BARS = "▁▂▃▄▅▆▇█"
ASCII = dict(
    zip("±τ\u2212\u2013→\u00a0«»…" + BARS, ["+-", "tau", *"-->", " ", '"', '"', "...", *"_.-=+*#@"], strict=True)
)


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


class Watcher:
    """A run that is kept up to date. Raises ReportError when the folder holds none.

    run: its events but those of the arms' steps, and the questions of its last outer step. arm_steps: arm -> steps.
    age: seconds since metrics.jsonl was written.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "manifest.json").is_file():
            read_run(path)
        self.run, self.arm_steps, self.age = Run(path), Counter[str](), 0.0
        self._metrics, self._questions = Tail(path / "metrics.jsonl"), Tail(path / "questions.jsonl")

    def update(self) -> list[Row]:
        """Read what is new; returns the new events."""
        path, events, questions = self.run.path, self.run.events, self.run.questions
        manifest = self.run.manifest or read_object(path / "manifest.json")[0]
        # Looked at before the events: a run that is over has written them all.
        ended = (path / "summary.json").is_file()
        summary = (read_object(path / "summary.json")[0] or {"arms": {}}) if ended else {}
        paused = read_object(path / PAUSE_FILE)[0] if not ended and (path / PAUSE_FILE).is_file() else {}
        new, again = self._metrics.new()
        if again:
            events, questions, self.arm_steps = {}, [], Counter()
        for event in new:
            if event.get("event") == "arm_step":
                self.arm_steps[str(event.get("arm"))] += 1
            else:
                events.setdefault(str(event.get("event")), []).append(event)
        rows, _ = self._questions.new()
        last = max((step for row in rows if (step := count(row.get("step"))) is not None), default=None)
        if last is not None:
            questions = [row for row in rows if count(row.get("step")) == last]
        self.run = Run(path, manifest, summary, events, questions, paused=paused)
        if (path / "metrics.jsonl").is_file():
            self.age = max(0.0, time.time() - (path / "metrics.jsonl").stat().st_mtime)
        return new

    def key(self, section: str, name: str) -> float | None:
        """A number of the recorded config, None where it has none."""
        part = self.run.config.get(section)
        return number(part.get(name)) if isinstance(part, dict) else None

    @property
    def over(self) -> bool:
        """Whether nothing more will come: the run is finished, or a person has to continue it."""
        return self.run.finished or bool(self.run.paused)

    @property
    def loop_ended(self) -> bool:
        """Whether the outer loop has made its steps or its promotions (`runs.loop_end`)."""
        total, most = self.key("teacher", "steps"), self.key("limits", "max_promotions")
        steps_done = total is not None and len(self.run.steps) >= total
        return steps_done or bool(most and len(self.run.promotions) >= most)

    @property
    def stage(self) -> str:
        """What the run is doing, by its latest events."""
        if self.run.finished:
            return "finished"
        if "evaluation" in self.run.events or self.loop_ended:
            return "evaluation" if "evaluation" in self.run.events else "arms and evaluation"
        return "outer loop" if "screen" in self.run.events else "screening"

    @property
    def time_left(self) -> float | None:
        """Seconds that the outer loop still needs at the pace of the last steps; None when unknown or over."""
        steps, total = self.run.steps, self.key("teacher", "steps")
        pace = mean(numbers([step.get("seconds") for step in steps[-RECENT:]]))
        return None if pace is None or total is None or self.loop_ended or self.over else pace * (total - len(steps))


def one_line(text: object, limit: int = MAX_TEXT) -> str:
    """Text that a model wrote, on one line, controls made visible, at most `limit` characters."""
    shown = " ".join(visible(str(text)[: 4 * limit]).split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def signed(value: object) -> str:
    """`+0.0123`; a dash for what is no number."""
    size = number(value)
    return wording.DASH if size is None else f"{size:+.4f}"


def extremes(rows: Sequence[Row], limit: int = MAX_TEXT) -> list[tuple[str, str]]:
    """`best` and `worst` with the first question of the dataset that earned most and least; one when all earned alike."""
    rewarded = [row for row in rows if number(row.get("reward")) is not None]
    if not rewarded:
        return []
    best, worst = (pick(rewarded, key=lambda row: row["reward"]) for pick in (max, min))
    texts = []
    for row in (best, worst):
        question, answer = one_line(row.get("question", ""), limit), one_line(row.get("answer", ""), limit // 3)
        texts.append(f"{signed(row['reward'])}  «{question}» {answer}")
    alike = best["reward"] == worst["reward"]
    return [("question", texts[0])] if alike else [("best", texts[0]), ("worst", texts[1])]


def step_lines(events: Sequence[Row], rows: Sequence[Row] = (), width: int = 118) -> list[str]:
    """One outer step as lines: its figures, its promotion, its alarms, and the best and worst question, cut to `width`."""
    step = events[0]
    vendi, best = number(step.get("vendi")), max(numbers(step.get("reward_G")), default=None)
    figures = [
        f"step {count(step.get('step')) or 0:3d}",
        f"reward {_mean_reward(step)} (best {signed(best)})",
        f"baseline {wording.decimal(step.get('baseline_pass_rate'))}",
        f"accepted {step.get('accepted')}/{step.get('sampled')}",
        f"distinct {number(step.get('distinct_share')) or 0:.2f}",
        *([] if vendi is None else [f"vendi {vendi:.1f}"]),
    ]
    lines = ["  ".join(figures)]
    lines += [f"  {name:8s} {text}" for name, text in extremes(rows, max(30, width - 30))]
    return lines + [f"  {_event_text(event)}" for event in events[1:] if event.get("event") in ("promotion", "alarm")]


def _mean_reward(step: Row) -> str:
    error = standard_error(numbers(step.get("reward_G")))
    return signed(step.get("reward_mean")) + ("" if error is None else f" ± {error:.4f}")


def _event_text(event: Row) -> str:
    """A promotion, a review, an evaluation or an alarm in words; nothing for any other event."""
    kind = event.get("event")
    if kind == "promotion":
        rates = [wording.decimal(event.get(key)) for key in ("baseline_pass_rate", "pass_rate")]
        return f"promoted dataset {count(event.get('dataset'))}: pass rate {' → '.join(rates)}"
    if kind == "review":
        return f"promotion {one_line(event.get('decision'))} by {one_line(event.get('by'))}"
    if kind == "alarm":
        return f"alarm: {one_line(event.get('kind'))}: {one_line(event.get('message'))}"
    if kind == "evaluation":
        shares = read_arm("", event).pass_at.items()
        return f"evaluated {one_line(event.get('arm'))}: {', '.join(f'pass@{k} {v:.4f}' for k, v in shares)}"
    return ""


def event_lines(events: Sequence[Row], questions: Sequence[Row]) -> list[str]:
    """New events as lines: steps with what belongs to them, evaluations and other alarms; steps of arms are left out."""
    lines: list[str] = []
    group: list[Row] = []
    for event in [*events, {"event": None}]:
        kind = event.get("event")
        if group and not (kind in ("promotion", "alarm") and event.get("step") == group[0].get("step")):
            lines += step_lines(group, [row for row in questions if row.get("step") == group[0].get("step")])
            group = []
        if kind == "outer_step" or group:
            group.append(event)
        elif text := _event_text(event):  # a promotion that was held for a review names its step
            step = f"step {count(event.get('step')) or 0:3d}  " if kind in ("promotion", "review") else ""
            lines.append(step + text)
    return lines


def view_rows(watcher: Watcher, width: int = 80) -> Iterator[tuple[str, str, str]]:
    """The view as (name, text, style), top to bottom."""
    run = watcher.run
    age = "" if watcher.over or not watcher.age else f", last written {wording.duration(watcher.age)} ago"
    yield "run", f"{one_line(run.name)}: {watcher.stage}{age}", "bold"
    if run.paused:
        yield "paused", one_line(run.paused.get("reason")), "bold yellow"
        yield "continue", one_line(run.paused.get("resume")), "yellow"
    for screen in run.events.get("screen", [])[-1:]:
        yield "hard", f"{wording.whole(screen.get('hard'))} of {wording.whole(screen.get('candidates'))} candidates", ""
    if run.steps:
        yield from _loop_rows(watcher, width)
    alarms, evaluations = run.events.get("alarm", []), run.events.get("evaluation", [])
    measured = {str(event.get("arm")): read_arm(str(event.get("arm")), event) for event in evaluations}
    for arm, steps in watcher.arm_steps.items():
        if arm not in measured:
            yield wording.arm_name(arm), f"{wording.plural(steps, 'training step')} done", ""
    for alarm in alarms[-2:]:
        yield "alarm", _event_text(alarm).removeprefix("alarm: "), "bold red"
    for result in measured.values():
        ks = sorted(result.pass_at)
        shares = ", ".join(f"pass@{k} {wording.with_interval(result, k)}" for k in dict.fromkeys(ks[:1] + ks[-1:]))
        yield wording.arm_name(result.name), shares, ""
    if run.finished:
        yield "result", wording.headline(run), "bold"


def _loop_rows(watcher: Watcher, width: int) -> Iterator[tuple[str, str, str]]:
    run, total, left = watcher.run, watcher.key("teacher", "steps"), watcher.time_left
    last = run.steps[-1]
    ending = f", about {wording.duration(left)} left in the loop" if left else ""
    yield "steps", f"{len(run.steps)}{'' if total is None else f' of {total:.0f}'} done{ending}", ""
    texts = wording.whole(sum(numbers([step.get("sampled") for step in run.steps])))
    spent = wording.duration(sum(numbers([step.get("seconds") for step in run.steps])))
    yield "cost", f"{wording.whole(last.get('student_rollouts'))} student rollouts, {texts} teacher texts, {spent}", ""
    tau, window = watcher.key("promotion", "tau"), number(last.get("window_mean"))
    parts = [_mean_reward(last), *([] if window is None else [f"window {signed(window)}"])]
    parts += [] if tau is None else [f"τ {tau:g}"]
    yield "reward", ", ".join(parts), "green" if (number(last.get("reward_mean")) or 0) > 0 else ""
    means = numbers([step.get("reward_mean") for step in run.steps])
    if len(means) > 1:
        low, high = min(means), max(means)
        scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
        bars = "".join(BARS[round((value - low) * scale)] for value in means[-max(8, min(60, width - 30)) :])
        yield "", f"{bars} {low:+.3f} to {high:+.3f}", ""
    rates = [wording.decimal(last.get(key)) for key in ("baseline_pass_rate", "best_pass_rate")]
    yield "hard pass", f"baseline {rates[0]}, best student {rates[1]}", ""
    first, end = last.get("student_first"), last.get("student_last")
    if isinstance(first, dict) and isinstance(end, dict):
        rates = [
            wording.decimal(value) for value in (first.get("pass_rate"), end.get("pass_rate"), end.get("frac_mixed"))
        ]
        yield "own pass", f"{rates[0]} → {rates[1]}, mixed groups {rates[2]}", ""
    if run.promotions:
        event = run.promotions[-1]
        rise = " → ".join(wording.decimal(event.get(key)) for key in ("baseline_pass_rate", "pass_rate"))
        text = f"{len(run.promotions)}, the last in step {count(event.get('step')) or 0}: {rise}"
        yield "promoted", text, "green"
    else:
        yield "promoted", "none" if run.finished else "none yet", ""
    for name, text in extremes(run.questions):
        yield name, text, ""


def _shown(text: str, console: Console, style: str = "") -> Text:
    """The text as it is, or in ASCII with escapes for terminals that know nothing else."""
    if console.options.ascii_only:
        text = "".join(ASCII.get(c, c) for c in text).encode("ascii", "backslashreplace").decode()
    return Text(text, style=style)


def view(watcher: Watcher, console: Console) -> RenderableType:
    """The view as a table of two columns that wraps at any width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text, style in view_rows(watcher, console.width):
        table.add_row(_shown(name, console), _shown(text, console, style))
    return table


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
            watcher.age = 0.0  # the bars say that the run goes on
            shown = view(watcher, console)
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
    if once or watcher.over:
        console.print(view(watcher, console))
    elif console.is_terminal:
        with Live(view(watcher, console), console=console, auto_refresh=False) as live:
            while not watcher.over:
                time.sleep(every)
                watcher.update()
                live.update(view(watcher, console), refresh=True)
    else:
        console.print(view(watcher, console))
        while not watcher.over:
            time.sleep(every)
            for line in event_lines(watcher.update(), watcher.run.questions):
                console.print(_shown(line, console), soft_wrap=True)
        console.print(view(watcher, console))
