"""One verifier or one domain in worker processes that can be killed: completion + gold answer -> Verdict.

A check never hangs the caller, never runs model-written text in it, and is never `correct` by accident: one over its time is
`timeout`, one that raises or kills its worker (memory, segmentation fault) is `crashed`. Workers take small chunks of
checks; those of a chunk that is lost with its worker are done again one by one. Workers start with `spawn`, drop every
environment variable that they do not need, and limit their address space. `exact`, `number`, `choice` and the exact part of
`math` are bounded string functions that cost microseconds, so they run in the calling process (`verify.py`).
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from enum import Enum
from typing import Any

from pebble import ProcessExpired, ProcessPool

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_COMPLETION_CHARS, TOTALS, extract
from soar.problems.domain import Domain, Grader, load_domain, load_function
from soar.problems.parse import MAX_TEACHER_CHARS, make_problem, parse_all, refuse_duplicates
from soar.problems.prompts import PromptFormat
from soar.problems.verify import COMPARERS, NAMES, VerifierError, is_value, judge_gold, read_reward
from soar.types import Problem, Reason, Rejection, Verdict, columns_of

CHUNK = 8  # checks of one task
MAX_TASKS = 1_000  # tasks after which a worker is replaced, so that caches cannot fill its memory
STARTS = 3  # broken pools in a row, without one verdict between them, until giving up
STALL_S = 60.0  # silence beyond the time limit that is taken for a broken pool
CACHE_SIZE = 200_000
MATH_MEMORY_MB = 1_024
FUNCTION_MEMORY_MB = 8_192  # a function may import torch, which reserves several gigabytes of addresses

KEPT_ENVIRONMENT = {
    "PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "PATHEXT", "COMSPEC", "USERPROFILE",
    "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
}  # fmt: skip

Item = tuple[str, str, Any]
Check = Callable[[str, str, Any], Verdict | str]


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


class _Worker:
    """State of this process when it is a worker."""

    name: str = ""
    check: Check | None = None
    error: str | None = None


def initialize_worker(name: str, key: str, memory_mb: int) -> None:
    """First thing in a worker. An error is kept and reported by the first chunk, so that the parent can name it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    strip_environment()
    _Worker.name = name
    try:
        _Worker.check = Grader(load_domain(name)) if key == "problems.domain" else _load_verifier(name)
    except Exception as error:  # whatever a user's module raises on import must reach the user by name
        _Worker.error = f"{key} = {name!r} cannot be loaded: {type(error).__name__}: {error}"
    limit_memory(memory_mb)


def _load_verifier(name: str) -> Check:
    if name == "math":
        from soar.problems.symbolic import check_symbolic

        check_symbolic("math", r"\frac{x}{2}+1", r"1+\frac{x}{2}")  # sympy loads half of itself at the first comparison
        return check_symbolic
    function = load_function(name)

    def check(task: str, completion: str, columns: dict[str, Any]) -> Verdict:
        values = function(completions=[completion], **{key: [value] for key, value in columns.items()})
        return read_reward(values, name)

    return check


def run_chunk(items: Sequence[Item]) -> tuple[list[Verdict | str], str | None]:
    """A verdict or a text for each item, and the last error message.

    Raises VerifierError (in the parent) for what is wrong with the verifier rather than with an answer.
    """
    if _Worker.check is None:
        raise VerifierError(_Worker.error or "worker was not initialized")
    outcomes, message = list[Verdict | str](), None
    for item in items:
        try:
            outcomes.append(_Worker.check(*item))
        except VerifierError:
            raise
        except Exception as error:  # a check may fail in any way; that is its verdict
            outcomes.append(Verdict.CRASHED)
            message = f"{_Worker.name}: {type(error).__name__}: {error}"[:500]
    return outcomes, message


class _End(Enum):
    """How a chunk was lost: over its time, with its worker, with the whole pool."""

    OVERDUE = "overdue"
    DIED = "died"
    BROKEN = "broken"


class VerifierPool:
    """Checks completions, gold answers and teacher texts by one verifier, or as one domain says.

    verifier: a Domain of `load_domain`; or `math` (math-verify), `number`, `exact`, `choice`; or a function
    `module:function` / `file.py:function` in the shape `(completions, **columns) -> list[float | None]`, called with one
    completion at a time, as text; the gold answers are the column `answer`; a value of 1 or more is correct, None or NaN is
    unscorable. answer_style: see `answers.extract`; a domain has its own. timeout_s: seconds for one check.
    memory_mb: address space of one worker; None: 1,024 for `math`, else 8,192; 0: no limit. It is not applied where the
    system has no such limit. workers: processes, 0 for one per core and at most 8. last_error: message of the last check that
    raised or lost its worker.

    Workers start at the first check that needs one; threads take turns. Use it as a context manager, or call `close`.
    Raises VerifierError.
    """

    def __init__(
        self,
        verifier: str | Domain,
        *,
        answer_style: str = "boxed",
        timeout_s: float = 5.0,
        memory_mb: int | None = None,
        workers: int = 0,
    ) -> None:
        self.domain = None if isinstance(verifier, str) else verifier
        if isinstance(verifier, Domain):
            if verifier.verify is None and verifier.verifier not in NAMES:
                raise VerifierError(
                    f"domain {verifier.name!r}: verifier = {verifier.verifier!r}, expected one of {', '.join(NAMES)}; a "
                    "check of your own is given as `verify`"
                )
            self.name, answer_style = verifier.label, verifier.prompts.answer_style
            subject, key = verifier.reference, "problems.domain"
        else:
            if verifier not in NAMES and ":" not in verifier:
                raise VerifierError(
                    f"problems.verifier = {verifier!r}: expected one of {', '.join(NAMES)}, module:function or "
                    "file.py:function"
                )
            self.name, subject, key = verifier, verifier, "problems.verifier"
        extract("", answer_style)
        if memory_mb is None:
            memory_mb = MATH_MEMORY_MB if self.name == "math" else FUNCTION_MEMORY_MB
        self.answer_style = answer_style
        self.timeout_s = timeout_s
        self.workers = workers or min(os.cpu_count() or 1, 8)
        self.last_error: str | None = None
        self._arguments = (subject, key, memory_mb)
        self._verdicts: dict[Item, Verdict] = {}
        self._pool: ProcessPool | None = None
        self._turn = threading.Lock()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next check starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    @property
    def compares(self) -> bool:
        """Whether answers can be compared (`check_answers`); a user function reads whole completions."""
        return self.domain is not None or self.name in NAMES

    def check(
        self, completions: Sequence[str], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """One Verdict for each completion, in order.

        columns: further columns, each as long as completions (a domain needs `question`); the named verifiers ignore them.
        Raises ValueError for lengths that differ, VerifierError when a function returns something else than numbers.
        """
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions, but {len(golds)} gold answers")
        if self.name in NAMES:
            return self.check_answers(self.read_answers(completions), golds)
        return self._grade("check", [text[-MAX_COMPLETION_CHARS:] for text in completions], golds, columns)

    def check_answers(
        self, answers: Sequence[str | None], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """Verdicts for answers that are already extracted (None: no answer). Named verifiers and domains only."""
        if not self.compares:
            raise VerifierError(f"{self.name} reads whole completions, not answers; use check")
        if self.domain is not None:
            given = [answer for answer in answers if answer is not None]
            rows = [row for row, answer in zip(_rows(golds, columns), answers, strict=True) if answer is not None]
            verdicts = iter(self._run([("compare", text, row) for text, row in zip(given, rows, strict=True)]))
            return [Verdict.NO_ANSWER if answer is None else next(verdicts) for answer in answers]
        pairs = list(zip(answers, golds, strict=True))
        decided = [Verdict.NO_ANSWER if a is None else COMPARERS[self.name](a, gold) for a, gold in pairs]
        return self._with_symbolic(decided, [("math", a or "", gold) for a, gold in pairs])

    def _with_symbolic(self, decided: Sequence[Verdict | None], items: Sequence[Item]) -> list[Verdict]:
        """The verdicts, with those that are None by the symbolic engine."""
        asked = iter(self._symbolic([item for item, verdict in zip(items, decided, strict=True) if verdict is None]))
        return [next(asked) if verdict is None else verdict for verdict in decided]

    def check_golds(self, golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[Verdict]:
        """Whether each gold answer can be graded: CORRECT when the verifier reads it and finds it equal to itself.

        No shortcut for equal texts is taken: what `math` and `number` cannot read is UNSCORABLE, but a few words
        (`\\text{Saturday}`) are CORRECT for `math`, which compares them as text. For the answer style `totals` a gold answer
        is written `12, 20`. A domain says UNSCORABLE where its `validate` names something. A user function is given the gold
        answer as a completion, with the further columns.
        """
        if self.domain is not None:
            return self._grade("gold", golds, golds, columns)
        if self.answer_style == "totals" and self.name in NAMES:
            return [Verdict.CORRECT if TOTALS.fullmatch(gold) else Verdict.UNSCORABLE for gold in golds]
        if self.name in NAMES:
            judged = [judge_gold(gold, self.name) for gold in golds]
            return self._with_symbolic(judged, [("math", gold, gold) for gold in golds])
        frame = "\\boxed{%s}" if self.answer_style == "boxed" else "Answer: %s"
        return self.check([frame % gold for gold in golds], golds, columns)

    def parsable(self, answers: Sequence[str]) -> list[bool]:
        """Whether each answer can serve as a gold answer, as far as that can be told without its question.

        `math`: a number or expression results, not a string fallback, not an undefined value, not a word. `number`: a
        number. `exact`, `choice`, user functions and domains: any text.
        """
        if self.name == "number":
            return [judge_gold(answer, "number") is Verdict.CORRECT for answer in answers]
        if self.name != "math":
            return [bool(answer.strip()) for answer in answers]
        values = [is_value(answer) for answer in answers]
        decided = [None if value is None else Verdict.CORRECT if value else Verdict.WRONG for value in values]
        return [v.solved for v in self._with_symbolic(decided, [("parsable", answer, "") for answer in answers])]

    def usable(self, problems: Sequence[Problem]) -> list[bool]:
        """Whether the answer of each problem can serve as a gold answer."""
        golds = [problem.answer for problem in problems]
        if self.domain is None:
            return self.parsable(golds)
        verdicts = self.check_golds(golds, columns_of(problems))
        return [bool(gold.strip()) and verdict.solved for gold, verdict in zip(golds, verdicts, strict=True)]

    def faults(self, problems: Sequence[Problem]) -> list[str]:
        """What the domain says is wrong with each gold problem, "" where it names nothing or there is no domain."""
        if self.domain is None:
            return [""] * len(problems)
        rows = _rows([problem.answer for problem in problems], columns_of(problems))
        named = self._texts([("fault", str(row["answer"]), row) for row in rows])
        return [str(text or "")[:100] for text in named]

    def read_answers(self, completions: Sequence[str]) -> list[str | None]:
        """The answer that each completion commits to."""
        if self.domain is None or self.domain.read_answer is None:
            return [extract(text, self.answer_style) for text in completions]
        return self._texts([("extract", text[-MAX_COMPLETION_CHARS:], {}) for text in completions])

    def solve(self, questions: Sequence[str]) -> list[str | None]:
        """The domain's own answers; None where it has none, or its solver failed."""
        return self._texts([("solve", question, {}) for question in questions])

    def read_problems(
        self,
        texts: Sequence[str],
        truncated: Sequence[bool],
        seen: set[str] | None = None,
        strict: bool = False,
        prompts: PromptFormat | None = None,
    ) -> list[Problem | Rejection]:
        """The problem in each teacher text, or why there is none.

        truncated: the text hit its token budget. seen: fingerprints of questions that count as duplicates; new ones are
        added. strict: tags as asked, for a domain without a reader of its own. prompts: the format, where there is no domain.
        """
        if self.domain is None:
            if prompts is None:
                raise ValueError(f"verifier {self.name} has no prompts of its own; pass `prompts`")
            return parse_all(texts, prompts, self, truncated=truncated, seen=seen, strict=strict)
        tasks = [
            ("read", text[:MAX_TEACHER_CHARS], {"truncated": cut, "strict": strict})
            for text, cut in zip(texts, truncated, strict=True)
        ]
        problems: list[Problem | Rejection] = []
        for text, outcome in zip(texts, self._outcomes(tasks), strict=True):
            if isinstance(outcome, Verdict):
                detail = "reader_timeout" if outcome is Verdict.TIMEOUT else ""
                problems.append(Rejection(Reason.READER_FAILED, text, detail))
                continue
            fields = json.loads(outcome)
            if "reason" in fields:
                problems.append(Rejection(Reason(fields["reason"]), text, fields["detail"]))
            else:
                problems.append(make_problem(fields["question"], fields["answer"]))
        return refuse_duplicates(texts, problems, seen)

    def _grade(
        self, task: str, texts: Sequence[str], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None
    ) -> list[Verdict]:
        return self._run([(task, text, row) for text, row in zip(texts, _rows(golds, columns), strict=True)])

    def _symbolic(self, items: Sequence[Item]) -> list[Verdict]:
        """Verdicts of math-verify; equal items are checked once, and remembered."""
        asked = list(dict.fromkeys(item for item in items if item not in self._verdicts))
        verdicts = dict(zip(asked, self._run(asked), strict=True))
        answers = [verdicts.get(item) or self._verdicts[item] for item in items]
        self._verdicts |= verdicts
        for item in list(self._verdicts)[: max(0, len(self._verdicts) - CACHE_SIZE)]:
            del self._verdicts[item]  # the oldest
        return answers

    def _texts(self, items: Sequence[Item]) -> list[str | None]:
        """The text that each function of the domain gave; None for none, and for one that failed."""
        return [None if isinstance(text, Verdict) else json.loads(text) for text in self._outcomes(items)]

    def _run(self, items: Sequence[Item]) -> list[Verdict]:
        return [Verdict(outcome) for outcome in self._outcomes(items)]

    def _outcomes(self, items: Sequence[Item]) -> list[Verdict | str]:
        """The verdict or text of each check. Raises VerifierError; the workers are gone then."""
        with self._turn:
            try:
                return self._settle(items)
            except BaseException:
                self.close()
                raise

    def _settle(self, items: Sequence[Item]) -> list[Verdict | str]:
        """Rounds of chunks until every check has its outcome.

        The checks of a lost chunk are done again one by one. One that is alone when its worker dies is tried once more,
        since the system may have killed the worker for its neighbour's memory.
        """
        outcomes: dict[int, Verdict | str] = {}
        size = max(1, min(CHUNK, len(items) // (4 * self.workers)))
        waiting = [list(range(i, min(i + size, len(items)))) for i in range(0, len(items), size)]
        deaths, failures = Counter[int](), 0
        while waiting:
            running = [(places, self._submit([items[place] for place in places])) for places in waiting]
            waiting, before, broken = [], len(outcomes), False
            for places, future in running:
                end = self._end(future, len(places), broken)
                broken = broken or end is _End.BROKEN
                deaths.update(places if end is _End.DIED else ())
                if isinstance(end, list):
                    outcomes.update(zip(places, end, strict=True))
                elif end is _End.BROKEN:
                    waiting.append(places)
                elif len(places) == 1 and (end is _End.OVERDUE or deaths[places[0]] > 1):
                    outcomes[places[0]] = Verdict.TIMEOUT if end is _End.OVERDUE else Verdict.CRASHED
                else:
                    waiting += [[place] for place in places]
            failures = failures + 1 if broken and len(outcomes) == before else 0
            if broken:
                self.close()
            if failures >= STARTS:
                raise VerifierError(
                    f"the worker processes of verifier {self.name!r} do not run. They import the main script, "
                    "as multiprocessing does everywhere: put what it runs under `if __name__ == '__main__':`. "
                    "If that is so, they need more memory than memory_mb allows"
                )
        return [outcomes[place] for place in range(len(items))]

    def _limit(self, checks: int) -> float:
        """pebble's time limit of a chunk: enough for one check at its limit among ordinary ones of 100 ms."""
        return self.timeout_s + 0.5 * (checks > 1) + 0.1 * (checks - 1)

    def _submit(self, chunk: Sequence[Item]) -> Future[Any]:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, MAX_TASKS, initialize_worker, self._arguments, context)
        try:
            return self._pool.schedule(run_chunk, args=(chunk,), timeout=self._limit(len(chunk)))
        except RuntimeError as error:  # the pool broke since the last call; this future makes `_settle` replace it
            failed: Future[Any] = Future()
            failed.set_exception(BrokenProcessPool(str(error)))
            return failed

    def _end(self, future: Future[Any], checks: int, broken: bool) -> list[Verdict | str] | _End:
        try:
            outcomes, message = future.result(0 if broken else STALL_S + 2 * self._limit(checks))
        except (BrokenProcessPool, CancelledError):
            return _End.BROKEN
        except FutureTimeout:
            return _End.OVERDUE if future.done() else _End.BROKEN
        except ProcessExpired as error:
            self.last_error = f"{self.name}: a worker ended with exit code {error.exitcode}"
            return _End.DIED
        self.last_error = message or self.last_error
        return list(outcomes)


def open_pool(domain: Domain, problems: ProblemsConfig) -> VerifierPool:
    """The pool that grades by a domain, with the limits of a config. Raises VerifierError."""
    return VerifierPool(
        domain if domain.own else domain.verifier,
        answer_style=domain.prompts.answer_style,
        timeout_s=problems.verify_timeout_s,
        memory_mb=problems.verify_memory_mb,
        workers=problems.verify_workers,
    )


def make_pool(verifier: str, answer_style: str, domain: str = "") -> VerifierPool:
    """A pool by names, for exported rewards: of a domain, or of a verifier and an answer style."""
    return VerifierPool(load_domain(domain) if domain else verifier, answer_style=answer_style)


def _rows(golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None) -> list[dict[str, Any]]:
    for key, column in (columns or {}).items():
        if len(column) != len(golds):
            raise ValueError(f"column {key!r} has {len(column)} values for {len(golds)} completions")
    return [
        {**{key: column[i] for key, column in (columns or {}).items()}, "answer": gold} for i, gold in enumerate(golds)
    ]
