"""Progress on a terminal (bars with a time estimate) or as plain lines where there is none; never silent for long."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from soar.files import write_json
from soar.report.watch import terminal_text

PLAIN_SECONDS = 8.0  # of silence, after which a plain output says again what is going on ...
PATIENCE = 0.01  # ... or this share of the time so far, so that it does not fill the log of a day
NOTE_SECONDS = 5.0  # from one note of where a run is to the next, for those who watch it
PLAIN_WIDTH = 118  # columns of a line where no terminal says how wide it is
REDRAWS = 2  # a second: often enough for bars, and cheap beside training on the same cores
NARROW = 60  # columns below which a bar would leave no room for its numbers


class SteadyConsole(Console):
    """A console whose closed pipe ends the output and not the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Progress:
    """Bars while `with progress:` is open on a terminal; lines otherwise. `say` prints a line either way, markup off.
    what: is done from the start on (`now`). plan: tasks of a whole run in order -> expected seconds, right in proportion
    alone. file: where it notes how far it is.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False, what: str = "") -> None:
        self.console = console or SteadyConsole(stderr=True, highlight=False)
        self.quiet, self.plan, self.file = quiet, dict[str, float](), Path()
        self._pace = 0.0  # seconds of the latest task of the plan, for one that was expected
        self._began = self._said = self._noted = time.monotonic()
        self._over, self._lock = threading.Event(), threading.RLock()
        name = TextColumn("{task.description}{task.fields[run]}")
        done, left = MofNCompleteColumn(), TimeRemainingColumn()
        wide = (name, BarColumn(28), done, TextColumn("took"), TimeElapsedColumn(), TextColumn("left"), left)
        self.bars = Bars(
            *(wide if self.console.width >= NARROW else (name, done, left)),
            console=self.console,
            refresh_per_second=REDRAWS,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # a result into a file or pipe goes there
            speed_estimate_period=1e9,  # a step may take minutes
            get_time=lambda: time.monotonic(),
        )
        self.now(what, tell=False)

    @property
    def width(self) -> int:
        """Columns that a line should keep to."""
        return self.console.width if self.console.is_terminal else PLAIN_WIDTH

    def __enter__(self) -> Self:
        # A dumb terminal cannot move its cursor, so it gets lines as a file does.
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.quiet:
            self.bars.start()
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.now("")
        with suppress(OSError):  # the folder may be gone
            if self.file.name:
                self.file.unlink()
        if self.bars.live.is_started:
            self.bars.stop()

    def _beat(self) -> None:
        while not self._over.wait(1.0):
            self.remind()

    def _going_on(self) -> list[Task]:
        return [bar for bar in self.bars.tasks if not bar.finished and bar.stop_time is None]

    def remind(self) -> None:
        """Say what is going on, where nothing was said for a while."""
        now, tasks = time.monotonic(), self._going_on()
        patience = max(PLAIN_SECONDS, PATIENCE * (now - self._began))
        if not tasks or self.bars.live.is_started or now - self._said < patience:
            return
        if waits := [task for task in tasks if task.total is None]:  # a task may be open around it
            return self.say(f"{waits[0].description}: {waits[0].elapsed or 0:.0f} s so far")
        words = [f"{task.description.strip()}: {task.completed:g}/{task.total:g}" for task in tasks]
        times = zip(self._left(tasks[0]), ("left", "of the whole run left"), strict=True)
        words += [f"about {timedelta(seconds=round(seconds))} {what}" for seconds, what in times if seconds is not None]
        self.say(", ".join(words))

    def _left(self, bar: Task) -> tuple[float | None, float | None]:
        """Seconds left of a task at its pace, and of the whole run: what is to come by the plan, at that pace."""
        left, names, expected = bar.time_remaining, list(self.plan), self.plan.get(bar.description, 0.0)
        if bar.speed and bar.total and expected:
            self._pace = bar.total / bar.speed / expected
        if not self._pace or bar.description not in names:
            return left, None
        later = sum(self.plan[name] for name in names[names.index(bar.description) + 1 :]) * self._pace
        return left, later + (expected * self._pace * (1 - bar.percentage / 100) if left is None else left)

    def now(self, what: str, tell: bool = True) -> None:
        """What is done from here on, where it may take a while and has no bar of its own. tell: say so at once."""
        for bar in [bar for bar in self.bars.tasks if bar.total is None]:
            self.bars.remove_task(bar.id)
        if what:
            self.bars.add_task(what, total=None, run="")
        if what and tell and not self.bars.live.is_started:
            self.say(what)

    def note(self) -> None:
        """A task has come on: note where the run is, unless it was noted just now."""
        with self._lock:
            now, tasks = time.monotonic(), self._going_on()
            if tasks and (run_left := self._left(tasks[0])[1]):
                self.bars.update(tasks[0].id, run=f" (run: {timedelta(seconds=round(run_left))} left)")
            if tasks and self.file.name and now - self._noted > NOTE_SECONDS and self.file.parent.is_dir():
                self._noted, task = now, tasks[0]
                where = {"task": task.description, "done": task.completed, "total": task.total}
                write_json(self.file, {**where, "left": task.time_remaining})
            self.remind()

    @contextmanager
    def task(self, name: str, total: int, transient: bool = False) -> Iterator[Callable[..., None]]:
        """A bar, or plain lines. Yields what moves it, from any thread: by items, or to so many `completed` of `total`."""
        self.now("")
        bar = self.bars.add_task(name, total=max(1, total), run="")

        def advance(items: int = 0, completed: int | None = None, total: int | None = None) -> None:
            most = None if total is None else max(1, total)
            self.bars.update(bar, advance=items or None, completed=completed, total=most)
            self.note()

        try:
            yield advance
        finally:
            self.bars.update(bar, run="")  # what is left of the run is no word on a bar that stays
            self.bars.remove_task(bar) if transient else self.bars.stop_task(bar)

    def say(self, line: str) -> None:
        self._said = time.monotonic()
        if not self.quiet:
            self.insist(line)

    def insist(self, line: str) -> None:
        """Print a line even when quiet: the answer to what a person did just now."""
        self.console.print(terminal_text(line, self.console), soft_wrap=True)
