"""A verifier worker: a program of its own that does one check at a time, started by `pool.py`.

It imports this package and what the verifier's name says. It keeps few environment variables, limits its address space,
and ends with its caller. The shapes of reward functions that `adapt` knows are in docs/bring.md."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import re
import resource
import signal
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from soar.problems import domain
from soar.problems.answers import extract
from soar.problems.sources import GOLD, PREFIX, environment
from soar.problems.verify import VerifierError
from soar.types import Verdict

MARK = "SOAR_VERIFIER_WORKER"
ORPHAN_S = 60  # beyond its time limit, after which a check ends that nobody waits for any more
KEPT = {  # environment variables that a check needs, besides LC_*: no tokens and keys
    "PATH", "HOME", "LANG", "LANGUAGE", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
}  # fmt: skip
RUBRIC = {"prompt", "completion", "answer", "state", "task", "info", "parser"}
EXPECTED = "one number or None for each completion"


def _parse_answer(completion: Any) -> str | None:
    """What rubric functions ask of the parser of a verifiers environment."""
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

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float | None:
        """What the function gives for one completion; None where it cannot decide. row: the columns, with `answer`.
        Raises VerifierError for a value of another shape, and what the function raises."""
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
            given |= {"trainer_state": None, **dict.fromkeys(("log_extra", "log_metric"), lambda *_, **__: None)}
        else:
            given = {"task": "default", "info": {}, **given, "prompt": prompt, "completion": reply}
            given |= {"state": dict(given), "parser": types.SimpleNamespace(parse_answer=_parse_answer)}
        return self._score(self.function(**{k: v for k, v in given.items() if self.takes is None or k in self.takes}))

    def _score(self, value: Any) -> float | None:
        if inspect.isawaitable(value):
            value = asyncio.run(_result(value))
        if self.shape == "TRL":
            if isinstance(value, str | bytes) or not hasattr(value, "__len__") or len(value) != 1:
                said = f"{self.name} returned {value!r:.80} for 1 completion"
                raise VerifierError(f"{said}; expected a list of {EXPECTED}")
            value = value[0]
        value = value.get("score") if isinstance(value, dict) else value
        if value is None:
            return None
        if isinstance(value, str | bytes) or not hasattr(value, "__float__") or math.isinf(value):
            raise VerifierError(f"{self.name} returned a {type(value).__name__} ({value!r:.80}); expected {EXPECTED}")
        return None if math.isnan(value) else float(value)


async def _result(value: Any) -> Any:
    return await value


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
        raise VerifierError(
            f"{name}{signature}: expected the shape of TRL (completions, **columns), of verl's compute_score (data_source, "
            "solution_str, ground_truth, extra_info), of a rubric function of verifiers (completion, answer, state ...), or "
            "(completion, answer)"
        )
    inner = inspect.unwrap(getattr(function, "func", function))
    inner = inner if inspect.isroutine(inner) else type(inner).__call__
    untold = subject is inspect.Parameter.empty
    chat = _mentions(getattr(inner, "__code__", None), "content") if untold else re.search("dict|Message", str(subject))
    takes = None if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()) else frozenset(named)
    return Reward(function, name, shape, takes, bool(chat) and shape in ("TRL", "verifiers"))


def _mentions(code: Any, text: str) -> bool:
    """Whether the code of a function holds a text, in functions inside of it too."""
    constants = code.co_consts if isinstance(code, types.CodeType) else ()
    return any(constant == text or _mentions(constant, text) for constant in constants)


def serve(descriptor: int, name: str, key: str, memory_mb: int, timeout_s: float) -> None:
    """Do checks until the caller is gone: `(task, text, row)` -> a JSON object, since a check may have run anything. It
    holds `verdict` or `value`, and a `message` where it failed; `error` for what is wrong with the verifier."""
    os.dup2(2, 1)  # what a user's function prints belongs to no table of its caller
    link, check, shape = Connection(descriptor), None, ""
    try:
        if key == "problems.domain":
            check = domain.Grader(domain.load_domain(name))
        else:
            reward = adapt(environment(name) if name.startswith(PREFIX) else domain.load_function(name), name)
            shape = f"{reward.shape}, {'messages' if reward.chat else 'texts'}"
        answer = json.dumps({"shape": shape}).encode()
    except Exception as error:  # whatever a user's module raises on import must reach the user by name
        message = f"{key} = {name!r} cannot be loaded: {type(error).__name__}: {error}"
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
            except Exception as error:  # a check may fail in any way; that is its verdict
                message = f"{name}: {type(error).__name__}: {error}"[:500]
                answer = json.dumps({"verdict": Verdict.CRASHED, "message": message}).encode()
            signal.alarm(0)
