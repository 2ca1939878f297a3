"""A domain: how problems of one subject are asked for, put to a student, read and checked.

A `Domain` is data and a few functions of its author. The functions see text that a model wrote, so they run in worker
processes that are killed at their limits (`grading.py`); what they raise is counted, not raised. `problems.domain` names
a built-in domain or an own one, `file.py:NAME` or `module:NAME`. Without it, `problems.format` and `problems.verifier`
make the domain. docs/domains.md has a whole one in one file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_ANSWER_CHARS
from soar.problems.pool import VerifierError, load_module
from soar.problems.prompts import PromptFormat, get_format
from soar.types import Problem, UserError

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
        `Rejection`. Default: as `prompts.pair_style` says. Only question and answer are kept, so the gold answer must say
        all that `verify` needs.
    read_answer(completion): a student's answer, or None. Default: by `prompts.answer_style`.
    verify(answer, problem): True, False, a number (1 or more is correct), None (cannot be decided), or a `Verdict`.
    validate(problem): None for a problem that can be used, else the name of what is wrong with it; it is asked about
        gold problems and about written ones. Default: the gold answer must verify against itself.
    arrange(problem): the problem as students get it, or the name of what is wrong with it: options shuffled, columns of a
        file put into the question. Asked about loaded problems and about written ones; a second time it changes nothing.
    solve(question): the right answer, or None for a question without exactly one; makes the domain an oracle (`judges`).
    prepare(): called once in every worker; raises where the domain cannot work here (a missing package).
    describe(): a sentence for `soar check` about what the domain found on this machine; raises as `prepare` does.

    gold_is_answer: False where the gold answer is no text that a student could write (tests of a program).
    examples: a few problems, for documentation and tests. max_answer_chars: longest gold answer. version: raise it when
    reading or checking changes, so that evidence made before is refused. reference: filled in by `load_domain`.
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
    prepare: Callable[[], None] | None = None
    describe: Callable[[], str] | None = None
    gold_is_answer: bool = True
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
        """sha256 of what shapes prompts, reading and checking.

        For a domain of format and verifier that of its prompts, as evidence has always recorded it. For any other the
        prompts, name, verifier, version, and the bytes of its file unless it is the package's own.
        """
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
    return Domain(problems.format, get_format(problems.format), problems.verifier)


def load_domain(reference: str, style: str = "") -> Domain:
    """A built-in domain by its name, or the one behind `file.py:NAME` or `module:NAME`. Raises DomainError.

    style: of its prompts, `tags`, `plain` or `list`; also written behind the reference, `science/plain`. An object NAME
    may be one `Domain`, which is its only style, or a dict of style -> `Domain`.
    """
    name, _, behind = reference.rpartition("/")
    name, style = (name, behind) if behind in STYLES else (reference, style or "tags")
    place = BUILTIN.get(name, name)
    if ":" not in place:
        old, _, form = name.rpartition("_")
        form = form if old != "code" and form in STYLES else "tags"
        hint = f"; {name} is now problems.domain = {old!r} with problems.style = {form!r}" if old in BUILTIN else ""
        raise DomainError(
            f"problems.domain = {reference!r}: expected one of {', '.join(sorted(BUILTIN))}, or one of yours as "
            f"file.py:NAME or module:NAME{hint}"
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


def _source_digest(module: Any) -> str:
    """sha256 of the file that a module came from; "" where there is none."""
    try:
        file = inspect.getsourcefile(module)
    except TypeError:
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""
