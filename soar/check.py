"""Whether a run can work, as far as that can be told without a model: the problems and their gold answers.

Every check ends in a `Finding`; nothing here raises for what a user can mend. `check_model.py` has the checks that need
the model. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from soar.candidates import candidates
from soar.config import Config
from soar.domains import domain_of
from soar.figures import visible
from soar.grading import DomainPool, open_pool
from soar.types import Problem, UserError, Verdict
from soar.verify import NAMES, columns_of

GOLD_SECONDS = 25.0  # time for gold answers, so that a check of a large file stays under a minute
GOLD_BATCH = 500
LISTED = 10
FEWEST = 4  # hard problems that a run needs


class Status(str, Enum):
    """OK; WARNING: a run can work, but worse or dearer than it might; FAIL: it cannot."""

    OK = "ok"
    WARNING = "warning"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report. details: further lines. advice: what to do, empty when all is well. facts: its numbers."""

    name: str
    status: Status
    message: str
    advice: str = ""
    details: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """As text for a terminal, with nothing in it that could move the cursor."""
        indent = " " * 21
        more = [f"{indent}{line}" for text in self.details for line in text.split("\n")]
        more += [f"{indent}-> {self.advice}"] if self.advice else []
        return [visible(line) for line in [f"{self.status.value:8s} {self.name:11s} {self.message}", *more]]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "status": self.status.value, "details": list(self.details)}


def can_work(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.status is not Status.FAIL for finding in findings)


def failed(name: str, error: Exception) -> Finding:
    """The finding for an error that a user can mend; its message says how."""
    first, *rest = str(error).split("\n")
    return Finding(name, Status.FAIL, first, details=tuple(rest))


def check_problems(config: Config) -> tuple[Finding, list[Problem]]:
    """Load the candidates: what was read, which columns, and every row that is left out with file and line."""
    try:
        loaded = candidates(config)
    except UserError as error:
        return failed("problems", error), []
    report, count = loaded.report, len(loaded.problems)
    first, *details = report.lines()
    facts = {
        "problems": count,
        "rows": report.rows,
        "dropped": len(report.dropped),
        "columns": report.columns,
        "notes": dict(report.notes),
        "revision": report.revision,
        "sha256": loaded.digest,
    }
    status, advice = Status.OK, ""
    wanted = 2 * config.reward.questions
    if count < FEWEST:
        status, advice = Status.FAIL, f"a run needs at least {FEWEST} hard problems: give more"
    elif report.dropped:
        status, advice = Status.WARNING, "mend the rows that are left out, or go on without them"
    elif count < wanted:
        status = Status.WARNING
        advice = (
            f"the training half is smaller than reward.questions = {config.reward.questions}, so rewards are coarser: "
            f"give {wanted} hard problems or more, or lower reward.questions"
        )
    return Finding("problems", status, first, advice, tuple(details), facts), loaded.problems


def check_domain(config: Config) -> list[Finding]:
    """What the domain says about this machine: one finding, or none for a domain that needs nothing of it."""
    try:
        domain = domain_of(config.problems)
        return [Finding("domain", Status.OK, domain.describe())] if domain.describe else []
    except UserError as error:
        return [failed("domain", error)]


def check_golds(config: Config, problems: Sequence[Problem]) -> Finding:
    """Grade every gold answer against itself: the verifier must find it correct, or no attempt ever will be."""
    limit = time.monotonic() + GOLD_SECONDS
    groups: dict[str, list[Problem]] = {}  # problems with one verdict; a function may look at their other columns
    try:
        domain = domain_of(config.problems)
    except UserError as error:
        return failed("domain", error)
    name = domain.label
    for problem in problems:
        groups.setdefault(problem.answer if name in NAMES else problem.id, []).append(problem)
    first_of, verdicts = [group[0] for group in groups.values()], list[Verdict]()
    try:
        with open_pool(domain, config.problems) as pool:
            for first in range(0, len(first_of), GOLD_BATCH):
                if first and time.monotonic() > limit:
                    break
                batch = first_of[first : first + GOLD_BATCH]
                verdicts += pool.check_golds([problem.answer for problem in batch], columns_of(batch))
            listed = [p for p, v in zip(first_of, verdicts, strict=False) if not v.solved][:LISTED]
            faults = pool.faults(listed) if isinstance(pool, DomainPool) else [""] * len(listed)
    except UserError as error:
        return failed("golds", error)
    judged = [
        (problem, verdict)
        for group, verdict in zip(groups.values(), verdicts, strict=False)  # the time may be over before the last
        for problem in group
    ]
    named = {problem.id: f" ({fault})" for problem, fault in zip(listed, faults, strict=True) if fault}
    return _gold_finding(name, judged, len(problems), pool.last_error, named)


def _gold_finding(
    name: str, judged: list[tuple[Problem, Verdict]], total: int, error: str | None, named: dict[str, str]
) -> Finding:
    checked, bad = len(judged), [(problem, verdict) for problem, verdict in judged if not verdict.solved]
    good = checked - len(bad)
    message = f"{good:,} of {checked:,} gold answers grade as correct by {name!r} ({good / max(1, checked):.2%})"
    details = [f"{p.id}: {verdict.value}{named.get(p.id, '')}: {p.answer[:100]!r}" for p, verdict in bad[:LISTED]]
    details += [f"... and {len(bad) - LISTED:,} more"] if len(bad) > LISTED else []
    details += [f"the last check that failed: {error[:300]}"] if error else []
    facts = {
        "checked": checked,
        "correct": good,
        "not_correct": [{"id": p.id, "answer": p.answer, "verdict": verdict.value} for p, verdict in bad],
    }
    status, advice = Status.OK, ""
    if checked < total:
        status = Status.WARNING
        message += f"; {total - checked:,} more were not checked in {GOLD_SECONDS:.0f} s"
        advice = "check all with `soar verify FILE --golds`"
    if not good or good + total - checked < FEWEST:
        status = Status.FAIL
        advice = "choose another problems.verifier (number, exact, choice, your own) or domain, or mend the answers"
    elif bad:
        status = Status.WARNING
        advice = (
            "unscorable ones are left out of a run, the others can never be solved: mend them or change the verifier"
        )
    return Finding("golds", status, message, advice, tuple(details), facts)


def summary(findings: Sequence[Finding]) -> str:
    """The last line: yes or no, and how much there is to mend."""
    fails = sum(finding.status is Status.FAIL for finding in findings)
    warnings = sum(finding.status is Status.WARNING for finding in findings)
    noted = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
    if fails:
        return f"no: {fails} thing{'s' * (fails != 1)} to mend before a run can work{noted}"
    return f"yes: a run can work{noted}"
