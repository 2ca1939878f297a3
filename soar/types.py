"""Frozen records that cross the borders of rooms, and the axis legend.

Axis legend. A name ends in its axes, outermost first (`reward_G`, `solved_P_Q_N`, `tokens_B_T`); inside a function others
may stand for what it says, and in `engine` R counts rows that lie packed and N their tokens:

    P  policies stacked on one base model (teacher, baseline student, students)
    G  datasets (question sets) that the teacher writes in one outer step
    Q  questions in one dataset
    U  units of the teacher's credit: its G datasets, or all G * Q questions
    R  student repeats per dataset
    H  hard problems (reward questions drawn from the training half)
    B  rows of a batch (policy-major: row = policy * rows_per_policy + i)
    N  attempts (rollouts) per problem
    T  token positions
    V  vocabulary

Everything here is plain data without torch, so that reports and checks load fast.
"""

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from typing import Any

VERSION = "0.2.0.dev0"


class UserError(Exception):
    """An error whose message says what was found, what is expected and what to do: shown without a traceback."""

    exit_code = 1


class Interrupted(UserError):
    """A run that was cut short and goes on with --resume: its folder stays, whatever is in it by then."""


def said_by(error: BaseException) -> str:
    """`Kind: text` of what a user's code raised, whose text may raise something itself."""
    text = "its text cannot be made"
    with suppress(Exception):
        text = str(error)
    return f"{type(error).__name__}: {text}"


def import_extra(module: str, kind: type[UserError], missing: str) -> Any:
    """A module of an optional package. Raises `kind` with the text `missing`, in which {error} is what importing it said."""
    try:
        return import_module(module)
    except ImportError as error:
        raise kind(missing.replace("{error}", str(error))) from error


class Verdict(str, Enum):
    """Outcome of checking one completion against one gold answer. NO_ANSWER never equals a gold answer and never votes;
    UNSCORABLE: the check cannot decide (excluded from means); TIMEOUT, CRASHED: the worker process was killed or died.
    """

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    UNSCORABLE = "unscorable"
    TIMEOUT = "timeout"
    CRASHED = "crashed"

    @property
    def solved(self) -> bool:
        return self is Verdict.CORRECT

    @property
    def judged(self) -> bool:
        return self not in (Verdict.UNSCORABLE, Verdict.TIMEOUT, Verdict.CRASHED)


class Verdicts(list[Verdict]):
    """Verdicts of completions. scores: what a reward function gave for each, empty where there is no such function."""

    scores: Sequence[float] = ()


class Reason(str, Enum):
    """Why a teacher text is not a problem (`domain.Grader.read`). REFUSED: the domain says no, and why in
    `Rejection.detail`; READER_FAILED: its code raised or was killed at a limit; the last two: `write.vote`.
    """

    NO_QUESTION = "no_question"
    NO_ANSWER = "no_answer"
    EMPTY = "empty"
    PLACEHOLDER = "placeholder"
    TWO_PROBLEMS = "two_problems"
    TRUNCATED = "truncated"
    UNPARSABLE_ANSWER = "unparsable_answer"
    TOO_LONG = "too_long"
    REFUSED = "refused"
    READER_FAILED = "reader_failed"
    NO_AGREEMENT = "no_agreement"
    TOO_EASY = "too_easy"


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer, both text. id: stable name, a fingerprint of the normalised text where the source
    gives none. extra: further columns of the source row (level, subject), passed to custom verifiers. agreement: share of the
    votes that gave the answer, None without votes.
    """

    id: str
    question: str
    answer: str
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    agreement: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Rejection:
    """A teacher text that is not a problem, and why; `text` is kept for the last-outputs hint. detail: a domain's own name
    of the reason (`no_options`), counted in place of `reason`; cut to a short identifier.
    """

    reason: Reason
    text: str
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", re.sub(r"[^a-z0-9]+", "_", self.detail[:80].lower()).strip("_")[:40])

    @property
    def name(self) -> str:
        """Under what the rejection is counted."""
        return self.detail or self.reason.value


@dataclass(frozen=True)
class Screening:
    """Evidence that a problem is hard: `successes` of `attempts` rollouts were correct, `truncated` hit the budget."""

    successes: int
    attempts: int
    truncated: int = 0

    @property
    def pass_rate(self) -> float:
        return self.successes / self.attempts if self.attempts else 0.0


@dataclass(frozen=True)
class Trial:
    """One trained student: dataset k, repeat j, its pass rate on Q_R, and whether it diverged (NaN/inf)."""

    dataset: int
    repeat: int
    pass_rate: float
    failed: bool = False


@dataclass(frozen=True)
class Decision:
    """Outcome of the promotion rule at one outer step (method step 3): whether a student becomes the new baseline, and
    which. window_mean: mean of the window of step rewards (None until it is full); reason: one sentence for the log.
    """

    promote: bool
    reason: str
    window_mean: float | None = None
    dataset: int | None = None
    repeat: int | None = None


def shared_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rows of a source say alike, as verl's data_source: it holds for the questions of a teacher too."""
    return {key: value for key, value in next(iter(rows), {}).items() if all(row.get(key) == value for row in rows)}


def columns_of(problems: Sequence[Problem], shared: Mapping[str, Any] = {}) -> dict[str, list[Any]]:
    """What a user function gets beside completion and gold answer: `question` and the source's columns, else `shared`."""
    names = sorted({*shared, *(name for problem in problems for name in problem.extra)})
    columns = {name: [problem.extra.get(name, shared.get(name)) for problem in problems] for name in names}
    return {**columns, "question": [problem.question for problem in problems]}


def parse_json(text: str | bytes, expected: type = object) -> Any:
    """What JSON says. Raises ValueError where it is none, of another type, or too deep in itself to be written again."""

    def too_deep(value: Any, room: int = 100) -> bool:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return room < 0 or any(too_deep(item, room - 1) for item in inner)

    with suppress(RecursionError):
        if not isinstance(value := json.loads(text), expected):
            raise ValueError(f"it holds {type(value).__name__}, expected a JSON object")
        opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
        if opened <= 100 or not too_deep(value):  # a count spares most rows the walk
            return value
    raise ValueError("lists and objects lie more than 100 deep in each other")


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return statistics.fmean(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, sample standard deviation over sqrt(n); None of fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def no_tick(tokens: int = 0) -> None:
    """For work that nobody watches."""
