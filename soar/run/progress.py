"""Progress on a terminal (bars with a time estimate) or as plain lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from soar.report.watch import terminal_text

PLAIN_SECONDS = 20.0  # a plain progress line at most this often
PLAIN_WIDTH = 118  # columns of a line where no terminal says how wide it is
REDRAWS = 2  # a second: often enough for bars, and cheap beside training on the same cores
NARROW = 60  # columns below which a bar would leave no room for its numbers


class Task:
    """One bar. Call it with the number of finished items, or `set` it; safe from several threads."""

    def __init__(self, owner: Progress, name: str, total: int, transient: bool) -> None:
        self._owner, self._transient, self._told = owner, transient, time.monotonic()
        self.bar = owner.bars.add_task(name, total=max(1, total))

    def __call__(self, items: int) -> None:
        self._show(advance=items)

    def set(self, done: int, total: int) -> None:
        """Finished items and total, for a task that starts again."""
        self._show(completed=done, total=max(1, total))

    def _show(self, **change: float) -> None:
        bars, now = self._owner.bars, time.monotonic()
        bars.update(self.bar, **change)  # type: ignore[arg-type]
        task = next(task for task in bars.tasks if task.id == self.bar)
        if bars.live.is_started or self._transient or now - self._told < PLAIN_SECONDS or not task.speed:
            return
        self._told, left = now, timedelta(seconds=round(task.remaining / task.speed))  # type: ignore[operator]
        self._owner.say(f"{task.description}: {task.completed:g}/{task.total:g}, about {left} left")


class SteadyConsole(Console):
    """A console whose closed pipe ends the output and not the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Bars while `with progress:` is open on a terminal; lines otherwise. `say` prints a line either way, markup off."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or SteadyConsole(stderr=True, highlight=False)
        self.quiet = quiet
        name, done, left = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
        wide = (name, BarColumn(28), done, TextColumn("took"), TimeElapsedColumn(), TextColumn("left"), left)
        self.bars = Bars(
            *(wide if self.console.width >= NARROW else (name, done, left)),
            console=self.console,
            refresh_per_second=REDRAWS,
            speed_estimate_period=1e9,  # a step may take minutes
            get_time=lambda: time.monotonic(),
        )

    @property
    def width(self) -> int:
        """Columns that a line should keep to."""
        return self.console.width if self.console.is_terminal else PLAIN_WIDTH

    def __enter__(self) -> Progress:
        # A dumb terminal cannot move its cursor, so it gets lines as a file does.
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.quiet:
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars.live.is_started:
            self.bars.stop()

    @contextmanager
    def task(self, name: str, total: int, transient: bool = False) -> Iterator[Task]:
        """A bar, or plain lines with a time estimate every PLAIN_SECONDS."""
        task = Task(self, name, total, transient)
        try:
            yield task
        finally:
            self.bars.remove_task(task.bar) if transient else self.bars.refresh()

    def say(self, line: str) -> None:
        if not self.quiet:
            self.insist(line)

    def insist(self, line: str) -> None:
        """Print a line even when quiet: the answer to what a person did just now."""
        try:
            self.console.print(terminal_text(line, self.console), soft_wrap=True)
        except BrokenPipeError:  # rich before 13.8 does not ask the console
            self.console.quiet = True
