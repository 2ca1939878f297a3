"""One verifier or one domain in worker processes that can be killed: completion + gold answer -> Verdict.

A check never hangs the caller, never runs model-written text in it, and is never `correct` by accident: one over its time is
`timeout`, one that raises or kills its worker (memory, segmentation fault) is `crashed`. Workers are programs of their own
(`worker.py`) that do one check at a time. `exact`, `number`, `choice` and nearly all of `math` are bounded functions that
cost microseconds, so they run in the calling process (`verify.py`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_COMPLETION_CHARS, TOTALS, extract
from soar.problems.domain import Domain, load_domain
from soar.problems.parse import MAX_TEACHER_CHARS, make_problem, parse_all, refuse_duplicates
from soar.problems.prompts import PromptFormat
from soar.problems.verify import COMPARERS, NAMES, VerifierError, is_value, judge_gold
from soar.problems.worker import MARK, kept_environment
from soar.types import Problem, Reason, Rejection, Verdict, Verdicts, columns_of

MAX_CHECKS = 5_000  # of one worker, so that caches cannot fill its memory
STARTS = 3  # workers that end before they are ready, until giving up
START_S = 120.0  # to import what a verifier needs
PATIENCE = 5  # times its limit that a check may take which waits for a processor rather than for its end
CACHE_SIZE = 200_000
MATH_MEMORY_MB = 1_024
FUNCTION_MEMORY_MB = 8_192  # a function may import torch, which reserves several gigabytes of addresses
PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from soar.problems.worker import serve
serve(int(sys.argv[2]))
"""

Item = tuple[str, str, Any]


class _Worker:
    """A worker process and the way to it. `ask` raises TimeoutError and EOFError; the worker is of no use then."""

    def __init__(self, subject: str, key: str, memory_mb: int, timeout_s: float) -> None:
        if os.environ.get(MARK):
            raise VerifierError(
                "a verifier's file calls soar when it is imported: put that under `if __name__ == '__main__':`"
            )
        self.link, there = Pipe()
        self.timeout_s, self.checks = timeout_s, 0
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

    def alive(self) -> bool:
        """Whether the process is still there."""
        return self.process.poll() is None

    def ask(self, item: Item) -> tuple[Verdict | str, str | None]:
        """The outcome of a check and its error message. Raises VerifierError for what is wrong with the verifier itself."""
        self.checks += 1
        self.link.send(item)
        is_verdict, outcome, message = self._receive(self.timeout_s)
        return Verdict(outcome) if is_verdict else outcome, message

    def _receive(self, seconds: float) -> Any:
        spent, last = self._cpu_s(), time.monotonic() + PATIENCE * seconds
        while not self.link.poll(seconds):
            used = self._cpu_s() - spent
            if not seconds / 20 < used < seconds / 2 or time.monotonic() > last:  # it ran, or it sleeps
                raise TimeoutError
        answer = json.loads(self.link.recv_bytes())
        if isinstance(answer, dict):
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

    verifier: a Domain of `load_domain`; or `math` (math-verify), `number`, `exact`, `choice`; or a function
    `module:function` / `file.py:function` in one of the shapes of `worker.adapt`, called with one completion at a time: a
    score of `success_at` or more is correct, None or NaN is unscorable. answer_style: see `answers.extract`; a domain has
    its own. timeout_s: seconds for one check.
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
        success_at: float = 1.0,
    ) -> None:
        self.success_at = success_at
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
        self._arguments = (subject, key, memory_mb, timeout_s)
        self._verdicts: dict[Item, Verdict] = {}
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

    def check(
        self, completions: Sequence[str], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """One Verdict for each completion, in order; of a reward function `Verdicts` with its scores.

        columns: further columns, each as long as completions (a domain needs `question`); the named verifiers ignore them.
        Raises ValueError for lengths that differ, VerifierError when a function returns something else than numbers.
        """
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions, but {len(golds)} gold answers")
        if self.name in NAMES:
            return self.check_answers(self.read_answers(completions), golds)
        texts = [text[-MAX_COMPLETION_CHARS:] for text in completions]
        if self.domain is not None:
            return self._grade("check", texts, golds, columns)
        rows = _rows(golds, columns)
        return self._verdicts_of(self._outcomes([("check", text, row) for text, row in zip(texts, rows, strict=True)]))

    def _verdicts_of(self, outcomes: Sequence[Verdict | str]) -> Verdicts:
        """Verdicts on the scores of a reward function; a lost check scores 0, as an undecided one."""
        scores = [None if isinstance(outcome, Verdict) else json.loads(outcome) for outcome in outcomes]
        verdicts = Verdicts(
            outcome
            if isinstance(outcome, Verdict)
            else Verdict.UNSCORABLE
            if score is None
            else Verdict.CORRECT
            if score >= self.success_at
            else Verdict.WRONG
            for outcome, score in zip(outcomes, scores, strict=True)
        )
        verdicts.scores = [score or 0.0 for score in scores]
        return verdicts

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
            waiting, outcomes = deque(range(len(items))), dict[int, Verdict | str]()
            self._closing, count = False, min(self.workers, len(items))
            with ThreadPoolExecutor(max(1, count)) as threads:
                served = [threads.submit(self._serve, items, waiting, outcomes) for _ in range(count)]
                try:
                    wait(served, return_when=FIRST_EXCEPTION)
                    for future in served:
                        future.result()
                except BaseException:
                    self._closing = True
                    self.close()
                    raise
            return [outcomes[place] for place in range(len(items))]

    def _serve(self, items: Sequence[Item], waiting: deque[int], outcomes: dict[int, Verdict | str]) -> None:
        """Do waiting checks with one worker after another. A check that is lost with its worker is tried once more."""
        worker: _Worker | None = None
        tried = -1
        while waiting and not self._closing:
            with suppress(IndexError):  # another thread may have taken the last one
                place = waiting.popleft()
                worker = worker or self._start()
                try:
                    outcomes[place], message = worker.ask(items[place])
                    self.last_error = message or self.last_error
                    if worker.checks < MAX_CHECKS:
                        continue
                    self._drop(worker)
                except TimeoutError:
                    outcomes[place] = Verdict.TIMEOUT
                    self._drop(worker)
                except (EOFError, OSError):  # the system may have killed it for a neighbour's memory
                    outcomes[place] = Verdict.CRASHED
                    self.last_error = f"{self.name}: a worker ended with exit code {self._drop(worker)}"
                    if tried != place:
                        waiting.appendleft(place)
                    tried = place
                worker = None
        if worker is not None:
            self._idle.append(worker)

    def _start(self) -> _Worker:
        """A worker that waits for checks. Raises VerifierError."""
        while self._idle:
            worker = self._idle.pop()
            if worker.alive():
                return worker
            self._drop(worker)
        for _ in range(STARTS):
            if self._closing:
                break
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


def _rows(golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None) -> list[dict[str, Any]]:
    for key, column in (columns or {}).items():
        if len(column) != len(golds):
            raise ValueError(f"column {key!r} has {len(column)} values for {len(golds)} completions")
    return [
        {**{key: column[i] for key, column in (columns or {}).items()}, "answer": gold} for i, gold in enumerate(golds)
    ]
