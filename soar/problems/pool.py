"""One verifier or one domain: completion + gold answer -> Verdict.

The named verifiers are bounded functions that cost microseconds, and run in the calling process. Reward functions (of the
shapes in docs/bring.md) and domains run in worker processes: a check over its time is `timeout`, one that raises or kills
its worker (memory, segmentation fault) is `crashed`, and none hangs the caller. A worker is a program of its own that
imports this package and what the verifier's name says. It has few environment variables, a limit of memory, and ends with
its caller.
"""

import asyncio
import inspect
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from itertools import repeat
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_COMPLETION_CHARS, extract
from soar.problems.domain import Domain, Grader, load_domain, load_function, make_problem
from soar.problems.prompts import PromptFormat
from soar.problems.sources import GOLD, PREFIX, environment
from soar.problems.verify import COMPARERS, VerifierError, as_verdict, compare_exact, compare_math
from soar.types import Problem, Reason, Rejection, Verdict, Verdicts, columns_of, said_by

MARK = "SOAR_VERIFIER_WORKER"
ORPHAN_S = 60  # beyond its time limit, after which a check ends that nobody waits for any more
KEPT = {  # environment variables that a check needs, besides LC_*: no tokens and keys
    "PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
}  # fmt: skip
BARE = frozenset({"completion", "answer"})
RUBRIC = BARE | {"prompt", "state", "task", "info", "parser"}
EXPECTED = "one number or None for each completion"
STARTS = 3  # workers that end before they are ready, until giving up
START_S = 120.0  # to import what a verifier needs
MEMORY_MB = 8_192  # a function may import torch, which reserves several gigabytes of addresses
PROGRAM = """import json, sys
sys.path[:], *arguments = json.loads(sys.argv[1])
from soar.problems.pool import serve
serve(*arguments)"""
Columns = Mapping[str, Sequence[Any]] | None
Answers = Sequence[str | None]


def refuse_in_worker() -> None:
    """Raises VerifierError in a worker, which ran what a user's script does beside defining its functions."""
    if os.environ.get(MARK):
        raise VerifierError("a verifier's file calls soar when imported: put that under `if __name__ == '__main__':`")


class _Worker:
    """A worker process and the way to it. `receive` raises TimeoutError and EOFError; the worker is of no use then."""

    def __init__(self, *arguments: Any) -> None:
        refuse_in_worker()
        self.link, there = Pipe()
        kept = {key: value for key, value in os.environ.items() if key.upper() in KEPT or key.startswith("LC_")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, json.dumps([sys.path, there.fileno(), *arguments])],
            env={**kept, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": ":backslashreplace", MARK: "1"},
            pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        there.close()

    def receive(self, seconds: float) -> dict[str, Any]:
        """What it answers. Raises VerifierError for what is wrong with the verifier."""
        if not self.link.poll(seconds):
            raise TimeoutError
        answer: dict[str, Any] = json.loads(self.link.recv_bytes())
        if "error" in answer:
            raise VerifierError(answer["error"])
        return answer

    def kill(self) -> int:
        """End the process and what it started; its exit code."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        # The link stays open until nobody waits at it: a thread that does would go on at whatever is opened next.
        return self.process.wait()


class VerifierPool(AbstractContextManager["VerifierPool"]):
    """Checks completions, gold answers and teacher texts by one verifier, or as one domain says. Threads take turns.

    verifier: a Domain; or `math`, `number`, `exact`, `choice`; or a reward function `module:function` /
    `file.py:function`: a score of `success_at` or more is correct, None or NaN unscorable.
    """

    def __init__(
        self,
        verifier: str | Domain,
        *,
        answer_style: str = "boxed",  # see `answers.extract`
        timeout_s: float = 5.0,  # of one check
        memory_mb: int | None = None,  # address space of a worker; None: MEMORY_MB; 0: no limit
        workers: int = 0,  # processes; 0: one per core and at most 8
        success_at: float = 1.0,
    ) -> None:
        if isinstance(verifier, str):
            verifier = Domain(verifier, PromptFormat("", answer_style, "", ""), verifier)  # type: ignore[arg-type]
        named = not verifier.own and verifier.verifier in COMPARERS
        if not verifier.own and not named and ":" not in verifier.verifier:
            expected = f"one of {', '.join(COMPARERS)}, module:function or file.py:function"
            raise VerifierError(f"problems.verifier = {verifier.verifier!r}: expected {expected}")
        extract("", verifier.prompts.answer_style)
        self.domain, self.name, self.success_at = verifier, verifier.label, success_at
        self.workers = workers or min(os.cpu_count() or 1, 8)
        self.compares = verifier.own or named  # answers; a reward function reads whole completions
        self.last_error: str | None = None  # of the last check that raised or lost its worker
        self.shape = ""  # of a reward function, once called
        self._grader, self._timeout_s = Grader(verifier) if named else None, timeout_s
        subject = (verifier.reference, "problems.domain") if verifier.own else (verifier.verifier, "problems.verifier")
        self._arguments = (*subject, MEMORY_MB if memory_mb is None else memory_mb, timeout_s)
        self._idle, self._live, self._closing = list[_Worker](), set[_Worker](), False
        self._turn = threading.Lock()

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next check starts new ones."""
        self._idle.clear()
        for worker in list(self._live):
            self._drop(worker)

    def check(self, completions: Sequence[str], golds: Sequence[str], columns: Columns = None) -> list[Verdict]:
        """One Verdict for each completion, in order; of a reward function `Verdicts` with its scores (0: a lost check).

        columns: further ones, each as long as completions (a domain needs `question`); the named verifiers ignore them.
        Raises ValueError for lengths that differ, VerifierError for a function that returns no numbers.
        """
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions, but {len(golds)} gold answers")
        outcomes = self._grade("check", [text[-MAX_COMPLETION_CHARS:] for text in completions], golds, columns)
        if self.compares:
            return outcomes
        verdicts = Verdicts(as_verdict(outcome, "", self.success_at) for outcome in outcomes)
        verdicts.scores = [score or 0.0 for score in _values(outcomes)]
        return verdicts

    def check_answers(self, answers: Answers, golds: Sequence[str], columns: Columns = None) -> list[Verdict]:
        """Verdicts for answers that are already extracted (None: no answer). Named verifiers and domains only."""
        if not self.compares:
            raise VerifierError(f"{self.name} reads whole completions, not answers; use check")
        return self._grade("compare", answers, golds, columns)

    def check_golds(self, golds: Sequence[str], columns: Columns = None) -> list[Verdict]:
        """Whether each gold answer can be graded: CORRECT, or UNSCORABLE. A function is given it as a completion."""
        if self.compares:
            return self._grade("gold", golds, golds, columns)
        if self.name.startswith(PREFIX):
            return [Verdict.CORRECT] * len(golds)  # only the environment knows how its completions look
        frame = "\\boxed{%s}" if self.domain.prompts.answer_style == "boxed" else "Answer: %s"
        return self.check([frame % gold for gold in golds], golds, columns)

    def faults(self, problems: Sequence[Problem]) -> list[str]:
        """What the domain says is wrong with each gold problem, "" where it names nothing or there is no domain."""
        golds = [problem.answer for problem in problems]
        if not self.domain.own:
            return [""] * len(golds)
        return [str(text or "")[:100] for text in _values(self._grade("fault", golds, golds, columns_of(problems)))]

    def usable(self, problems: Sequence[Problem]) -> list[bool]:
        """Whether each would be accepted if a teacher had written question and answer so."""
        golds = [problem.answer for problem in problems]
        return [admitted is True for admitted in self._grade("admit", golds, golds, columns_of(problems))]

    def read_answers(self, completions: Sequence[str]) -> list[str | None]:
        """The answer that each completion commits to."""
        if self.domain.read_answer is None:
            return [extract(text, self.domain.prompts.answer_style) for text in completions]
        texts = [text[-MAX_COMPLETION_CHARS:] for text in completions]
        return _values(self._grade("extract", texts, [""] * len(texts)))

    def outcomes(
        self, completions: Sequence[str], verdicts: Sequence[Verdict], ended: Sequence[bool], golds: Sequence[str]
    ) -> list[tuple[str, str | None]]:
        """What came of each attempt, and the answer that is read in it.

        One of right, wrong, no answer, cut off, not judged; refused: the answer equals the gold one, and the verifier says
        no all the same; runs on: cut off behind its answer.
        """
        same = compare_exact if self.domain.own else compare_math

        def outcome(verdict: Verdict, end: bool, answer: str | None, gold: str) -> str:
            if verdict not in (Verdict.WRONG, Verdict.NO_ANSWER):
                return "right" if verdict.solved else "not judged"
            if answer is None:
                return "no answer" if end else "cut off"
            return "refused" if same(answer, gold).solved else "wrong" if end else "runs on"

        answers = self.read_answers(completions)
        return list(zip(map(outcome, verdicts, ended, answers, golds), answers, strict=True))

    def solve(self, questions: Sequence[str]) -> list[str | None]:
        """The domain's own answers; None where it has none, or its solver failed."""
        return _values(self._grade("solve", questions, [""] * len(questions)))

    def read_problems(self, texts: Sequence[str], truncated: Sequence[bool]) -> list[Problem | Rejection]:
        """The problem in each teacher text, or why there is none."""
        if not self.domain.own:
            grader = Grader(self.domain)
            return [grader.read(text, cut) for text, cut in zip(texts, truncated, strict=True)]
        cut_texts, read = [text[:MAX_COMPLETION_CHARS] for text in texts], list[Problem | Rejection]()
        outcomes = self._grade("read", cut_texts, [""] * len(texts), {"truncated": truncated})
        for text, given in zip(texts, outcomes, strict=True):
            if isinstance(given, Verdict):
                read.append(Rejection(Reason.READER_FAILED, text, "reader_timeout" if given is Verdict.TIMEOUT else ""))
            elif "reason" in given:
                read.append(Rejection(Reason(given["reason"]), text, given["detail"]))
            else:
                read.append(make_problem(given["question"], given["answer"]))
        return read

    def _grade(self, task: str, texts: Answers, golds: Sequence[str], columns: Columns = None) -> list[Any]:
        """The verdict or value of each check. Raises ValueError, and VerifierError; the workers are gone then."""
        columns = {**(columns or {}), "answer": golds}
        for key, column in columns.items():
            if len(column) != len(texts):
                raise ValueError(f"column {key!r} has {len(column)} values for {len(texts)} completions")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if self._grader is not None:
            return list(map(self._grader, repeat(task), texts, rows))
        with self._turn, ThreadPoolExecutor(max(1, min(self.workers, len(texts)))) as threads:
            self._closing = False
            try:
                return list(threads.map(self._ask, zip(repeat(task), texts, rows)))
            except BaseException:
                self._closing = True
                self.close()
                raise

    def _ask(self, item: tuple[str, str | None, dict[str, Any]]) -> Any:
        """One check. One that is lost with its worker is tried once more."""
        for _ in range(2):
            worker = self._start()
            try:
                worker.link.send(item)
                answer = worker.receive(self._timeout_s)
            except TimeoutError:
                self._drop(worker)
                self.last_error = f"{self.name}: no answer in {self._timeout_s:g} s (problems.verify_timeout_s)"
                return Verdict.TIMEOUT
            except (EOFError, OSError):  # the system may have killed it for a neighbour's memory
                self.last_error = f"{self.name}: a worker ended with exit code {self._drop(worker)}"
                continue
            self.last_error = answer.get("message") or self.last_error
            self._idle.append(worker)
            return Verdict(answer["verdict"]) if "verdict" in answer else answer["value"]
        return Verdict.CRASHED

    def _start(self) -> _Worker:
        """A worker that waits for checks. Raises VerifierError."""
        with suppress(IndexError):  # another thread may have taken the last one
            while (worker := self._idle.pop()).process.poll() is not None:
                self._drop(worker)
            return worker
        for _ in range(0 if self._closing else STARTS):
            worker = _Worker(*self._arguments)
            self._live.add(worker)
            with suppress(EOFError, OSError):
                self.shape = worker.receive(START_S)["shape"]
                return worker
        workers = f"the worker processes of verifier {self.name!r}"
        raise VerifierError(f"{workers} do not start; they may need more memory than memory_mb allows")

    def _drop(self, worker: _Worker) -> int:
        self._live.discard(worker)
        return worker.kill()


def _values(outcomes: Sequence[Any]) -> list[Any]:
    """What each check gave; None for one that was lost or failed, of which there is a verdict alone."""
    return [None if isinstance(value, Verdict) else value for value in outcomes]


def open_pool(domain: Domain, problems: ProblemsConfig) -> VerifierPool:
    """The pool that grades by a domain, with the limits of a config. Raises VerifierError."""
    seconds, workers = max(problems.verify_timeout_s, domain.seconds), problems.verify_workers
    more: dict[str, Any] = {"memory_mb": problems.verify_memory_mb, "success_at": problems.success_at}
    return VerifierPool(domain, timeout_s=seconds, workers=workers, **more)


def make_pool(verifier: str, answer_style: str, domain: str = "", **limits: Any) -> VerifierPool:
    """A pool by names, for `soar verify` and exported rewards: of a domain, or of a verifier and an answer style."""
    return VerifierPool(load_domain(domain) if domain else verifier, answer_style=answer_style, **limits)


def _parse_answer(completion: Any) -> str | None:
    """What rubric functions ask of the parser of a verifiers environment."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return extract(text, "boxed") or extract(text, "marker")


class Reward(NamedTuple):
    """A reward function with its shape. takes: names of its parameters, None for any. chat: it reads messages."""

    function: Callable[..., Any]
    name: str
    shape: str
    takes: frozenset[str] | None
    chat: bool

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """What the function gives for one completion; None where it cannot decide. row: the columns, with `answer`.

        Raises VerifierError for a value of another shape, and what the function raises.
        """
        gold, question = str(row["answer"]), str(row.get("question", ""))
        if self.function.__module__.startswith("trl.") and "\\" in gold and "$" not in gold:
            gold = f"${gold}$"  # math-verify finds bare LaTeX only between dollar signs
        prompt: Any = [{"role": "user", "content": question}] if self.chat else question
        reply: Any = [{"role": "assistant", "content": completion}] if self.chat else completion
        given: dict[str, Any] = {**dict.fromkeys(GOLD, gold), **row, "answer": gold}
        if self.shape.startswith("plain") and self.takes != BARE:
            return self._score(self.function(completion, gold))
        if self.shape == "verl":
            given = {"data_source": "", "extra_info": {}, **given, "solution_str": completion, "ground_truth": gold}
        elif self.shape == "TRL":
            given |= {"completion_ids": row.get("completion_ids") or [], "prompts": prompt, "completions": reply}
            given = {key: [value] for key, value in given.items()}
            given |= {"trainer_state": None, **dict.fromkeys(("log_extra", "log_metric"), lambda *_, **__: None)}
        else:
            given = {"task": "default", "info": {}, **given, "prompt": prompt, "completion": reply}
            given |= {"state": dict(given), "parser": types.SimpleNamespace(parse_answer=_parse_answer)}
        return self._score(self.function(**{k: v for k, v in given.items() if self.takes is None or k in self.takes}))

    def _score(self, value: Any) -> float | None:
        if inspect.isawaitable(value):
            value = asyncio.run(asyncio.wait_for(value, None))
        if self.shape == "TRL":
            if isinstance(value, str | bytes) or not hasattr(value, "__len__") or len(value) != 1:
                said = f"{self.name} returned {value!r:.80} for 1 completion"
                raise VerifierError(f"{said}; expected a list of {EXPECTED}")
            value = value[0]
        value = value["score"] if isinstance(value, dict) and "score" in value else value
        if value is None:
            return None
        if isinstance(value, str | bytes) or not hasattr(value, "__float__") or math.isinf(value):
            raise VerifierError(f"{self.name} returned a {type(value).__name__} ({value!r:.80}); expected {EXPECTED}")
        return None if math.isnan(value) else float(value)


def adapt(function: Callable[..., Any], name: str) -> Reward:
    """A function with the shape that its parameters tell. Raises VerifierError naming the shapes."""
    signature = inspect.signature(function)
    named = {k: p for k, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    needed = {key for key, p in named.items() if p.default is p.empty}
    subject = next((named[key].annotation for key in ("completions", "completion") if key in named), "")
    if {"solution_str", "ground_truth"} <= named.keys():
        shape = "verl"
    elif named.keys() & {"completions", "completion_ids"}:
        shape = "TRL"
    elif "completion" in named and needed <= RUBRIC:
        shape = "verifiers"
    elif len(needed) == 2 and "trace" not in needed:
        shape = "plain"
    else:
        verl = "of verl's compute_score (data_source, solution_str, ground_truth, extra_info)"
        rubric = "of a rubric function of verifiers (completion, answer, state ...), or (completion, answer)"
        raise VerifierError(f"{name}{signature}: expected the shape of TRL (completions, **columns), {verl}, {rubric}")
    inner = inspect.unwrap(getattr(function, "func", function))
    inner = inner if inspect.isroutine(inner) else type(inner).__call__
    code, around = getattr(inner, "__code__", None), getattr(inner, "__globals__", {})
    chat = _mentions(code, "content", around) if subject is signature.empty else re.search("dict|Message", str(subject))
    takes = None if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()) else frozenset(named)
    shape = "plain" if takes == BARE and not chat else shape
    if shape == "plain" and next(iter(named)) in GOLD[2:]:  # that name says so, unlike answer and solution
        return Reward(lambda reply, gold: function(gold, reply), name, "plain, gold answer first", None, False)
    return Reward(function, name, shape, takes, bool(chat) and shape in ("TRL", "verifiers"))


def _mentions(code: Any, text: str, around: dict[str, Any]) -> bool:
    """Whether the code of a function holds a text, in functions inside of it and those of `around` that it names too."""
    if not isinstance(code, types.CodeType):
        return False
    named = [getattr(around.get(name), "__code__", None) for name in code.co_names]
    inside = any(constant == text or _mentions(constant, text, around) for constant in code.co_consts)
    return inside or any(_mentions(helper, text, {}) for helper in named)


def serve(descriptor: int, name: str, key: str, memory_mb: int, timeout_s: float) -> None:
    """Do checks until the caller is gone: `(task, text, row)` -> a JSON object, since a check may have run anything.

    It holds `verdict` or `value`, and a `message` where it failed; `error` for what is wrong with the verifier.
    """
    os.dup2(2, 1)  # what a user's function prints belongs to no table of its caller
    link, check, shape = Connection(descriptor), None, ""
    try:
        if key == "problems.domain":
            check = Grader(load_domain(name))
        else:
            reward = adapt(environment(name) if name.startswith(PREFIX) else load_function(name), name)
            shape = f"{reward.shape}, {'messages' if reward.chat else 'texts'}"
        answer = json.dumps({"shape": shape}).encode()
    except Exception as error:  # whatever a user's module raises on import must reach the user by name
        message = f"{key} = {name!r} cannot be loaded: {said_by(error)}"
        return link.send_bytes(json.dumps({"error": message}).encode())
    with suppress(ValueError, OSError):  # macOS refuses a limit on the address space; a stricter one stays
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        if memory_mb:
            resource.setrlimit(resource.RLIMIT_AS, (memory_mb * 2**20, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with suppress(EOFError, OSError):
        while True:
            link.send_bytes(answer)
            task, text, row = link.recv()
            signal.alarm(int(10 * timeout_s) + ORPHAN_S)  # for a check that outlives its caller
            try:
                result = check(task, text, row) if check else reward(text, row)
                answer = json.dumps({"verdict" if isinstance(result, Verdict) else "value": result}).encode()
            except VerifierError as error:
                answer = json.dumps({"error": str(error)}).encode()
            except (Exception, SystemExit) as error:  # a check may fail in any way; that is its verdict
                file = name.rpartition(":")[0].removesuffix(".py").replace(".", "/").rpartition("/")[2]
                lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).stem == file]
                message = f"{name}{f', line {lines[-1]}' if lines else ''}: {said_by(error)}"[:500]
                answer = json.dumps({"verdict": Verdict.CRASHED, "message": message}).encode()
            signal.alarm(0)
