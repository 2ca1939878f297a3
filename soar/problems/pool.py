"""One verifier or one domain in worker processes that can be killed: completion + gold answer -> Verdict.

A check never hangs the caller and is never `correct` by accident: one over its time is `timeout`, one that raises or kills
its worker (memory, segmentation fault) is `crashed`. Workers are programs of their own (`worker.py`) for reward functions and
domains; the named verifiers are bounded functions that cost microseconds, and run in the calling process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_COMPLETION_CHARS, TOTALS, extract
from soar.problems.domain import Domain, load_domain
from soar.problems.parse import MAX_TEACHER_CHARS, make_problem, parse
from soar.problems.prompts import PromptFormat
from soar.problems.verify import COMPARERS, NAMES, VerifierError, is_parsable, judge_gold
from soar.problems.worker import MARK, kept_environment
from soar.types import Problem, Reason, Rejection, Verdict, Verdicts, columns_of

STARTS = 3  # workers that end before they are ready, until giving up
START_S = 120.0  # to import what a verifier needs
PATIENCE = 5  # times its limit that a check may take which waits for a processor rather than for its end
MEMORY_MB = 8_192  # a function may import torch, which reserves several gigabytes of addresses
PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from soar.problems.worker import serve
serve(int(sys.argv[2]))
"""

Item = tuple[str, Any, Any]  # task, text, and the gold answer or the row with it
Columns = Mapping[str, Sequence[Any]] | None


class _Worker:
    """A worker process and the way to it. `ask` raises TimeoutError and EOFError; the worker is of no use then."""

    def __init__(self, subject: str, key: str, memory_mb: int, timeout_s: float) -> None:
        if os.environ.get(MARK):
            raise VerifierError(
                "a verifier's file calls soar when imported: put that under `if __name__ == '__main__':`"
            )
        self.link, there = Pipe()
        self.timeout_s = timeout_s
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(sys.path), str(there.fileno())], pass_fds=[there.fileno()],
            env=kept_environment(), stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        there.close()
        script = getattr(sys.modules["__main__"], "__file__", None)
        try:
            self.link.send((subject, key, memory_mb, str(Path(script).resolve()) if script else "", timeout_s))
            self._receive(START_S)
        except BaseException:
            self.kill()
            raise

    def ask(self, item: Item) -> tuple[Any, str | None]:
        """The verdict or value of a check and its error message. Raises VerifierError for what is wrong with the verifier."""
        self.link.send(item)
        answer = self._receive(self.timeout_s)
        return Verdict(answer["verdict"]) if "verdict" in answer else answer["value"], answer.get("message")

    def _receive(self, seconds: float) -> Any:
        spent, last = self._cpu_s(), time.monotonic() + PATIENCE * seconds
        while not self.link.poll(seconds):
            used = self._cpu_s() - spent
            if not seconds / 20 < used < seconds / 2 or time.monotonic() > last:  # it ran, or it sleeps
                raise TimeoutError
        answer = json.loads(self.link.recv_bytes())
        if "error" in answer:
            raise VerifierError(answer["error"])
        return answer

    def _cpu_s(self) -> float:
        """CPU seconds of the process, 0 where the system does not say."""
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def kill(self) -> int:
        """End the process and what it started; its exit code."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.link.close()
        return self.process.wait()


class VerifierPool:
    """Checks completions, gold answers and teacher texts by one verifier, or as one domain says.

    verifier: a Domain of `load_domain`; or `math`, `number`, `exact`, `choice`; or a reward function `module:function` /
    `file.py:function`: a score of `success_at` or more is correct, None or NaN unscorable. answer_style: see
    `answers.extract`. timeout_s: of one check. memory_mb: address space of a worker; None: 8,192; 0: no limit. workers: 0:
    one per core and at most 8; they start at the first check that needs one. last_error: message of the last check that
    raised or lost its worker. Threads take turns. Use it as a context manager, or call `close`. Raises VerifierError.
    """

    def __init__(
        self,
        verifier: str | Domain,
        *,
        answer_style: str = "boxed",
        timeout_s: float = 5.0,
        memory_mb: int | None = None,
        workers: int = 0,
        success_at: float = 1.0,
    ) -> None:
        self.domain = None if isinstance(verifier, str) else verifier
        if isinstance(verifier, Domain):
            self.name, answer_style = verifier.label, verifier.prompts.answer_style
            subject, key = verifier.reference, "problems.domain"
        elif verifier in NAMES or ":" in verifier:
            self.name, subject, key = verifier, verifier, "problems.verifier"
        else:
            expected = f"one of {', '.join(NAMES)}, module:function or file.py:function"
            raise VerifierError(f"problems.verifier = {verifier!r}: expected {expected}")
        extract("", answer_style)
        self.answer_style, self.success_at = answer_style, success_at
        self.workers = workers or min(os.cpu_count() or 1, 8)
        self.last_error: str | None = None
        self._arguments = (subject, key, MEMORY_MB if memory_mb is None else memory_mb, timeout_s)
        self._idle, self._live, self._closing = list[_Worker](), set[_Worker](), False
        self._turn = threading.Lock()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next check starts new ones."""
        self._idle.clear()
        for worker in list(self._live):
            self._drop(worker)

    @property
    def compares(self) -> bool:
        """Whether answers can be compared (`check_answers`); a user function reads whole completions."""
        return self.domain is not None or self.name in NAMES

    def check(self, completions: Sequence[str], golds: Sequence[str], columns: Columns = None) -> list[Verdict]:
        """One Verdict for each completion, in order; of a reward function `Verdicts` with its scores (0 for a lost check).

        columns: further columns, each as long as completions (a domain needs `question`); the named verifiers ignore them.
        Raises ValueError for lengths that differ, VerifierError when a function returns something else than numbers.
        """
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions, but {len(golds)} gold answers")
        if self.name in NAMES:
            return self.check_answers(self.read_answers(completions), golds)
        outcomes = self._grade("check", [text[-MAX_COMPLETION_CHARS:] for text in completions], golds, columns)
        if self.domain is not None:
            return outcomes
        verdicts = Verdicts(
            o
            if isinstance(o, Verdict)
            else (Verdict.UNSCORABLE if o is None else Verdict.CORRECT if o >= self.success_at else Verdict.WRONG)
            for o in outcomes
        )
        verdicts.scores = [score or 0.0 for score in _values(outcomes)]
        return verdicts

    def check_answers(
        self, answers: Sequence[str | None], golds: Sequence[str], columns: Columns = None
    ) -> list[Verdict]:
        """Verdicts for answers that are already extracted (None: no answer). Named verifiers and domains only."""
        if not self.compares:
            raise VerifierError(f"{self.name} reads whole completions, not answers; use check")
        if self.domain is not None:
            return self._grade("compare", answers, golds, columns)
        pairs = zip(answers, golds, strict=True)
        return [Verdict.NO_ANSWER if a is None else COMPARERS[self.name](a, gold) for a, gold in pairs]

    def check_golds(self, golds: Sequence[str], columns: Columns = None) -> list[Verdict]:
        """Whether each gold answer can be graded: CORRECT, or UNSCORABLE where the verifier cannot read it (`math` compares a
        few words as text) or the domain's `validate` names something. A function is given it as a completion."""
        if self.domain is not None:
            return self._grade("gold", golds, golds, columns)
        if self.answer_style == "totals" and self.name in NAMES:
            return [Verdict.CORRECT if TOTALS.fullmatch(gold) else Verdict.UNSCORABLE for gold in golds]
        if self.name in NAMES:
            return [judge_gold(gold, self.name) for gold in golds]
        frame = "\\boxed{%s}" if self.answer_style == "boxed" else "Answer: %s"
        return self.check([frame % gold for gold in golds], golds, columns)

    def faults(self, problems: Sequence[Problem]) -> list[str]:
        """What the domain says is wrong with each gold problem, "" where it names nothing or there is no domain."""
        if self.domain is None:
            return [""] * len(problems)
        golds = [problem.answer for problem in problems]
        return [str(text or "")[:100] for text in _values(self._grade("fault", golds, golds, columns_of(problems)))]

    def read_answers(self, completions: Sequence[str]) -> list[str | None]:
        """The answer that each completion commits to."""
        if self.domain is None or self.domain.read_answer is None:
            return [extract(text, self.answer_style) for text in completions]
        return _values(self._outcomes([("extract", text[-MAX_COMPLETION_CHARS:], {}) for text in completions]))

    def solve(self, questions: Sequence[str]) -> list[str | None]:
        """The domain's own answers; None where it has none, or its solver failed."""
        return _values(self._outcomes([("solve", question, {}) for question in questions]))

    def read_problems(
        self, texts: Sequence[str], truncated: Sequence[bool], prompts: PromptFormat | None = None
    ) -> list[Problem | Rejection]:
        """The problem in each teacher text, or why there is none.

        truncated: the text hit its token budget. prompts: the format, where there is no domain.
        """
        pairs = list(zip(texts, truncated, strict=True))
        if self.domain is None:
            if prompts is None:
                raise ValueError(f"verifier {self.name} has no prompts of its own; pass `prompts`")
            outcomes = [parse(text, prompts, truncated=cut) for text, cut in pairs]
            return [
                Rejection(Reason.UNPARSABLE_ANSWER, text)
                if isinstance(outcome, Problem) and not is_parsable(outcome.answer, self.name)
                else outcome
                for text, outcome in zip(texts, outcomes, strict=True)
            ]
        tasks = [("read", text[:MAX_TEACHER_CHARS], {"truncated": cut}) for text, cut in pairs]
        return [_outcome(text, given) for text, given in zip(texts, self._outcomes(tasks), strict=True)]

    def _grade(self, task: str, texts: Sequence[str | None], golds: Sequence[str], columns: Columns) -> list[Any]:
        columns = columns or {}
        for key, column in columns.items():
            if len(column) != len(golds):
                raise ValueError(f"column {key!r} has {len(column)} values for {len(golds)} completions")
        rows = [{**{key: columns[key][i] for key in columns}, "answer": gold} for i, gold in enumerate(golds)]
        return self._outcomes([(task, text, row) for text, row in zip(texts, rows, strict=True)])

    def _outcomes(self, items: Sequence[Item]) -> list[Any]:
        """The verdict or value of each check. Raises VerifierError; the workers are gone then."""
        if not items:
            return []
        with self._turn, ThreadPoolExecutor(min(self.workers, len(items))) as threads:
            self._closing = False
            try:
                return list(threads.map(self._ask, items))
            except BaseException:
                self._closing = True
                self.close()
                raise

    def _ask(self, item: Item) -> Any:
        """One check. One that is lost with its worker is tried once more."""
        for _ in range(2):
            worker = self._start()
            try:
                outcome, message = worker.ask(item)
            except TimeoutError:
                self._drop(worker)
                return Verdict.TIMEOUT
            except (EOFError, OSError):  # the system may have killed it for a neighbour's memory
                self.last_error = f"{self.name}: a worker ended with exit code {self._drop(worker)}"
                continue
            self.last_error = message or self.last_error
            self._idle.append(worker)
            return outcome
        return Verdict.CRASHED

    def _start(self) -> _Worker:
        """A worker that waits for checks. Raises VerifierError."""
        with suppress(IndexError):  # another thread may have taken the last one
            while worker := self._idle.pop():
                if worker.process.poll() is None:
                    return worker
                self._drop(worker)
        for _ in range(0 if self._closing else STARTS):
            with suppress(EOFError, OSError):
                worker = _Worker(*self._arguments)
                self._live.add(worker)
                return worker
        raise VerifierError(
            f"the worker processes of verifier {self.name!r} do not start; they may need more memory than memory_mb allows"
        )

    def _drop(self, worker: _Worker) -> int:
        self._live.discard(worker)
        return worker.kill()


def _values(outcomes: Sequence[Any]) -> list[Any]:
    """The text that each function of the domain gave; None for none, and for one that failed."""
    return [None if isinstance(value, Verdict) else value for value in outcomes]


def _outcome(text: str, given: Any) -> Problem | Rejection:
    """What a domain's reader in a worker made of a teacher text."""
    if isinstance(given, Verdict):
        return Rejection(Reason.READER_FAILED, text, "reader_timeout" if given is Verdict.TIMEOUT else "")
    if "reason" in given:
        return Rejection(Reason(given["reason"]), text, given["detail"])
    return make_problem(given["question"], given["answer"])


def open_pool(domain: Domain, problems: ProblemsConfig) -> VerifierPool:
    """The pool that grades by a domain, with the limits of a config. Raises VerifierError."""
    return VerifierPool(
        domain if domain.own else domain.verifier,
        answer_style=domain.prompts.answer_style,
        timeout_s=max(problems.verify_timeout_s, domain.seconds),
        memory_mb=problems.verify_memory_mb,
        workers=problems.verify_workers,
        success_at=problems.success_at,
    )


def make_pool(verifier: str, answer_style: str, domain: str = "") -> VerifierPool:
    """A pool by names, for exported rewards: of a domain, or of a verifier and an answer style."""
    return VerifierPool(load_domain(domain) if domain else verifier, answer_style=answer_style)
