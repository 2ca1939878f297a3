"""Checks in worker processes that can be killed: the machinery under `verify.py`.

A worker takes a chunk of checks and writes one byte of shared memory before and after each. A kernel timer (SIGALRM
with its default action) ends the worker when one check is over its time, whatever C code it is in. The parent reads
from the bytes which checks are done, blames the one that was running, and gives the rest to another worker. Where there
is no such timer (Windows), or a user function cancels it, pebble's time limit ends the chunk, and its rest is retried
one by one.

Workers start with `spawn`, drop every environment variable that they do not need, and limit their address space. Only
the texts of a check go to a worker, and only bytes and error messages come back.

Reading and checking by a domain, in worker processes: the machinery between `domains.py` and everything that grades.

`DomainPool` answers the same questions as `verify.VerifierPool`, and reads teacher texts too. All functions of a domain
run in its workers, one call at a time, under the limits of time and memory of `problems.verify_*`. Text comes back as
JSON. A function that raises or is killed gives a verdict (`crashed`, `timeout`) or a rejection (`reader_failed`).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_COMPLETION_CHARS, extract, read_number
from soar.problems.domain import Domain, load_domain
from soar.problems.load import fingerprint
from soar.problems.parse import MAX_TEACHER_CHARS, judge_fields, parse_all, read_fields
from soar.problems.prompts import PromptFormat
from soar.problems.verify import COMPARERS, FUNCTION_MEMORY_MB, NAMES, VerifierPool, columns_of, compare_math
from soar.types import Problem, Reason, Rejection, UserError, Verdict

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


MAX_QUESTION_CHARS = 4000


class DomainPool(VerifierPool):
    """Checks completions, gold answers and teacher texts as a domain says. Arguments as in `VerifierPool`."""

    def __init__(
        self, domain: Domain, *, timeout_s: float = 5.0, memory_mb: int | None = None, workers: int = 0
    ) -> None:
        if domain.verify is None and domain.verifier not in NAMES:
            raise VerifierError(
                f"domain {domain.name!r}: verifier = {domain.verifier!r}, expected one of {', '.join(NAMES)}; a check of "
                "your own is given as `verify`"
            )
        self.name, self.domain = domain.label, domain
        self.answer_style = domain.prompts.answer_style
        memory = FUNCTION_MEMORY_MB if memory_mb is None else memory_mb
        count = workers or min(os.cpu_count() or 1, 8)
        self._pool = WorkerPool(domain.reference, timeout_s, memory, count, loader="soar.problems.pool:load_worker")

    def check(
        self, completions: Sequence[str], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """One Verdict for each completion, in order. columns: at least `question`, each as long as completions."""
        texts = [text[-MAX_COMPLETION_CHARS:] for text in completions]
        return self._run("check", texts, _rows(golds, columns))

    def check_answers(
        self, answers: Sequence[str | None], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """Verdicts for answers that are already extracted (None: no answer)."""
        rows = _rows(golds, columns)
        given = [i for i, answer in enumerate(answers) if answer is not None]
        found = self._run("compare", [answers[i] or "" for i in given], [rows[i] for i in given])
        verdicts = [Verdict.NO_ANSWER] * len(answers)
        for i, verdict in zip(given, found, strict=True):
            verdicts[i] = verdict
        return verdicts

    def check_golds(self, golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[Verdict]:
        """Whether each gold problem can be used: CORRECT, or why not (UNSCORABLE where `validate` names something)."""
        return self._run("gold", list(golds), _rows(golds, columns))

    def faults(self, problems: Sequence[Problem]) -> list[str]:
        """What the domain says is wrong with each gold problem, "" where it names nothing."""
        rows = _rows([p.answer for p in problems], columns_of(problems))
        found = self._pool.read([("fault", p.answer, row) for p, row in zip(problems, rows, strict=True)])
        return ["" if isinstance(text, Verdict) else str(json.loads(text))[:100] for text in found]

    def parsable(self, answers: Sequence[str]) -> list[bool]:
        """Any text; whether it can serve depends on its question (`usable_answers`)."""
        return [bool(answer.strip()) for answer in answers]

    def read_answers(self, completions: Sequence[str]) -> list[str | None]:
        """The answer that each completion commits to."""
        if self.domain.read_answer is None:
            return [extract(text, self.answer_style) for text in completions]
        found = self._pool.read([("extract", text[-MAX_COMPLETION_CHARS:], {}) for text in completions])
        return [None if isinstance(text, Verdict) else json.loads(text) for text in found]

    def solve(self, questions: Sequence[str]) -> list[str | None]:
        """The domain's own answers; None where it has none, or its solver failed."""
        found = self._pool.read([("solve", question, {}) for question in questions])
        return [None if isinstance(text, Verdict) else json.loads(text) for text in found]

    def read_problems(
        self, texts: Sequence[str], truncated: Sequence[bool], seen: set[str] | None = None, strict: bool = False
    ) -> list[Problem | Rejection]:
        """The problem in each teacher text, or why there is none.

        truncated: the text hit its token budget. seen: fingerprints of questions that count as duplicates; new ones are
        added. strict: tags as asked, for a domain without a reader of its own.
        """
        tasks = [
            ("read", text[:MAX_TEACHER_CHARS], {"truncated": cut, "strict": strict})
            for text, cut in zip(texts, truncated, strict=True)
        ]
        results: list[Problem | Rejection] = []
        for text, found in zip(texts, self._pool.read(tasks), strict=True):
            if isinstance(found, Verdict):
                detail = "reader_timeout" if found is Verdict.TIMEOUT else ""
                results.append(Rejection(Reason.READER_FAILED, text, detail))
                continue
            fields = json.loads(found)
            if "reason" in fields:
                results.append(Rejection(Reason(fields["reason"]), text, fields["detail"]))
                continue
            key = fingerprint(fields["question"])
            if seen is not None and key in seen:
                results.append(Rejection(Reason.DUPLICATE, text))
                continue
            if seen is not None:
                seen.add(key)
            results.append(Problem(key[:16], fields["question"], fields["answer"]))
        return results

    def _run(self, task: str, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Verdict]:
        return self._pool.run([(task, text, row) for text, row in zip(texts, rows, strict=True)])


def open_pool(domain: Domain, problems: ProblemsConfig) -> VerifierPool:
    """The pool that grades by a domain, with the limits of a config. Raises VerifierError."""
    limits: dict[str, Any] = {
        "timeout_s": problems.verify_timeout_s,
        "memory_mb": problems.verify_memory_mb,
        "workers": problems.verify_workers,
    }
    if domain.own:
        return DomainPool(domain, **limits)
    return VerifierPool(domain.verifier, answer_style=domain.prompts.answer_style, **limits)


def make_pool(verifier: str, answer_style: str, domain: str = "") -> VerifierPool:
    """A pool by names, for exported rewards: of a domain, or of a verifier and an answer style."""
    return DomainPool(load_domain(domain)) if domain else VerifierPool(verifier, answer_style=answer_style)


def read_problems(
    pool: Any,
    prompts: PromptFormat,
    texts: Sequence[str],
    truncated: Sequence[bool],
    seen: set[str] | None,
    strict: bool,
) -> list[Problem | Rejection]:
    """Teacher texts -> problems or rejections, by whatever pool a run has."""
    if isinstance(pool, DomainPool):
        return pool.read_problems(texts, truncated, seen, strict)
    return parse_all(texts, prompts, pool, truncated=truncated, seen=seen, strict=strict)


def read_answers(pool: Any, prompts: PromptFormat, texts: Sequence[str]) -> list[str | None]:
    """The answers of completions, by whatever pool a run has."""
    if isinstance(pool, DomainPool):
        return pool.read_answers(texts)
    return [extract(text, prompts.answer_style) for text in texts]


def usable_answers(pool: Any, problems: Sequence[Problem]) -> list[bool]:
    """Whether the answer of each problem can serve as a gold answer."""
    if isinstance(pool, DomainPool):
        verdicts = pool.check_golds([p.answer for p in problems], columns_of(problems))
        return [bool(p.answer.strip()) and v.solved for p, v in zip(problems, verdicts, strict=True)]
    return pool.parsable([p.answer for p in problems])


def _rows(golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None) -> list[dict[str, Any]]:
    for key, column in (columns or {}).items():
        if len(column) != len(golds):
            raise ValueError(f"column {key!r} has {len(column)} values for {len(golds)} gold answers")
    return [
        {**{key: column[i] for key, column in (columns or {}).items()}, "answer": gold} for i, gold in enumerate(golds)
    ]


def load_worker(reference: str) -> Callable[..., Verdict | str]:
    """What a worker of a `DomainPool` does: `(task, text, row) -> verdict or JSON`. Called in the worker."""
    domain = load_domain(reference)
    if domain.prepare is not None:
        domain.prepare()
    worker = _Worker_grading(domain)
    tasks: dict[str, Callable[[str, dict[str, Any]], Verdict | str]] = {
        "check": worker.check,
        "compare": worker.compare,
        "gold": worker.gold,
        "fault": lambda text, row: json.dumps(worker.fault(_problem(row))),
        "read": worker.read,
        "extract": lambda text, row: json.dumps(worker.extract(text)),
        "solve": lambda text, row: json.dumps(domain.solve(text) if domain.solve else None),
    }
    return lambda task, text, row: tasks[task](text, row)


class _Worker_grading:
    """The functions of a domain, with the defaults for those it leaves out."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def extract(self, text: str) -> str | None:
        if self.domain.read_answer is None:
            return extract(text, self.domain.prompts.answer_style)
        answer = self.domain.read_answer(text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"read_answer returned {type(answer).__name__}, expected text or None")
        return answer

    def check(self, text: str, row: dict[str, Any]) -> Verdict:
        answer = self.extract(text)
        return Verdict.NO_ANSWER if answer is None else self.compare(answer, row)

    def compare(self, answer: str, row: dict[str, Any]) -> Verdict:
        return self._equal(answer, _problem(row))

    def gold(self, answer: str, row: dict[str, Any]) -> Verdict:
        problem = _problem(row)
        if self.fault(problem):
            return Verdict.UNSCORABLE
        if self.domain.arrange is not None:
            made = self.domain.arrange(problem)
            problem = problem if isinstance(made, str) else made
        if self.domain.validate is not None:
            return Verdict.CORRECT
        if self.domain.verify is None and self.domain.verifier == "math":
            return _symbolic("math", problem.answer, problem.answer)
        return self._equal(problem.answer, problem)

    def fault(self, problem: Problem) -> str:
        """What `arrange` or `validate` names."""
        made = problem if self.domain.arrange is None else self.domain.arrange(problem)
        if isinstance(made, str):
            return made
        return (self.domain.validate(made) if self.domain.validate else None) or ""

    def read(self, text: str, row: dict[str, Any]) -> str:
        """`{question, answer}` or `{reason, detail}` as JSON."""
        found = self._pair(text, row["truncated"], row["strict"])
        if isinstance(found, Rejection):
            return json.dumps({"reason": found.reason.value, "detail": found.detail})
        return json.dumps({"question": found[0], "answer": found[1]})

    def _pair(self, text: str, truncated: bool, strict: bool) -> tuple[str, str] | Rejection:
        domain = self.domain
        found: Any
        if domain.read_problem is None or not text.strip():
            found = read_fields(text, domain.prompts, truncated, strict)
        else:
            found = domain.read_problem(text)
        if truncated:
            return Rejection(Reason.TRUNCATED, "")
        if isinstance(found, Rejection):
            return found
        if isinstance(found, str):
            known = {reason.value for reason in Reason}
            return Rejection(Reason(found), "") if found in known else Rejection(Reason.REFUSED, "", found)
        question, answer = (found.question, found.answer) if isinstance(found, Problem) else found
        if not isinstance(question, str) or not isinstance(answer, str):
            raise TypeError("read_problem returned a pair that is not of two texts")
        question, answer = question.strip(), answer.strip()
        own = domain.read_problem is not None or domain.verify is not None
        reason = judge_fields(question, answer, domain.prompts, MAX_QUESTION_CHARS, domain.max_answer_chars, own)
        if reason is not None:
            return Rejection(reason, "")
        problem: Problem | str = Problem("", question, answer)
        if domain.arrange is not None:
            problem = domain.arrange(Problem("", question, answer))
        if isinstance(problem, str):
            return Rejection(Reason.REFUSED, "", problem)
        wrong = self._wrong(problem)
        return (problem.question, problem.answer) if wrong is None else wrong

    def _wrong(self, problem: Problem) -> Rejection | None:
        """What is wrong with a problem, by `validate` or by whether its answer can be checked."""
        domain = self.domain
        if domain.validate is not None:
            name = domain.validate(problem)
            return None if name is None else Rejection(Reason.REFUSED, "", str(name))
        if domain.verify is not None or domain.verifier not in ("math", "number"):
            good = self._equal(problem.answer, problem).solved
        elif read_number(problem.answer) is not None:
            good = True
        else:
            good = domain.verifier == "math" and _symbolic("parsable", problem.answer, "").solved
        return None if good else Rejection(Reason.UNPARSABLE_ANSWER, "")

    def _equal(self, answer: str, problem: Problem) -> Verdict:
        if self.domain.verify is not None:
            return _verdict(self.domain.verify(answer, problem))
        if self.domain.verifier == "math":
            verdict = compare_math(answer, problem.answer)
            return _symbolic("math", answer, problem.answer) if verdict is None else verdict
        return COMPARERS[self.domain.verifier](answer, problem.answer)


def _symbolic(kind: str, answer: str, gold: str) -> Verdict:
    from soar.problems.symbolic import check_symbolic  # takes a second to import, and few domains need it

    return check_symbolic(kind, answer, gold)


def _problem(row: dict[str, Any]) -> Problem:
    extra = {key: value for key, value in row.items() if key not in ("question", "answer")}
    return Problem("", str(row.get("question", "")), row["answer"], extra)


def _verdict(value: Any) -> Verdict:
    """What `verify` returned, as a verdict. Raises TypeError for anything but Verdict, truth value, number or None."""
    if isinstance(value, Verdict):
        return value
    if value is None:
        return Verdict.UNSCORABLE
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"verify returned {type(value).__name__}, expected True, False, a number, None or a Verdict")
    score = float(value)
    if math.isnan(score):
        return Verdict.UNSCORABLE
    return Verdict.CORRECT if score >= 1 else Verdict.WRONG
