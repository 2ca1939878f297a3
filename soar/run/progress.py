"""Progress on a terminal (bars with a time estimate) or as plain lines where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
        self._owner, self.name, self.total, self.transient = owner, name, max(1, total), transient
        self.done = 0
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first report came, and what a resumed task had by then
        bars = owner.bars
        self._bar = bars.add_task(name, total=self.total) if bars is not None else None

    def __call__(self, items: int) -> None:
        with self._lock:
            self.done += items
            self._show()

    def set(self, done: int, total: int) -> None:
        """Finished items and total, for a task that starts again."""
        with self._lock:
            self.done, self.total = done, max(1, total)
            self._show()

    def _show(self) -> None:
        if self._owner.bars is not None and self._bar is not None:
            self._owner.bars.update(self._bar, completed=self.done, total=self.total)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.done
        started, before = self._first
        if self.transient or now - self._told < PLAIN_SECONDS or self.done == before:
            return
        self._told = now
        left = (now - started) / (self.done - before) * (self.total - self.done)
        self._owner.say(f"{self.name}: {self.done}/{self.total}, about {_clock(left)} left")

    def close(self) -> None:
        if self._owner.bars is not None and self._bar is not None:
            if self.transient:
                self._owner.bars.remove_task(self._bar)
            self._owner.bars.refresh()


class SteadyConsole(Console):
    """A console whose closed pipe ends the output and not the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Bars while `with progress:` is open on a terminal; lines otherwise. `say` prints a line either way, markup off."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or SteadyConsole(stderr=True, highlight=False)
        self.quiet = quiet
        self.bars: Bars | None = None

    @property
    def width(self) -> int:
        """Columns that a line should keep to."""
        return self.console.width if self.console.is_terminal else PLAIN_WIDTH

    def __enter__(self) -> Progress:
        # A dumb terminal cannot move its cursor, so it gets lines as a file does.
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.quiet:
            name, done, left = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
            wide = (name, BarColumn(28), done, TextColumn("took"), TimeElapsedColumn(), TextColumn("left"), left)
            columns = wide if self.console.width >= NARROW else (name, done, left)
            self.bars = Bars(*columns, console=self.console, refresh_per_second=REDRAWS)
            self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars = None

    @contextmanager
    def task(self, name: str, total: int, transient: bool = False) -> Iterator[Task]:
        """A bar, or plain lines with a time estimate every PLAIN_SECONDS."""
        task = Task(self, name, total, transient)
        try:
            yield task
        finally:
            task.close()

    def say(self, line: str) -> None:
        if not self.quiet:
            self.insist(line)

    def insist(self, line: str) -> None:
        """Print a line even when quiet: the answer to what a person did just now."""
        try:
            self.console.print(terminal_text(line, self.console), soft_wrap=True)
        except BrokenPipeError:  # rich before 13.8 does not ask the console
            self.console.quiet = True


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
