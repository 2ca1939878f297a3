"""A domain: how problems of one subject are asked for, put to a student, read and checked.

A `Domain` is data and a few functions of its author. The functions see text that a model wrote, so `Grader` runs them in
worker processes that are killed at their limits (`pool.py`); what they raise is counted, not raised. docs/domains.md has a
whole one in one file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_ANSWER_CHARS, extract, still_thinks
from soar.problems.parse import judge_fields, make_problem, parse
from soar.problems.prompts import PromptFormat, get_format
from soar.problems.verify import COMPARERS, NAMES, VerifierError, as_verdict, judge_gold
from soar.types import Problem, Reason, Rejection, UserError, Verdict

BUILTIN: dict[str, str] = {
    "code": "soar.domains.code:CODE",
    "science": "soar.domains.quantities:SCIENCE",
    "multiple_choice": "soar.domains.choice:MULTIPLE_CHOICE",
    "procedural": "soar.domains.procedural:PROCEDURAL",
}
"""Name -> `module:NAME` of the domains that come with the package."""
STYLES = ("tags", "plain", "list")


class DomainError(UserError, ValueError):
    """A domain that cannot be used: unknown name, a file that raises, an object that is no `Domain`."""


@dataclass(frozen=True)
class Domain:
    """How problems of one subject are asked for, put, read and checked.

    name: one word, goes into records. prompts: teacher prompt, student prompt, and where their answers stand.
    verifier: `math`, `number`, `exact` or `choice`; compares answers unless `verify` does.
    read_problem(text): a teacher text -> `(question, answer)`, or a text naming why it holds no problem (`no_options`), or a
        `Rejection`. Default: as `prompts.pair_style` says. The gold answer must say all that `verify` needs.
    read_answer(completion): a student's answer, or None. Default: by `prompts.answer_style`.
    verify(answer, problem): True, False, a number (1 or more is correct), None (cannot be decided), or a `Verdict`.
    validate(problem): None for a problem, gold or written, that can be used, else the name of what is wrong with it.
        Default: the gold answer must verify against itself.
    arrange(problem): the problem as students get it (options shuffled, columns of a file put into the question), or the
        name of what is wrong with it; doing it twice changes nothing.
    solve(question): the right answer, or None for a question without exactly one; makes the domain an oracle (`judges`).
    prepare(): called once in every worker; raises where the domain cannot work here (a missing package).
    describe(): a sentence for `soar check` about what the domain found on this machine; raises as `prepare` does.
    seconds: a check may take so long where that is more than problems.verify_timeout_s.
    gold_is_answer: False where the gold answer is no text that a student could write (tests of a program).
    examples: a few problems, for documentation and tests. max_answer_chars: longest gold answer. version: raise it when
    reading or checking changes, so that evidence made before is refused. reference, source_sha256: from `load_domain`.
    """

    name: str
    prompts: PromptFormat
    verifier: str = "exact"
    read_problem: Callable[[str], Any] | None = None
    read_answer: Callable[[str], str | None] | None = None
    verify: Callable[[str, Problem], Any] | None = None
    validate: Callable[[Problem], str | None] | None = None
    arrange: Callable[[Problem], Problem | str] | None = None
    solve: Callable[[str], str | None] | None = None
    prepare: Callable[[], object] | None = None
    describe: Callable[[], str] | None = None
    gold_is_answer: bool = True
    seconds: float = 0.0
    examples: tuple[Problem, ...] = ()
    max_answer_chars: int = MAX_ANSWER_CHARS
    version: int = 1
    reference: str = ""
    source_sha256: str = field(default="", repr=False)

    @property
    def own(self) -> bool:
        """Whether it was named by `problems.domain`, rather than made of a format and a verifier."""
        return bool(self.reference)

    def fingerprint(self) -> str:
        """sha256 of what shapes prompts, reading and checking: without a name of its own that of the prompts, else of
        name, verifier and version too, and of the bytes of its file unless it is the package's own."""
        if not self.own:
            return self.prompts.fingerprint()
        parts = [self.name, self.prompts.fingerprint(), self.verifier, self.version, self.source_sha256]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def label(self) -> str:
        """What evidence and messages call its verifier."""
        return f"domain {self.name}" if self.own else self.verifier


def domain_of(problems: ProblemsConfig) -> Domain:
    """The domain of a config: `problems.domain`, else the one made of problems.format and problems.verifier.

    Raises DomainError, ValueError for an unknown format.
    """
    if problems.domain:
        return load_domain(problems.domain, problems.style)
    if problems.style != "tags":
        raise DomainError(
            f"problems.style = {problems.style!r} belongs to a domain, and problems.domain is empty; problems without a "
            "domain have problems.format"
        )
    name = problems.verifier
    describe = None if name in NAMES else lambda: _shape_of(name)
    return Domain(problems.format, get_format(problems.format), name, describe=describe)


def _shape_of(name: str) -> str:
    """In which shape a reward function is taken. Raises VerifierError."""
    from soar.problems.worker import adapt  # which imports this module

    try:
        return str(adapt(load_function(name), name))
    except VerifierError:
        raise
    except Exception as error:  # a user's module may raise anything when it is imported
        raise VerifierError(
            f"problems.verifier = {name!r} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def load_domain(reference: str, style: str = "") -> Domain:
    """A built-in domain by its name, or the one behind `file.py:NAME` or `module:NAME`. Raises DomainError.

    style: of its prompts, `tags`, `plain` or `list`; also written behind the reference, `science/plain`. An object NAME
    may be one `Domain`, which is its only style, or a dict of style -> `Domain`.
    """
    name, _, behind = reference.rpartition("/")
    name, style = (name, behind) if behind in STYLES else (reference, style or "tags")
    place = BUILTIN.get(name, name)
    if ":" not in place:
        raise DomainError(
            f"problems.domain = {reference!r}: expected one of {', '.join(sorted(BUILTIN))}, or one of yours as "
            "file.py:NAME or module:NAME"
        )
    try:
        module, attribute = load_module(place)
    except VerifierError as error:
        raise DomainError(f"problems.domain = {reference!r}: {error}; expected file.py:NAME or module:NAME") from error
    except Exception as error:  # a user's module may raise anything when it is imported
        raise DomainError(
            f"problems.domain = {reference!r} cannot be loaded: {type(error).__name__}: {error}; mend the file"
        ) from error
    given = getattr(module, attribute, None)
    styles = {"tags": given} if not isinstance(given, dict) else given
    if style not in styles:
        raise DomainError(
            f"problems.style = {style!r}: domain {name!r} has {', '.join(map(repr, styles))}; set problems.style to one"
        )
    domain = styles[style]
    if not isinstance(domain, Domain):
        raise DomainError(
            f"problems.domain = {reference!r}: {attribute!r} is {type(domain).__name__}, expected a "
            "soar.problems.domain.Domain; docs/domains.md has an example"
        )
    if not domain.name.isidentifier():
        raise DomainError(f"problems.domain = {reference!r}: name = {domain.name!r}, expected one word like chemistry")
    built_in = place.startswith("soar.")
    place = name if style == "tags" else f"{name}/{style}"
    return replace(domain, reference=place, source_sha256="" if built_in else _source_digest(module))


def _source_digest(module: ModuleType) -> str:
    """sha256 of the file that a module came from; "" where there is none."""
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def load_function(name: str) -> Callable[..., Any]:
    """The function behind `module:function` or `file.py:function`. Raises VerifierError saying what was looked for."""
    module, attribute = load_module(name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise VerifierError(f"{name.rpartition(':')[0]} has no function {attribute!r}")
    return function


main_script = ""
"""Set in worker processes: the script of the caller, of which only the definitions are run."""


def load_module(name: str) -> tuple[ModuleType, str]:
    """The module of `module:NAME` or `file.py:NAME`, and NAME. Raises VerifierError, and what the module raises."""
    where, _, attribute = name.rpartition(":")
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        found = importlib.util.find_spec(where) if main_script else None
        if found is None or not found.origin or str(Path(found.origin).resolve()) != main_script:
            return importlib.import_module(where), attribute
        where = found.origin
    path = Path(where)
    if not path.is_file():
        raise VerifierError(f"no file {where}")
    module = ModuleType(f"soar_user_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    tree = ast.parse(path.read_bytes(), str(path))
    if str(path.resolve()) == main_script:
        tree.body = [statement for statement in tree.body if _defines(statement, attribute)]
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module, attribute


def _defines(statement: ast.stmt, name: str) -> bool:
    """Whether a statement of a script is an import, a function, a class, a constant, or what assigns `name`."""
    if isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        wanted = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        return wanted or not any(isinstance(node, (ast.Call, ast.Attribute)) for node in ast.walk(statement))
    return isinstance(statement, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


class Grader:
    """The functions of a domain, with the defaults for those it leaves out: `(task, text, row) -> verdict or JSON`.

    For worker processes: the texts were written by a model.
    """

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        if domain.prepare is not None:
            domain.prepare()

    def __call__(self, task: str, text: str, row: dict[str, Any]) -> Verdict | str:
        if task == "solve":
            return json.dumps(self.domain.solve(text) if self.domain.solve else None)
        if task == "extract":
            return json.dumps(self.extract(text))
        if task == "read":
            written = self.read(text, row["truncated"], row["strict"])
            if isinstance(written, Rejection):
                return json.dumps({"reason": written.reason.value, "detail": written.detail})
            return json.dumps({"question": written.question, "answer": written.answer})
        problem = _problem(row)
        if task == "fault":
            settled = self.settle(problem)
            return json.dumps(settled if isinstance(settled, str) else "")
        if task == "gold":
            return self.gold(problem)
        answer = text if task == "compare" else self.extract(text)
        return Verdict.NO_ANSWER if answer is None else self.equal(answer, problem)

    def extract(self, text: str) -> str | None:
        """The answer that a completion commits to."""
        if still_thinks(text):
            return None
        if self.domain.read_answer is None:
            return extract(text, self.domain.prompts.answer_style)
        answer = self.domain.read_answer(text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"read_answer returned {type(answer).__name__}, expected text or None")
        return answer

    def settle(self, problem: Problem) -> Problem | str:
        """The problem as students get it, or the name of what `arrange` or `validate` finds wrong with it."""
        domain = self.domain
        made = problem if domain.arrange is None else domain.arrange(problem)
        if isinstance(made, str):
            return made
        name = None if domain.validate is None else domain.validate(made)
        return str(name) if name else made

    def gold(self, problem: Problem) -> Verdict:
        """Whether a gold problem can be used."""
        settled = self.settle(problem)
        if isinstance(settled, str):
            return Verdict.UNSCORABLE
        if self.domain.validate is not None:
            return Verdict.CORRECT
        if self.domain.verify is None and self.domain.verifier == "math":
            return _symbolic("math", settled.answer, settled.answer)
        return self.equal(settled.answer, settled)

    def read(self, text: str, truncated: bool, strict: bool) -> Problem | Rejection:
        """The problem in a teacher text, or why there is none."""
        domain = self.domain
        if domain.read_problem is None or not text.strip():
            limit, any_answer = domain.max_answer_chars, domain.verify is not None
            outcome = parse(
                text, domain.prompts, truncated=truncated, strict=strict, max_answer_chars=limit, any_answer=any_answer
            )
        else:
            outcome = self._read_by_domain(domain.read_problem(text), truncated)
        if isinstance(outcome, Rejection):
            return outcome
        settled = self.settle(outcome)
        if isinstance(settled, str):
            return Rejection(Reason.REFUSED, "", settled)
        return settled if domain.validate or self._usable(settled) else Rejection(Reason.UNPARSABLE_ANSWER, "")

    def _read_by_domain(self, pair: Any, truncated: bool) -> Problem | Rejection:
        """What `read_problem` returned, judged."""
        if truncated:
            return Rejection(Reason.TRUNCATED, "")
        if isinstance(pair, Rejection):
            return pair
        if isinstance(pair, str):
            reasons = {reason.value for reason in Reason}
            return Rejection(Reason(pair), "") if pair in reasons else Rejection(Reason.REFUSED, "", pair)
        question, answer = (pair.question, pair.answer) if isinstance(pair, Problem) else pair
        if not isinstance(question, str) or not isinstance(answer, str):
            raise TypeError("read_problem returned a pair that is not of two texts")
        question, answer = question.strip(), answer.strip()
        reason = judge_fields(question, answer, self.domain.prompts, self.domain.max_answer_chars, any_answer=True)
        return Rejection(reason, "") if reason else make_problem(question, answer)

    def _usable(self, problem: Problem) -> bool:
        """Whether the answer of a problem can be checked."""
        if self.domain.verify is not None or self.domain.verifier not in ("math", "number"):
            return self.equal(problem.answer, problem).solved
        if self.domain.verifier == "number":
            return judge_gold(problem.answer, "number") is Verdict.CORRECT
        return _symbolic("parsable", problem.answer, "").solved

    def equal(self, answer: str, problem: Problem) -> Verdict:
        """Verdict on an answer."""
        if self.domain.verify is not None:
            return as_verdict(self.domain.verify(answer, problem), "verify")
        verdict = COMPARERS[self.domain.verifier](answer, problem.answer)
        return _symbolic("math", answer, problem.answer) if verdict is None else verdict


def _symbolic(kind: str, answer: str, gold: str) -> Verdict:
    from soar.problems.symbolic import check_symbolic  # takes a second to import, and few domains need it

    return check_symbolic(kind, answer, gold)


def _problem(row: dict[str, Any]) -> Problem:
    extra = {key: value for key, value in row.items() if key not in ("question", "answer")}
    return Problem("", str(row.get("question", "")), row["answer"], extra)
