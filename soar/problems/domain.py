"""A domain: how problems of one subject are asked for, put to a student, read and checked; docs/domains.md has one.

Its functions see text that a model wrote: `Grader` runs them in worker processes that are killed at their limits
(`pool.py`); what they raise is counted, not raised.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from soar.config import ConfigError, ProblemsConfig
from soar.files import asset, sha256_of
from soar.problems.answers import MAX_ANSWER_CHARS, MAX_COMPLETION_CHARS, PATTERNS, extract, normalize, still_thinks
from soar.problems.load import fingerprint
from soar.problems.prompts import FORMATS, PromptFormat, frozen, tagged
from soar.problems.sources import PREFIX, environment, with_options
from soar.problems.verify import COMPARERS, VerifierError, as_verdict, gold_kind, is_parsable
from soar.types import Problem, Reason, Rejection, Verdict, said_by

WORDS = asset("domains")
BUILTIN = {name: f"soar.domains.{name}:{name.upper()}" for name in WORDS}
MAX_QUESTION_CHARS = 4_000


@dataclass(frozen=True)
class Domain:
    """How problems of one subject are asked for, put, read and checked (docs/domains.md)."""

    name: str
    prompts: PromptFormat
    verifier: str = "exact"  # one of `verify.COMPARERS`, where the domain has no `verify`
    # Of a teacher text: `(question, answer)`, a Problem, a Rejection, or a text naming why it holds no problem
    read_problem: Callable[[str], Any] | None = None
    read_answer: Callable[[str], str | None] | None = None  # of a completion; None where it has no answer
    verify: Callable[[str, Problem], Any] | None = None  # answer and problem -> what `as_verdict` takes
    validate: Callable[[Problem], str | None] | None = None  # the name of what is wrong with a problem, or None
    arrange: Callable[[Problem], Problem | str] | None = None  # as students get it, or what is wrong; idempotent
    solve: Callable[[str], str | None] | None = None  # an oracle: the right answer; None unless there is exactly one
    prepare: Callable[[], object] | None = None  # once in every worker; raises where the domain cannot work here
    seconds: float = 0.0  # that a check may take, where it is more than problems.verify_timeout_s
    examples: tuple[Problem, ...] = ()
    max_answer_chars: int = MAX_ANSWER_CHARS
    version: int = 1  # raise it when reading or checking changes: older evidence is refused then
    reference: str = ""  # by which `load_domain` found it
    source_sha256: str = field(default="", repr=False)  # of its file, or its verifier's

    @property
    def own(self) -> bool:
        """Whether it was named by `problems.domain`, rather than made of a format and a verifier."""
        return bool(self.reference)

    def fingerprint(self) -> str:
        """sha256 of what shapes prompts, reading and checking.

        Of a domain that problems.domain names: prompts, name, verifier, version, and the bytes of its file unless it is
        the package's own. Of another: the prompts.
        """
        if not self.own:
            return self.prompts.fingerprint()
        parts = [self.name, self.prompts.fingerprint(), self.verifier, self.version, self.source_sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def hashes(self) -> dict[str, str]:
        """What a run's manifest records of the code that grades: the fingerprint of an own domain, a function's file."""
        if self.own:
            return {"domain": hashlib.sha256(self.fingerprint().encode()).hexdigest()}
        return {"verifier": self.source_sha256} if self.source_sha256 else {}

    @property
    def label(self) -> str:
        """What evidence and messages call its verifier."""
        return f"domain {self.name}" if self.own else self.verifier


def domain_of(problems: ProblemsConfig) -> Domain:
    """`problems.domain`, else one of its format and verifier, or of an environment. Raises ConfigError and DataError."""
    if problems.domain:
        return load_domain(problems.domain)
    fmt, verifier = FORMATS[problems.format], problems.verifier
    if problems.source.startswith(PREFIX):
        verifier = with_options(problems.source, problems.options)
    if verifier.startswith(PREFIX):
        system = environment(verifier).first.data.system_prompt
        fmt = replace(fmt, student_template=f"{system}\n\n{{question}}" if system else "{question}", text_answers=True)
    file = Path(verifier.rpartition(":")[0])  # of a function of one's own
    digest = sha256_of(file) if file.suffix == ".py" and file.is_file() else ""
    return Domain(problems.format, fmt, verifier, source_sha256=digest)


def styled(name: str, make: Any = tagged, **fields: Any) -> Domain:
    """A built-in domain. make: of its words a `PromptFormat`. fields: of `Domain`, its functions above all."""
    examples = tuple(Problem(*row) for row in WORDS[name]["examples"])
    return Domain(name=name, prompts=make(**frozen(WORDS[name]["prompts"])), examples=examples, **fields)


def load_domain(reference: str) -> Domain:
    """A built-in domain by its name, or the one behind `file.py:NAME` or `module:NAME`. Raises ConfigError."""
    place, says = BUILTIN.get(reference, reference), f"problems.domain = {reference!r}"
    if ":" not in place:
        expected = f"one of {', '.join(sorted(BUILTIN))}, or one of yours as file.py:NAME or module:NAME"
        raise ConfigError(f"{says}: expected {expected}")
    try:
        domain, file = load_object(place)
    except Exception as error:  # a user's module may raise anything when it is imported
        raise ConfigError(f"{says} cannot be loaded: {said_by(error)}; mend the file") from error
    if not isinstance(domain, Domain):
        found = f"{place.rpartition(':')[2]!r} is {type(domain).__name__}"
        raise ConfigError(f"{says}: {found}, expected a soar.problems.domain.Domain (docs/domains.md)")
    if not domain.name.isidentifier():
        raise ConfigError(f"{says}: name = {domain.name!r}, expected one word like chemistry")
    if domain.verify is None and domain.verifier not in COMPARERS:
        expected = f"one of {', '.join(COMPARERS)}; a check of your own is `verify`"
        raise ConfigError(f"{says}: verifier = {domain.verifier!r}, expected {expected}")
    fmt = domain.prompts
    if fmt.pair_style == "marked" and not fmt.answer_marks and domain.read_problem is None:
        raise ConfigError(f"{says}: pair_style = 'marked' needs answer_marks, at the first of which a text is cut")
    students = fmt.answer_marks[1:] if fmt.pair_style == "marked" else ()  # the first of several is the teacher's
    unread = (mark for mark in students or fmt.answer_marks if extract(f"{mark} 1", "marker") is None)
    if domain.read_answer is None and fmt.answer_style == "marker" and (mark := next(unread, "")):
        known = "those are Answer:, <ans> and final answer is; a domain with another mark needs `read_answer`"
        raise ConfigError(f"{says}: answer_marks = {mark!r}, which no answer is read behind; {known}")
    digest = sha256_of(file) if file.is_file() and not place.startswith("soar.") else ""
    return replace(domain, reference=reference, source_sha256=digest)


def load_function(name: str) -> Callable[..., Any]:
    """The function behind `module:function` or `file.py:function`. Raises VerifierError saying what was looked for."""
    function, _ = load_object(name)
    if not callable(function):
        where, _, attribute = name.rpartition(":")
        raise VerifierError(f"{where} has no function {attribute!r}")
    return function


def load_object(name: str) -> tuple[Any, Path]:
    """What `module:NAME` or `file.py:NAME` is, or None, and its file. Raises VerifierError, and what the module raises."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py") and not Path(where).is_file():
        raise VerifierError(f"no file {where} (from {Path.cwd()})")
    folder = Path(where).resolve().parent if where.endswith(".py") else Path.cwd()
    sys.path[:] = dict.fromkeys([str(folder), *sys.path])  # as for a script: what lies beside it can be imported
    if where.endswith(".py"):
        module = ModuleType(f"soar_user_{Path(where).stem}")
        module.__file__ = where
        sys.modules[module.__name__] = module  # dataclasses look their module up by name
        exec(compile(Path(where).read_bytes(), where, "exec"), module.__dict__)
    else:
        module = importlib.import_module(where)
    return getattr(module, attribute, None), Path(getattr(module, "__file__", None) or "")


def make_problem(question: str, answer: str) -> Problem:
    """A written problem; its id is the fingerprint of its question."""
    return Problem(fingerprint(question)[:16], question, answer)


def _read_pair(text: str, fmt: PromptFormat) -> tuple[str, str] | Reason:
    """`question <ans> answer`."""
    question, mark, answer = PATTERNS["end_of_turn"].split(text, maxsplit=1)[0].partition(fmt.answer_marks[0])
    if not mark:
        return Reason.NO_ANSWER
    return Reason.TWO_PROBLEMS if mark in answer else (question.strip(), answer.strip())


def _read_tags(text: str, fmt: PromptFormat) -> tuple[str, str] | Reason:
    """Contents of the question tags, and of the box in the answer tags.

    A second opening tag closes the first. Upper case and the other order are accepted, no field in another or without end.
    """
    fields = [(kind.lower(), content.strip()) for kind, content in PATTERNS["field"].findall(text)]
    questions, answers = ([text for kind, text in fields if kind == name] for name in ("question", "answer"))
    if not questions or not answers:
        return Reason.NO_ANSWER if questions else Reason.NO_QUESTION
    if len(questions) > 1 or len(answers) > 1:
        return Reason.TWO_PROBLEMS
    if not questions[0] or not answers[0]:
        return Reason.EMPTY
    answer = extract(answers[0], "boxed")
    return Reason.NO_ANSWER if answer is None else (questions[0], answer)


def _read_labels(text: str, fmt: PromptFormat) -> tuple[str, str] | Reason:
    """`Question: ... Answer: ...`; text after the first answer line is ignored."""
    if not PATTERNS["question_label"].match(text.lstrip()):
        text = f"{fmt.teacher_prefill} {text}"
    text = PATTERNS["end_of_turn"].split(text, maxsplit=1)[0]
    questions = list(PATTERNS["question_label"].finditer(text))
    if not questions:
        return Reason.NO_QUESTION
    answer_label = PATTERNS["answer_label"].search(text, questions[0].end())
    if answer_label is None:
        return Reason.NO_ANSWER
    if len(questions) > 1 and questions[1].start() < answer_label.start():
        return Reason.TWO_PROBLEMS
    question = text[questions[0].end() : answer_label.start()].strip().strip("*_").strip()
    line = (text[answer_label.end() :].strip().split("\n", 1)[0]).strip().strip("*_").strip()
    return question, line


READERS = {"marked": _read_pair, "tags": _read_tags, "labels": _read_labels}


class Grader:
    """The functions of a domain, with the defaults for those it leaves out: `(task, text, row) -> verdict or JSON value`."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        if domain.prepare is not None:
            domain.prepare()

    def __call__(self, task: str, text: str | None, row: dict[str, Any]) -> Any:
        if task == "solve":
            return self.domain.solve(text or "") if self.domain.solve else None
        if task == "admit":
            return isinstance(self.admit(str(row["question"]), text or "", ""), Problem)
        if task == "read":
            written = self.read(text or "", row["truncated"])
            return {k: v for k, v in asdict(written).items() if k not in ("id", "extra", "text")}
        if task == "extract":
            return self.extract(text or "")
        answer = self.extract(text or "") if task == "check" else text
        if answer is None:
            return Verdict.NO_ANSWER
        extra = {key: value for key, value in row.items() if key not in ("question", "answer")}
        problem = Problem("", str(row.get("question", "")), row["answer"], extra)
        if task in ("check", "compare"):
            return self.compare(answer, problem)
        settled = self.settle(problem)
        if task == "fault":
            return settled if isinstance(settled, str) else ""
        return Verdict.UNSCORABLE if isinstance(settled, str) else self.judge_gold(settled)

    def extract(self, text: str) -> str | None:
        """The answer that a completion commits to."""
        if self.domain.read_answer is None:
            return extract(text, self.domain.prompts.answer_style)
        answer = None if still_thinks(text) else self.domain.read_answer(text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"read_answer returned {type(answer).__name__}, expected text or None")
        return answer

    def settle(self, problem: Problem) -> Problem | str:
        """The problem as students get it, or the name of what `arrange` or `validate` finds wrong with it."""
        made = self.domain.arrange(problem) if self.domain.arrange else problem
        name = self.domain.validate(made) if self.domain.validate and isinstance(made, Problem) else None
        return str(name) if name else made

    def read(self, text: str, truncated: bool = False) -> Problem | Rejection:
        """The problem in a teacher text, or why there is none; the only way from a model's text to a `Problem`."""
        domain, fmt = self.domain, self.domain.prompts
        if truncated or not text.strip():
            return Rejection(Reason.TRUNCATED if truncated else Reason.EMPTY, text)
        style = fmt.pair_style or ("tags" if fmt.answer_style == "boxed" else "labels")
        given = domain.read_problem(text) if domain.read_problem else READERS[style](text[:MAX_COMPLETION_CHARS], fmt)
        if isinstance(given, str):
            return Rejection(Reason(given), text) if given in list(Reason) else Rejection(Reason.REFUSED, text, given)
        if isinstance(given, Rejection):
            return given
        question, answer = (given.question, given.answer) if isinstance(given, Problem) else given
        if not isinstance(question, str) or not isinstance(answer, str):
            raise TypeError("read_problem returned a pair that is not of two texts")
        return self.admit(question.strip(), answer.strip(), text)

    def admit(self, question: str, answer: str, text: str) -> Problem | Rejection:
        """The problem of a written question and answer, or what is wrong with them; text: where they were read."""
        domain, fmt = self.domain, self.domain.prompts
        bare = [" ".join(field.casefold().split()).rstrip(".:") or field for field in (question, answer)]
        words = fmt.text_answers or domain.verify or domain.read_problem  # can be answers
        value = words or any(char.isdigit() for char in answer) or gold_kind(answer, "math") == "value"
        faults = (
            (not question or not normalize(answer), Reason.EMPTY),
            (any(field in fmt.placeholders for field in bare), Reason.PLACEHOLDER),
            (len(question) > MAX_QUESTION_CHARS or len(answer) > domain.max_answer_chars, Reason.TOO_LONG),
            (not value, Reason.UNPARSABLE_ANSWER),
        )
        if reason := next((reason for is_so, reason in faults if is_so), None):
            return Rejection(reason, text)
        settled = self.settle(make_problem(question, answer))
        if isinstance(settled, str):
            return Rejection(Reason.REFUSED, text, settled)
        own = domain.verify or domain.validate
        usable = self.judge_gold(settled).solved if own else is_parsable(settled.answer, domain.verifier)
        return settled if usable else Rejection(Reason.UNPARSABLE_ANSWER, text)

    def judge_gold(self, problem: Problem) -> Verdict:
        """Whether a gold answer that `validate` has nothing against can be graded."""
        if self.domain.validate is not None:
            return Verdict.CORRECT
        if self.domain.verify is not None:
            return self.compare(problem.answer, problem)
        usable = gold_kind(problem.answer, self.domain.verifier) != "none"
        return Verdict.CORRECT if usable else Verdict.UNSCORABLE

    def compare(self, answer: str, problem: Problem) -> Verdict:
        """Verdict on an answer."""
        if self.domain.verify is not None:
            return as_verdict(self.domain.verify(answer, problem), "verify")
        return COMPARERS[self.domain.verifier](answer, problem.answer)
