"""A verifier worker: a program of its own that does one check at a time, started by `pool.py`.

It imports this package and what the verifier's name says, never the script of its caller. It keeps few environment variables,
limits its address space, and ends with its caller.

A reward function of a user's is taken as it comes (`adapt`). The shape is told from the names of the parameters:

    TRL        (prompts, completions, completion_ids, **columns) -> list of numbers or None, one for each completion
    verl       compute_score(data_source, solution_str, ground_truth, extra_info) -> number, or a dict with `score`
    verifiers  (prompt, completion, answer, state, task, info, parser), any of them -> number
    plain      (completion, answer), under any names -> number or bool

Each may be `async`. Completions and prompts are chat messages where an annotation says so (`list[dict]`, `Messages`), or,
without one, where the function mentions `content`; else texts. A function gets one completion at a time.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from soar.problems import domain
from soar.problems.answers import extract
from soar.problems.verify import VerifierError
from soar.types import Verdict

MARK = "SOAR_VERIFIER_WORKER"
ORPHAN_S = 60  # beyond its time limit, after which a check ends that nobody waits for any more
KEPT = {
    "PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
}  # fmt: skip

Check = Callable[[str, str, Any], Verdict | str]


def kept_environment() -> dict[str, str]:
    """The environment variables that a check needs: no tokens and keys."""
    kept = {key: value for key, value in os.environ.items() if key.upper() in KEPT or key.startswith("LC_")}
    return {**kept, "OMP_NUM_THREADS": "1", MARK: "1"}


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


def load_check(name: str, key: str) -> Check:
    """The check of a verifier or a domain. Raises what a user's module raises."""
    if key == "problems.domain":
        return domain.Grader(domain.load_domain(name))
    if ":" not in name:
        from soar.problems.symbolic import check_symbolic

        check_symbolic("math", r"\int x^2 dx", r"\int x dx")  # sympy loads half of itself at the first comparison
        return check_symbolic
    reward = adapt(domain.load_function(name), name)
    return lambda task, completion, row: json.dumps(reward(completion, row))


RUBRIC = {"prompt", "completion", "answer", "state", "task", "info", "parser"}
GOLD = ("answer", "solution", "ground_truth", "expected_answer", "target", "gold", "label", "reference")
EXPECTED = "one number or None for each completion"


class _Parser:
    """What rubric functions ask of the parser of a verifiers environment."""

    def parse_answer(self, completion: Any) -> str | None:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        return extract(text, "boxed") or extract(text, "marker")


@dataclass(frozen=True)
class Reward:
    """A reward function with its shape. takes: names of its parameters, None for any. chat: it reads messages."""

    function: Callable[..., Any]
    name: str
    shape: str
    takes: frozenset[str] | None
    chat: bool

    def __str__(self) -> str:
        reads = "chat messages" if self.chat else "text"
        return f"{self.name} is a reward function in the shape of {self.shape}; it gets completions as {reads}"

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
        if self.shape == "plain":
            return self._score(self.function(completion, gold))
        if self.shape == "verl":
            given = {"data_source": "", "extra_info": {}, **given, "solution_str": completion, "ground_truth": gold}
        elif self.shape == "TRL":
            given |= {"completion_ids": row.get("completion_ids") or [], "prompts": prompt, "completions": reply}
            given = {key: [value] for key, value in given.items()}
            given |= {"trainer_state": None, "log_extra": _ignore, "log_metric": _ignore}
        else:
            given = {"task": "default", "info": {}, **given, "prompt": prompt, "completion": reply}
            given |= {"state": dict(given), "parser": _Parser()}
        return self._score(self.function(**{k: v for k, v in given.items() if self.takes is None or k in self.takes}))

    def _score(self, value: Any) -> float | None:
        if inspect.isawaitable(value):
            value = asyncio.run(_result(value))
        if self.shape == "TRL":
            if isinstance(value, str | bytes) or not hasattr(value, "__len__"):
                raise VerifierError(f"{self.name} returned {type(value).__name__}; expected a list with {EXPECTED}")
            if len(value) != 1:
                raise VerifierError(f"{self.name} returned {len(value)} values for 1 completion; expected {EXPECTED}")
            value = value[0]
        value = value.get("score") if isinstance(value, dict) else value
        if value is None:
            return None
        if isinstance(value, str | bytes) or not hasattr(value, "__float__") or math.isinf(value):
            raise VerifierError(f"{self.name} returned a {type(value).__name__} ({value!r:.80}); expected {EXPECTED}")
        return None if math.isnan(value) else float(value)


def _ignore(*_: Any, **__: Any) -> None:
    """Stands for the logging functions of TRL's trainer."""


async def _result(value: Any) -> Any:
    return await value


def adapt(function: Callable[..., Any], name: str) -> Reward:
    """A function with the shape that its parameters tell. Raises VerifierError naming the shapes."""
    signature = inspect.signature(function)
    rest = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    named = {key: p for key, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    needed = {key for key, p in named.items() if p.default is p.empty}
    subject = next((named[key].annotation for key in ("completions", "completion") if key in named), "")
    chat = bool(re.search(r"dict|Message", str(subject)))
    if subject is inspect.Parameter.empty:
        chat = _mentions(function, "content")
    takes = None if rest else frozenset(named)
    if {"solution_str", "ground_truth"} <= named.keys():
        return Reward(function, name, "verl", takes, False)
    if named.keys() & {"completions", "completion_ids"}:
        return Reward(function, name, "TRL", takes, chat)
    if "completion" in named and needed <= RUBRIC:
        return Reward(function, name, "verifiers", takes, chat)
    if len(needed) == 2:
        return Reward(function, name, "plain", takes, False)
    raise VerifierError(
        f"{name}{signature}: expected the shape of TRL (completions, **columns), of verl's compute_score (data_source, "
        "solution_str, ground_truth, extra_info), of a rubric function of verifiers (completion, answer, state ...), or "
        "(completion, answer)"
    )


def _mentions(function: Any, text: str) -> bool:
    """Whether the code of a function holds a text, in functions inside of it too."""
    function = inspect.unwrap(getattr(function, "func", function))
    codes = [getattr(function if inspect.isroutine(function) else type(function).__call__, "__code__", None)]
    while codes:
        constants = getattr(codes.pop(), "co_consts", ())
        if text in constants:
            return True
        codes += [constant for constant in constants if isinstance(constant, types.CodeType)]
    return False


def serve(descriptor: int) -> None:
    """Do checks until the caller is gone. The first message is (name, key, memory_mb, script, timeout_s); then come checks.

    Answers are JSON, since a check may have run anything: [whether it is a verdict, verdict or text, message or null], or
    {"error": message} for what is wrong with the verifier itself.
    """
    os.dup2(2, 1)  # what a user's function prints belongs to no table of its caller
    link = Connection(descriptor)
    answer: Any
    try:
        name, key, memory_mb, domain.main_script, timeout_s = link.recv()
        try:
            check = load_check(name, key)
        except Exception as error:  # whatever a user's module raises on import must reach the user by name
            answer = {"error": f"{key} = {name!r} cannot be loaded: {type(error).__name__}: {error}"}
            return link.send_bytes(json.dumps(answer).encode())
        limit_memory(memory_mb)
        link.send_bytes(b"[]")
        while True:
            item = link.recv()
            signal.alarm(int(10 * timeout_s) + ORPHAN_S)
            try:
                result = check(*item)
                answer = [isinstance(result, Verdict), result, None]
            except VerifierError as error:
                answer = {"error": str(error)}
            except Exception as error:  # a check may fail in any way; that is its verdict
                answer = [True, Verdict.CRASHED, f"{name}: {type(error).__name__}: {error}"[:500]]
            signal.alarm(
                0
            )  # it is for a check that outlives its caller; a worker may wait for the next as long as it takes
            link.send_bytes(json.dumps(answer).encode())
    except (EOFError, OSError):
        sys.exit(0)
