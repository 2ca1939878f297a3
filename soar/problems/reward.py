"""Reward functions as they come, as one call: `(completion, row) -> score`.

The shape is told from the names of the parameters:

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
import math
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from soar.problems.answers import extract
from soar.problems.verify import VerifierError

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
