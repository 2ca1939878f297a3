"""A run as it goes: the lines of `soar run`, and the view that it shares with `soar watch`. Needs no torch.

Nothing is asked of the process that runs: its folder is read again and again, so a watcher can come and go, sit on another
machine with the same disk, and look at a run that ended long ago. What a model or a foreign folder says stays as it is until
`terminal_text`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from soar.files import Row, visible
from soar.report import text as wording
from soar.report.runs import Run, count, mean, number, numbers, read_run, standard_error
from soar.types import UserError

RECENT = 5  # outer steps whose mean time predicts the rest
MAX_TEXT = 300
ASCII = dict(zip("±τ−–→\u00a0«»…⟨⟩", ["+-", "tau", *"-->", " ", '"', '"', "...", *"<>"], strict=True))


def terminal_text(text: str, console: Console, style: str = "") -> Text:
    """The one place where text meets a terminal: what could move its cursor, reorder or hide text is made visible.

    On terminals that know ASCII alone everything else is escaped.
    """
    text = visible(text)
    if console.options.ascii_only:
        text = "".join(ASCII.get(c, c) for c in text).encode("ascii", "backslashreplace").decode()
    return Text(text, style=style)


class Watcher:
    """A run that is kept up to date, with at most a fiftieth of the time spent on reading."""

    def __init__(self, path: Path) -> None:
        self.path, self._due = path, 0.0
        self.run = Run(path)

    def update(self) -> Run:
        """The run as its files say now, or as they said a moment ago. Raises ReportError for no run."""
        began = time.monotonic()
        if began >= self._due:
            self.run = read_run(self.path)
            self._due = time.monotonic() + 50 * (time.monotonic() - began)
        return self.run


def over(run: Run) -> bool:
    """Whether nothing more will come: the run is finished, or a person has to continue it."""
    return run.finished or bool(run.paused)


def loop_ended(run: Run) -> bool:
    """Whether the outer loop has made its steps or its promotions (`runs.loop_end`)."""
    total, most = run.setting("teacher", "steps"), run.setting("limits", "max_promotions")
    return (total is not None and len(run.steps) >= total) or bool(most and len(run.promotions) >= most)


def stage(run: Run) -> str:
    """What the run is doing, by its latest events."""
    if run.finished or "evaluation" in run.events:
        return "finished" if run.finished else "evaluation"
    return "arms and evaluation" if loop_ended(run) else "outer loop" if "screen" in run.events else "screening"


def time_left(run: Run) -> float | None:
    """Seconds that the outer loop still needs at the pace of the last steps; None when unknown or over."""
    total, pace = run.setting("teacher", "steps"), mean(numbers([step.get("seconds") for step in run.steps[-RECENT:]]))
    return None if pace is None or total is None or loop_ended(run) or over(run) else pace * (total - len(run.steps))


def one_line(text: object, limit: int = MAX_TEXT) -> str:
    """Text that a model wrote, on one line, at most `limit` characters."""
    shown = " ".join(str(text)[: 4 * limit].split())
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
    texts = [
        f"{signed(row['reward'])}  «{one_line(row.get('question', ''), limit)}» "
        f"{one_line(row.get('answer', ''), limit // 3)}"
        for row in (best, worst)
    ]
    alike = best["reward"] == worst["reward"]
    return [("question", texts[0])] if alike else [("best", texts[0]), ("worst", texts[1])]


def step_lines(events: Sequence[Row], rows: Sequence[Row] = (), width: int = 118) -> list[str]:
    """One outer step as lines: its figures, the best and worst question, cut to `width`, its promotion, its alarms."""
    step = events[0]
    vendi, best = number(step.get("vendi")), max(numbers(step.get("reward_G")), default=None)
    figures = [
        f"step {count(step.get('step')) or 0:3d}",
        f"reward {_mean_reward(step)} (best {signed(best)})",
        f"baseline {wording.decimal(step.get('baseline_pass_rate'))}",
        f"accepted {wording.whole(step.get('accepted'))}/{wording.whole(step.get('sampled'))}",
        f"distinct {number(step.get('distinct_share')) or 0:.2f}",
        *([] if vendi is None else [f"as diverse as {vendi:.1f}"]),
    ]
    lines = ["  ".join(figures)]
    lines += [f"  {name:8s} {text}" for name, text in extremes(rows, max(30, width - 30))]
    return lines + [f"  {_event_text(event)}" for event in events[1:] if event.get("event") in ("promotion", "alarm")]


def _mean_reward(step: Row) -> str:
    error = standard_error(numbers(step.get("reward_G")))
    return signed(step.get("reward_mean")) + ("" if error is None else f" ± {error:.4f}")


def _event_text(event: Row) -> str:
    """A promotion or an alarm in words; nothing for any other event."""
    kind = event.get("event")
    if kind == "promotion":
        rates = [wording.decimal(event.get(key)) for key in ("baseline_pass_rate", "pass_rate")]
        return f"promoted dataset {count(event.get('dataset'))}: pass rate {' → '.join(rates)}"
    if kind == "alarm":
        return f"alarm: {one_line(event.get('kind'))}: {one_line(event.get('message'))}"
    return ""


def view_rows(run: Run, age: float = 0.0) -> Iterator[tuple[str, str, str]]:
    """The view as (name, text, style), top to bottom. age: seconds since metrics.jsonl was written, 0: not shown."""
    written = f", last written {wording.duration(age)} ago" if age and not over(run) else ""
    yield "run", f"{one_line(run.name)}: {stage(run)}{written}", "bold"
    if run.paused and not run.finished:
        yield "paused", one_line(run.paused.get("reason")), "bold yellow"
        yield "continue", one_line(run.paused.get("resume")), "yellow"
    for screen in run.events.get("screen", [])[-1:]:
        yield "hard", f"{wording.whole(screen.get('hard'))} of {wording.whole(screen.get('candidates'))} candidates", ""
    if run.steps:
        yield from _loop_rows(run)
    for arm, steps in Counter(str(event.get("arm")) for event in run.events.get("arm_step", [])).items():
        if arm not in run.arms:
            yield one_line(wording.arm_name(arm)), f"{wording.plural(steps, 'training step')} done", ""
    for alarm in run.events.get("alarm", [])[-2:]:
        yield "alarm", _event_text(alarm).removeprefix("alarm: "), "bold red"
    for name, measured in run.arms.items():
        ks = sorted(measured.pass_at)
        shares = ", ".join(f"pass@{k} {wording.with_interval(measured, k)}" for k in dict.fromkeys(ks[:1] + ks[-1:]))
        yield one_line(wording.arm_name(name)), shares, ""
    if run.finished:
        yield "result", wording.headline(run), "bold"


def _loop_rows(run: Run) -> Iterator[tuple[str, str, str]]:
    total, left, last = run.setting("teacher", "steps"), time_left(run), run.steps[-1]
    ending = f", about {wording.duration(left)} left in the loop" if left else ""
    yield "steps", f"{len(run.steps)}{'' if total is None else f' of {total:.0f}'} done{ending}", ""
    texts, spent = (sum(numbers([step.get(key) for step in run.steps])) for key in ("sampled", "seconds"))
    cost = f"{wording.whole(last.get('student_rollouts'))} student rollouts, {wording.whole(texts)} teacher texts"
    yield "cost", f"{cost}, {wording.duration(spent)}", ""
    tau, window = run.setting("promotion", "tau"), number(last.get("window_mean"))
    mean_of = "" if window is None else f", {signed(window)} over the window"
    above = "" if tau is None else f"; promotion above {tau:g} (τ)"
    yield (
        "reward",
        f"{_mean_reward(last)}{mean_of}{above}",
        "green" if (number(last.get("reward_mean")) or 0) > 0 else "",
    )
    rates = [wording.decimal(last.get(key)) for key in ("baseline_pass_rate", "best_pass_rate")]
    yield "hard ones", f"solved by the baseline {rates[0]}, by the best student {rates[1]}", ""
    first, end = last.get("student_first"), last.get("student_last")
    if isinstance(first, dict) and isinstance(end, dict):
        rates = [wording.decimal(part.get("pass_rate")) for part in (first, end)]
        mixed = wording.decimal(end.get("frac_mixed"))
        yield "questions", f"solved {rates[0]} → {rates[1]} in training, {mixed} of the groups right and wrong", ""
    if run.promotions:
        event = run.promotions[-1]
        rise = " → ".join(wording.decimal(event.get(key)) for key in ("baseline_pass_rate", "pass_rate"))
        yield "promoted", f"{len(run.promotions)}, the last in step {count(event.get('step')) or 0}: {rise}", "green"
    else:
        yield "promoted", "none" if run.finished else "none yet", ""
    newest = max((step for row in run.questions if (step := count(row.get("step"))) is not None), default=None)
    questions = [row for row in run.questions if count(row.get("step")) == newest]
    yield from ((name, text, "") for name, text in extremes(questions))


def view(run: Run, console: Console, age: float = 0.0) -> RenderableType:
    """The view as a table of two columns that wraps at any width."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text, style in view_rows(run, age):
        table.add_row(terminal_text(name, console), terminal_text(text, console, style))
    return table


def own_view(path: Path, console: Console) -> Callable[[], RenderableType]:
    """The view of a run for the terminal that it runs in; what was last known when a file cannot be read."""
    watcher = Watcher(path)

    def current() -> RenderableType:
        with suppress(OSError, UserError):  # a view is never worth a run
            watcher.update()
        return view(watcher.run, console)

    return current


def follow(path: Path, console: Console, every: float = 2.0, once: bool = False) -> None:
    """Show a run until it is finished or paused: a live view on a terminal, elsewhere the view now and at the end.

    Raises ReportError when `path` holds no run.
    """
    watcher, metrics = Watcher(path), path / "metrics.jsonl"

    def current() -> RenderableType:
        age = max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else 0.0
        return view(watcher.update(), console, age)

    if not console.is_terminal and not once:
        console.print(current())
    with Live(current(), console=console, auto_refresh=False) as live:
        live.refresh()
        while not (once or over(watcher.run)):
            time.sleep(every)
            live.update(current(), refresh=True)
