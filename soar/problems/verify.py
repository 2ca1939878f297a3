"""Comparing an answer with a gold answer, as far as that can be done without a symbolic engine.

`compare_math` decides equal texts, choice letters, rational numbers and lists of them, and expressions whose values are
far apart (`sketches.py`). It returns None for the rest, which `verify.py` gives to math-verify in a worker process.
Deciding rationals here also removes math-verify's false positives for tiny fractions. `50%` equals 50 and 0.5; `x=3`
equals 3 and `3 or 5` is the set {3, 5} (math-verify).

Completion + gold answer -> Verdict.

A check never hangs the caller, never runs model-written text, and is never `correct` by accident: an answer that the
symbolic engine cannot finish in time is `timeout`, one that kills its worker is `crashed`. Symbolic checks and user
functions run in worker processes that are killed when they are over their time or memory (`workers.py`). `exact`,
`number` and `choice` are pure, bounded string functions that cost microseconds (`verifiers.py`), so they run in the
calling process; so does the exact part of `math`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any, TypeVar

from soar.problems.answers import (
    LOOSE_NUMBER,
    MAX_ANSWER_CHARS,
    MAX_COMPLETION_CHARS,
    TOTALS,
    Number,
    extract,
    normalize,
    read_brackets,
    read_choice,
    read_list,
    read_number,
)
from soar.problems.pool import VerifierError, WorkerPool
from soar.problems.sketches import surely_different
from soar.types import Problem, Verdict


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def compare_numbers(answer: Number, gold: Number) -> bool | None:
    """Whether two rationals are equal; None where a decimal meets a fraction that no decimal can write (0.333 and 1/3).

    A per cent sign on one side only: 50% equals 50 and 0.5, since gold answers drop the sign.
    """
    if answer.value == gold.value:
        return True
    if answer.percent != gold.percent:
        with_sign, without = (answer, gold) if answer.percent else (gold, answer)
        if with_sign.value / 100 == without.value:
            return True
    if (answer.decimal and not _terminates(gold.value)) or (gold.decimal and not _terminates(answer.value)):
        return None
    return False


def _verdict(equal: bool) -> Verdict:
    return Verdict.CORRECT if equal else Verdict.WRONG


def compare_exact(answer: str, gold: str) -> Verdict:
    """Equal text, up to whitespace."""
    return _verdict(answer == gold or answer.split() == gold.split())


def compare_choice(answer: str, gold: str) -> Verdict:
    """Equal choice letters; equal normalised text where the gold answer is no letter."""
    letter = read_choice(gold)
    if letter is None:
        return _verdict(normalize(answer) == normalize(gold))
    return _verdict(read_choice(answer) == letter)


def compare_number(answer: str, gold: str) -> Verdict:
    """Equal rational values. An answer with words is read by its last number (`it is 42 apples`).

    UNSCORABLE when the gold answer is no number.
    """
    wanted = read_number(gold)
    if wanted is None:
        return Verdict.UNSCORABLE
    found = read_number(answer)
    if found is None and len(answer) <= MAX_ANSWER_CHARS:
        numbers = LOOSE_NUMBER.findall(normalize(answer))
        found = read_number(numbers[-1]) if numbers else None
    return _verdict(found is not None and compare_numbers(found, wanted) is True)


def _compare_lists(found: list[Number], wanted: list[Number], brackets: str) -> bool | None:
    if brackets == r"\{\}":
        found, wanted = (sorted(numbers, key=lambda number: number.value) for numbers in (found, wanted))
    if len(found) != len(wanted):
        return None if brackets == r"\{\}" else False
    equal = [compare_numbers(a, b) for a, b in zip(found, wanted, strict=True)]
    return None if None in equal else all(equal)


def compare_math(answer: str, gold: str) -> Verdict | None:
    """The verdict where it can be decided exactly without a symbolic engine, else None.

    Decided here: equal normalised text, choice letters, rationals, tuples and sets of rationals, a set against a tuple
    or an interval, expressions whose values are far apart (`sketches.py`), and answers too long to be parsed.
    """
    if answer == gold:
        return Verdict.CORRECT
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        return Verdict.WRONG
    a, g = normalize(answer), normalize(gold)
    if a == g:
        return Verdict.CORRECT
    if not a:
        return Verdict.WRONG
    wanted, found = read_number(gold), read_number(answer)
    if wanted is not None and found is not None:
        equal = compare_numbers(found, wanted)
        return None if equal is None else _verdict(equal)
    letter, chosen = read_choice(gold, bare=True), read_choice(answer, bare=True)
    if letter is not None and chosen is not None:
        return _verdict(letter == chosen)
    verdict = _compare_brackets(answer, gold)
    return Verdict.WRONG if verdict is None and surely_different(answer, gold) else verdict


def _compare_brackets(answer: str, gold: str) -> Verdict | None:
    """`compare_math` for lists of numbers, and for brackets of different kinds."""
    kind, other = read_brackets(normalize(gold)), read_brackets(normalize(answer))
    if kind is not None and other is not None and (kind == r"\{\}") != (other == r"\{\}"):
        return Verdict.WRONG
    wanted, found = read_list(gold), read_list(answer)
    if (wanted and read_number(answer)) or (found and read_number(gold)):
        return Verdict.WRONG
    if wanted is None or found is None or kind is None or kind != other:
        return None
    equal = _compare_lists(found, wanted, kind)
    return None if equal is None else _verdict(equal)


COMPARERS = {"exact": compare_exact, "number": compare_number, "choice": compare_choice}


__all__ = ["NAMES", "VerifierError", "VerifierPool", "extract"]

NAMES = ("math", "number", "exact", "choice")
CACHE_SIZE = 200_000
MATH_MEMORY_MB = 1_024
FUNCTION_MEMORY_MB = 8_192  # a function may import torch, which reserves several gigabytes of addresses

K = TypeVar("K")
V = TypeVar("V")


class VerifierPool:
    """Checks completions against gold answers with one verifier.

    name: `math` (math-verify), `number`, `exact`, `choice`, or a function `module:function` / `file.py:function` in the
    shape `(completions, **columns) -> list[float | None]`. A function is called with one completion at a time, as text;
    the gold answers are the column `answer`; a value of 1 or more is correct, None or NaN is unscorable.
    answer_style: `boxed` or `marker`, see `answers.extract`. timeout_s: seconds for one check.
    memory_mb: address space of one worker; None: 1,024 for `math`, 8,192 for a function; 0: no limit. It is not applied
    where the system has no such limit. workers: processes, 0 for one per core and at most 8.

    Workers start at the first check that needs one. Use it as a context manager, or call `close`. Raises VerifierError.
    """

    def __init__(
        self,
        name: str,
        *,
        answer_style: str = "boxed",
        timeout_s: float = 5.0,
        memory_mb: int | None = None,
        workers: int = 0,
    ) -> None:
        if name not in NAMES and ":" not in name:
            raise VerifierError(
                f"problems.verifier = {name!r}: expected one of {', '.join(NAMES)}, module:function or file.py:function"
            )
        extract("", answer_style)
        self.name = name
        self.answer_style = answer_style
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._parsable: dict[str, bool] = {}
        if memory_mb is None:
            memory_mb = MATH_MEMORY_MB if name == "math" else FUNCTION_MEMORY_MB
        self._pool = WorkerPool(name, timeout_s, memory_mb, workers or min(os.cpu_count() or 1, 8))

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The next check starts new ones."""
        self._pool.close()

    @property
    def last_error(self) -> str | None:
        """Message of the last check that raised or lost its worker."""
        return self._pool.last_error

    def check(
        self, completions: Sequence[str], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """One Verdict for each completion, in order.

        columns: further columns for a user function, each as long as completions; the named verifiers ignore them.
        Raises ValueError for lengths that differ, VerifierError when a function returns something else than numbers.
        """
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions, but {len(golds)} gold answers")
        if self.name in NAMES:
            return self.check_answers([extract(text, self.answer_style) for text in completions], golds)
        given = {"answer": golds, **(columns or {})}
        for key, column in given.items():
            if len(column) != len(completions):
                raise ValueError(f"column {key!r} has {len(column)} values for {len(completions)} completions")
        rows = [{key: column[i] for key, column in given.items()} for i in range(len(completions))]
        texts = [text[-MAX_COMPLETION_CHARS:] for text in completions]
        return self._pool.run(list(zip(texts, rows, strict=True)))

    def check_answers(self, answers: Sequence[str | None], golds: Sequence[str]) -> list[Verdict]:
        """Verdicts for answers that are already extracted (None: no answer). Named verifiers only."""
        if self.name not in NAMES:
            raise VerifierError(f"{self.name} reads whole completions, not answers; use check")
        verdicts: list[Verdict | None] = []
        pending: dict[tuple[str, str], list[int]] = {}
        for answer, gold in zip(answers, golds, strict=True):
            verdict = Verdict.NO_ANSWER if answer is None else self._decide(answer, gold)
            if verdict is None and answer is not None:
                pending.setdefault((answer, gold), []).append(len(verdicts))
            verdicts.append(verdict)
        found = self._pool.run([("math", answer, gold) for answer, gold in pending]) if pending else []
        for (key, places), verdict in zip(pending.items(), found, strict=True):
            _remember(self._verdicts, key, verdict)
            for place in places:
                verdicts[place] = verdict
        return [verdict for verdict in verdicts if verdict is not None]

    def _decide(self, answer: str, gold: str) -> Verdict | None:
        """The verdict without a worker, or None."""
        compare = COMPARERS.get(self.name)
        if compare is not None:
            return compare(answer, gold)
        known = self._verdicts.get((answer, gold))
        return compare_math(answer, gold) if known is None else known

    def check_golds(self, golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[Verdict]:
        """Whether each gold answer can be graded: CORRECT when the verifier reads it and finds it equal to itself.

        No shortcut for equal texts is taken: what `math` and `number` cannot read is UNSCORABLE, but a few words
        (`\\text{Saturday}`) are CORRECT for `math`, which compares them as text. For the answer style `totals` a gold answer
        is written `12, 20`. A user function is given the gold answer as a completion, with the further columns.
        """
        if self.name == "math":
            return self._pool.run([("math", gold, gold) for gold in golds])
        if self.name in NAMES:
            found = self.check_answers(list(golds), golds)
            if self.answer_style == "totals":
                pairs = zip(golds, found, strict=True)
                return [verdict if TOTALS.fullmatch(gold) else Verdict.UNSCORABLE for gold, verdict in pairs]
            return found
        frame = "\\boxed{%s}" if self.answer_style == "boxed" else "Answer: %s"
        return self.check([frame % gold for gold in golds], golds, columns)

    def parsable(self, answers: Sequence[str]) -> list[bool]:
        """Whether each answer can serve as a gold answer.

        `math`: a number or expression results, not a string fallback, not an undefined value, not a word. `number`: a
        number. `exact`, `choice` and user functions: any text.
        """
        if self.name == "number":
            return [read_number(answer) is not None for answer in answers]
        if self.name != "math":
            return [bool(answer.strip()) for answer in answers]
        known = {a: read_number(a) is not None or self._parsable.get(a) for a in answers}
        unknown = [answer for answer, value in known.items() if value is None]
        found = self._pool.run([("parsable", answer, "") for answer in unknown]) if unknown else []
        for answer, verdict in zip(unknown, found, strict=True):
            known[answer] = verdict is Verdict.CORRECT
            _remember(self._parsable, answer, verdict is Verdict.CORRECT)
        return [bool(known[answer]) for answer in answers]


def columns_of(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """The columns that a user function gets beside completion and gold answer: `question`, and those of the source."""
    names = sorted({name for problem in problems for name in problem.extra})
    columns = {name: [problem.extra.get(name) for problem in problems] for name in names}
    return {**columns, "question": [problem.question for problem in problems]}


def _remember(cache: dict[K, V], key: K, value: V) -> None:
    """Store, dropping the oldest entry when the cache is full."""
    if len(cache) >= CACHE_SIZE:
        del cache[next(iter(cache))]
    cache[key] = value
