"""Stopping cleanly: signals, limits, and the errors that end a run whose state is saved.

The first Ctrl-C (or SIGTERM, which batch systems send before they kill; SIGHUP, when a terminal is closed; SIGQUIT) lets
the step in hand finish and be saved; the second ends the process at once, which loses no more than a kill would: the last
checkpoint stays in force. A closed terminal sends SIGHUP more than once, so that one never counts as a second.
"""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

from soar.config import LimitsConfig, named_code
from soar.engine.memory import is_out_of_memory
from soar.files import read_object, shell_words
from soar.types import Interrupted

PAUSED = 3  # exit code of a run that waits for a larger limit or for a person
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
LOST_WORDS = ("cuda error", "nccl", "cublas", "cudnn", "device-side assert", "hip error", "unspecified launch failure")
PRCTL = getattr(ctypes.PyDLL(None), "prctl", None)  # not in a forked child, whose loader another thread may have locked


class Stopped(Interrupted):
    """A run that stopped at a safe point, its state saved. reason: why; exit_code: of the process."""

    def __init__(self, reason: str, advice: str, exit_code: int = PAUSED) -> None:
        super().__init__(f"{reason}; everything is saved. {advice}")
        self.reason, self.exit_code = reason, exit_code


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that the accelerator or its communication failed."""
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST_WORDS)


@contextmanager
def saved_run(resume: str) -> Iterator[None]:
    """Raises Interrupted in place of what torch raises for too little memory or a lost device; `resume` goes on from it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        again = f"Everything up to the last step is saved; continue with: {resume}"
        if is_out_of_memory(error):
            lower = "lower model.chunk and model.micro_batch_tokens, which may change on --resume"
            raise Interrupted(f"out of memory: {error}. Free memory or {lower}. {again}") from error
        if is_device_lost(error):
            raise Interrupted(f"the accelerator failed: {error}. {again}") from error
        raise


class StopRequest:
    """Whether a run was asked to stop, and why. Safe to ask from any thread."""

    reason: str | None = None
    exit_code = PAUSED

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock = threading.RLock()

    def check(self, go_on: str = " --resume") -> None:
        """Raises Stopped when asked to stop. go_on: what to continue with."""
        if self.reason is not None:
            raise Stopped(self.reason, f"Continue with{go_on}", self.exit_code)

    def start(self, command: list[str], **how: Any) -> subprocess.Popen[bytes]:
        """A process that hears the signals that this one hears from here on. Raises Stopped when asked to stop already."""
        with self._lock:
            self.check()  # a group of its own, which a terminal and `timeout` do not signal as well
            self._children = [child for child in self._children if child.poll() is None]
            self._children.append(subprocess.Popen(command, process_group=0, preexec_fn=_end_with_parent, **how))
            return self._children[-1]

    @contextmanager
    def on_signals(self, say: Callable[[str], None]) -> Iterator[Self]:
        """In the block signals in HEARD ask to stop, a second one ends process and workers; in the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        terminals = [fd for fd in (1, 2) if os.isatty(fd)]

        def heard(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                for fd in terminals:
                    if not os.isatty(fd):  # closed: a write would be an error, so it leads nowhere from here on
                        with open(os.devnull, "w") as nowhere:
                            os.dup2(nowhere.fileno(), fd)
                if self.reason is not None:
                    return
            with self._lock:
                again = self.reason is not None
                self.reason, self.exit_code = f"stopped by {name}", 128 + number
                for child in self._children:
                    child.send_signal(number)
            if again:  # without any further step
                for worker in multiprocessing.active_children():
                    worker.kill()
                if sys.stderr is not None and sys.stderr.isatty():
                    os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # bars hide the cursor
                os._exit(128 + number)
            with suppress(RuntimeError):  # the signal came while this thread was writing a line of its own
                say(f"{name}: the step in hand is finished and saved first; once more stops at once")

        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # under which it stays ignored
        heeded = [number for number in HEARD if not (nohup and number == signal.SIGHUP)]
        before = {number: signal.signal(number, heard) for number in heeded}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with_parent() -> None:
    """In a new process: SIGHUP (one for each thread) when its parent is gone, however that ended. On Linux only."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    if PRCTL is not None:
        PRCTL(1, signal.SIGHUP)  # PR_SET_PDEATHSIG


def limit_reached(limits: LimitsConfig, hours: float, tokens: int) -> str | None:
    """The limit that pauses a run after `hours` in this process and `tokens` sampled in all; None when there is none."""
    if limits.max_hours and hours >= limits.max_hours:
        return f"limits.max_hours = {limits.max_hours:g} reached"
    over = limits.max_tokens and tokens >= limits.max_tokens
    return f"limits.max_tokens = {limits.max_tokens} reached ({tokens} sampled)" if over else None


def resume_command(folder: Path, limits: LimitsConfig | None = None, tokens: int = 0) -> str:
    """The command that continues the run in a folder; past limits.max_tokens with as many tokens again."""
    more = f" --max-tokens {tokens + limits.max_tokens}" if limits and 0 < limits.max_tokens <= tokens else ""
    return f"soar run --out {shell_words(folder)} --resume{trust_word(folder)}{more}"


def trust_word(folder: Path) -> str:
    """What a command needs for a run whose config names code, all of which this process runs already."""
    return " --trust-run" if named_code(read_object(folder / "manifest.json")[0].get("config")) else ""
