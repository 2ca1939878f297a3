"""Checks in worker processes that can be killed: the machinery under `verify.py`.

A worker takes a chunk of checks and writes one byte of shared memory before and after each. A kernel timer (SIGALRM
with its default action) ends the worker when one check is over its time, whatever C code it is in. The parent reads
from the bytes which checks are done, blames the one that was running, and gives the rest to another worker. Where there
is no such timer (Windows), or a user function cancels it, pebble's time limit ends the chunk, and its rest is retried
one by one.

Workers start with `spawn`, drop every environment variable that they do not need, and limit their address space. Only
the texts of a check go to a worker, and only bytes and error messages come back.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from soar.types import UserError, Verdict

CHUNK = 32  # checks of one task
SLOTS = 64  # tasks in flight at most
MAX_TASKS = 500  # tasks after which a worker is replaced, so that caches cannot fill its memory
STARTS = 3  # broken pools in a row, without one verdict between them, until giving up
STALL_S = 60.0  # silence beyond every time limit that is taken for a broken pool
NOT_STARTED, RUNNING, FIRST_CODE = 0, 1, 2
VERDICTS = list(Verdict)
HAS_TIMER = hasattr(signal, "setitimer")

KEPT_ENVIRONMENT = {
    "PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "PATHEXT", "COMSPEC", "USERPROFILE",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
}  # fmt: skip


class VerifierError(UserError, RuntimeError):
    """A verifier that cannot be used: unknown name, no such function, wrong return shape, workers that do not start."""


class _Worker:
    """State of this process when it is a worker."""

    name: str = ""
    check: Callable[..., Verdict] | None = None
    progress: Any = None
    timeout_s: float = 0.0
    error: str | None = None


def strip_environment() -> None:
    """Remove every environment variable of this process that a check does not need (tokens and keys among them)."""
    for key in list(os.environ):
        if key.upper() not in KEPT_ENVIRONMENT and not key.startswith("LC_"):
            del os.environ[key]
    os.environ["OMP_NUM_THREADS"] = "1"


def limit_memory(memory_mb: int) -> None:
    """Cap the address space of this process and switch core files off, where the system can."""
    try:
        import resource
    except ImportError:
        return
    limits = [(resource.RLIMIT_CORE, 0)]
    if memory_mb and hasattr(resource, "RLIMIT_AS"):
        limits.append((resource.RLIMIT_AS, memory_mb * 2**20))
    for kind, value in limits:
        _, hard = resource.getrlimit(kind)
        try:
            resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
        except (ValueError, OSError):
            logging.getLogger(__name__).debug("this system refuses a limit on resource %s of a verifier worker", kind)


def initialize_worker(name: str, progress: Any, timeout_s: float, memory_mb: int, loader: str = "") -> None:
    """First thing in a worker. An error is kept and reported by the first chunk, so that the parent can name it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    strip_environment()
    _Worker.name, _Worker.progress, _Worker.timeout_s = name, progress, timeout_s
    try:
        if loader:
            _Worker.check = load_function(loader)(name)
        else:
            _Worker.check = _load_math() if name == "math" else _load_function(name)
    except Exception as error:  # whatever a user's module raises on import must reach the user by name
        key = "problems.domain" if loader else "problems.verifier"
        _Worker.error = f"{key} = {name!r} cannot be loaded: {type(error).__name__}: {error}"
    limit_memory(memory_mb)


def run_chunk(slot: int, items: Sequence[tuple[Any, ...]]) -> tuple[str | None, dict[int, str]]:
    """Check `items` one after another; verdicts go to the shared bytes of `slot`.

    Returns the last error message, and place -> text of the checks that returned a text in place of a verdict.
    Raises VerifierError (in the parent) for what is wrong with the verifier rather than with an answer.
    """
    if _Worker.check is None:
        raise VerifierError(_Worker.error or "worker was not initialized")
    message, texts = None, dict[int, str]()
    for index, item in enumerate(items):
        place = slot * CHUNK + index
        _Worker.progress[place] = RUNNING
        _set_timer(_Worker.timeout_s)
        try:
            found = _Worker.check(*item)
            verdict = Verdict.CORRECT if isinstance(found, str) and not isinstance(found, Verdict) else found
            if verdict is not found:
                texts[index] = found
        except VerifierError:
            raise
        except Exception as error:  # a check may fail in any way; that is its verdict
            verdict, message = Verdict.CRASHED, f"{_Worker.name}: {type(error).__name__}: {error}"[:500]
        finally:
            _set_timer(0.0)
        _Worker.progress[place] = FIRST_CODE + VERDICTS.index(verdict)
    return message, texts


def _set_timer(seconds: float) -> None:
    if HAS_TIMER:
        if seconds:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _load_math() -> Callable[..., Verdict]:
    from soar.problems.symbolic import check_symbolic

    check_symbolic("math", r"\frac{x}{2}+1", r"1+\frac{x}{2}")  # sympy loads half of itself at the first comparison
    return check_symbolic


def load_function(name: str) -> Callable[..., Any]:
    """The function behind `module:function` or `file.py:function`. Raises VerifierError saying what was looked for."""
    module, attribute = load_module(name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise VerifierError(f"{name.rpartition(':')[0]} has no function {attribute!r}")
    return function


def load_module(name: str) -> tuple[ModuleType, str]:
    """The module of `module:NAME` or `file.py:NAME`, and NAME. Raises VerifierError, and what the module raises."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise VerifierError(f"no file {where}")
        spec = importlib.util.spec_from_file_location(f"soar_user_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise VerifierError(f"{where} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up by name
        spec.loader.exec_module(module)
    else:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        module = importlib.import_module(where)
    return module, attribute


def _load_function(name: str) -> Callable[..., Verdict]:
    function = load_function(name)

    def check(completion: str, columns: dict[str, Any]) -> Verdict:
        values = function(completions=[completion], **{key: [value] for key, value in columns.items()})
        return read_reward(values, name)

    return check


def read_reward(values: Any, name: str) -> Verdict:
    """The verdict in what a user function returned for one completion: a list of one number or None.

    1 or more is correct, less is wrong, None and NaN are unscorable. Raises VerifierError for any other shape.
    """
    expected = "expected a list with one number or None for each completion"
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise VerifierError(f"{name} returned {type(values).__name__}; {expected}")
    if len(values) != 1:
        raise VerifierError(f"{name} returned {len(values)} values for 1 completion; {expected}")
    value = values[0]
    if value is None:
        return Verdict.UNSCORABLE
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise VerifierError(f"{name} returned a {type(value).__name__} ({value!r:.80}); {expected}")
    score = float(value)
    if math.isnan(score):
        return Verdict.UNSCORABLE
    return Verdict.CORRECT if score >= 1 else Verdict.WRONG


@dataclass
class Chunk:
    """Checks on their way. indices: places in the batch. slot: row of the shared bytes. tries: dead workers so far."""

    indices: list[int]
    slot: int = -1
    tries: int = 0


class End(Enum):
    """How a chunk ended: all checks done, ended by the kernel timer, over pebble's limit, worker died, pool broken."""

    DONE = "done"
    TIMER = "timer"
    OVERDUE = "overdue"
    DIED = "died"
    BROKEN = "broken"


class WorkerPool:
    """Runs the checks of one verifier in `workers` processes; every check ends in a verdict. See the module's header.

    name: `math`, a user function, or what `loader` (`module:function`) makes a check of in each worker. timeout_s: for
    one check. memory_mb: address space of a worker, 0 for no limit. last_error: message of the last check that raised
    or lost its worker.
    """

    def __init__(self, name: str, timeout_s: float, memory_mb: int, workers: int, loader: str = "") -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.workers = workers
        self.last_error: str | None = None
        self._context = multiprocessing.get_context("spawn")
        self._progress = self._context.RawArray("B", SLOTS * CHUNK)
        self._arguments = (name, self._progress, timeout_s, memory_mb, loader)
        self._texts: dict[int, str] = {}
        self._pool: ProcessPool | None = None
        self._turn = threading.Lock()

    def close(self) -> None:
        """End the workers; the next `run` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def run(self, items: Sequence[tuple[Any, ...]]) -> list[Verdict]:
        """One verdict for each item (the arguments of one check). Threads take turns.

        Raises VerifierError; the workers are gone then.
        """
        with self._turn:
            return self._guarded(items, CHUNK if HAS_TIMER else 1)

    def read(self, items: Sequence[tuple[Any, ...]]) -> list[str | Verdict]:
        """The text that each check returned, or the verdict of one that returned none (a killed one: TIMEOUT, CRASHED).

        One check a task, since the texts of a task are lost with its worker. Raises VerifierError as `run` does.
        """
        with self._turn:
            self._texts = {}
            verdicts = self._guarded(items, 1)
            lost = {Verdict.CORRECT: Verdict.CRASHED}  # the worker died between its verdict and its text
            return [self._texts.get(i, lost.get(verdict, verdict)) for i, verdict in enumerate(verdicts)]

    def _guarded(self, items: Sequence[tuple[Any, ...]], most: int) -> list[Verdict]:
        try:
            return self._run(items, most)
        except BaseException:
            self.close()
            raise

    def _run(self, items: Sequence[tuple[Any, ...]], most: int) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(items)
        size = max(1, min(most, len(items) // (4 * self.workers)))
        waiting = deque(Chunk(list(range(i, min(i + size, len(items))))) for i in range(0, len(items), size))
        slots = deque(range(min(SLOTS, 4 * self.workers)))
        running: dict[Future[Any], Chunk] = {}
        failures = 0
        while waiting or running:
            while waiting and slots:
                chunk = waiting.popleft()
                chunk.slot = slots.popleft()
                running[self._submit(chunk, items)] = chunk
            done, _ = wait(running, timeout=STALL_S + 2 * self._limit(CHUNK), return_when=FIRST_COMPLETED)
            ends = {future: self._end(future, running[future]) for future in done}
            if not done or End.BROKEN in ends.values():
                self.close()
                ends |= {future: End.BROKEN for future in running if future not in ends}
                failures += 1
            for future, end in ends.items():
                chunk = running.pop(future)
                if self._settle(chunk, end, verdicts, waiting):
                    failures = 0
                slots.append(chunk.slot)
            if failures >= STARTS:
                raise VerifierError(
                    f"the worker processes of verifier {self.name!r} do not run. They import the main script, "
                    "as multiprocessing does everywhere: put what it runs under `if __name__ == '__main__':`. "
                    "If that is so, they need more memory than memory_mb allows"
                )
        return [Verdict.CRASHED if verdict is None else verdict for verdict in verdicts]

    def _limit(self, checks: int) -> float:
        """pebble's time limit of a chunk: enough for one check at its limit among ordinary ones of 100 ms."""
        return self.timeout_s + 0.5 + 0.1 * (checks - 1)

    def _submit(self, chunk: Chunk, items: Sequence[tuple[Any, ...]]) -> Future[Any]:
        if self._pool is None:
            self._pool = ProcessPool(
                self.workers,
                max_tasks=MAX_TASKS,
                initializer=initialize_worker,
                initargs=self._arguments,
                context=self._context,
            )
        start = chunk.slot * CHUNK
        self._progress[start : start + CHUNK] = [NOT_STARTED] * CHUNK
        payload = [items[index] for index in chunk.indices]
        try:
            return self._pool.schedule(run_chunk, args=(chunk.slot, payload), timeout=self._limit(len(payload)))
        except RuntimeError as error:  # the pool broke since the last call; this future makes `_run` replace it
            failed: Future[Any] = Future()
            failed.set_exception(BrokenProcessPool(str(error)))
            return failed

    def _end(self, future: Future[Any], chunk: Chunk) -> End:
        try:
            message, texts = future.result()
            self.last_error = message or self.last_error
            self._texts.update((chunk.indices[place], text) for place, text in texts.items())
            return End.DONE
        except BrokenProcessPool:
            return End.BROKEN
        except FutureTimeout:
            return End.OVERDUE
        except ProcessExpired as error:
            if HAS_TIMER and error.exitcode == -signal.SIGALRM:
                return End.TIMER
            self.last_error = f"{self.name}: a worker ended with exit code {error.exitcode}"
            return End.DIED

    def _settle(self, chunk: Chunk, end: End, verdicts: list[Verdict | None], waiting: deque[Chunk]) -> bool:
        """Store what a chunk found and queue the rest of it. Returns whether any check got its verdict.

        The check that was running when the timer ended the worker has timed out. One that was running when the worker
        died is tried once more alone, since the system may have killed the worker for its neighbour's memory.
        """
        start = chunk.slot * CHUNK
        codes = list(self._progress[start : start + len(chunk.indices)])
        alone = len(chunk.indices) == 1
        running = next((i for i, code in zip(chunk.indices, codes, strict=True) if code == RUNNING), None)
        rest = []
        for index, code in zip(chunk.indices, codes, strict=True):
            if code >= FIRST_CODE:
                verdicts[index] = VERDICTS[code - FIRST_CODE]
            elif (end is End.TIMER and index == running) or (end is End.OVERDUE and alone):
                verdicts[index] = Verdict.TIMEOUT
            elif end is End.DIED and alone and chunk.tries:
                verdicts[index] = Verdict.CRASHED
            else:
                rest.append(index)
        tries = chunk.tries + (end is End.DIED)
        if end is End.OVERDUE or (end is End.DIED and running is None):
            waiting.extend(Chunk([index], tries=tries) for index in rest)
        else:
            others = [index for index in rest if index != running]
            if others:
                waiting.append(Chunk(others))
            if running in rest:
                waiting.append(Chunk([running], tries=tries))
        return len(rest) < len(chunk.indices)
