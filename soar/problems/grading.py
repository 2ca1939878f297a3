"""Reading and checking by a domain, in worker processes: the machinery between `domains.py` and everything that grades.

`DomainPool` answers the same questions as `verify.VerifierPool`, and reads teacher texts too. All functions of a domain
run in its workers, one call at a time, under the limits of time and memory of `problems.verify_*`. Text comes back as
JSON. A function that raises or is killed gives a verdict (`crashed`, `timeout`) or a rejection (`reader_failed`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from soar.config import ProblemsConfig
from soar.problems.answers import MAX_COMPLETION_CHARS, extract, read_number
from soar.problems.domain import Domain, load_domain
from soar.problems.load import fingerprint
from soar.problems.parse import MAX_TEACHER_CHARS, judge_fields, parse_all, read_fields
from soar.problems.pool import VerifierError, WorkerPool
from soar.problems.prompts import PromptFormat
from soar.problems.verify import COMPARERS, FUNCTION_MEMORY_MB, NAMES, VerifierPool, columns_of, compare_math
from soar.types import Problem, Reason, Rejection, Verdict

MAX_QUESTION_CHARS = 4000


class DomainPool(VerifierPool):
    """Checks completions, gold answers and teacher texts as a domain says. Arguments as in `VerifierPool`."""

    def __init__(
        self, domain: Domain, *, timeout_s: float = 5.0, memory_mb: int | None = None, workers: int = 0
    ) -> None:
        if domain.verify is None and domain.verifier not in NAMES:
            raise VerifierError(
                f"domain {domain.name!r}: verifier = {domain.verifier!r}, expected one of {', '.join(NAMES)}; a check of "
                "your own is given as `verify`"
            )
        self.name, self.domain = domain.label, domain
        self.answer_style = domain.prompts.answer_style
        memory = FUNCTION_MEMORY_MB if memory_mb is None else memory_mb
        count = workers or min(os.cpu_count() or 1, 8)
        self._pool = WorkerPool(domain.reference, timeout_s, memory, count, loader="soar.problems.grading:load_worker")

    def check(
        self, completions: Sequence[str], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """One Verdict for each completion, in order. columns: at least `question`, each as long as completions."""
        texts = [text[-MAX_COMPLETION_CHARS:] for text in completions]
        return self._run("check", texts, _rows(golds, columns))

    def check_answers(
        self, answers: Sequence[str | None], golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[Verdict]:
        """Verdicts for answers that are already extracted (None: no answer)."""
        rows = _rows(golds, columns)
        given = [i for i, answer in enumerate(answers) if answer is not None]
        found = self._run("compare", [answers[i] or "" for i in given], [rows[i] for i in given])
        verdicts = [Verdict.NO_ANSWER] * len(answers)
        for i, verdict in zip(given, found, strict=True):
            verdicts[i] = verdict
        return verdicts

    def check_golds(self, golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[Verdict]:
        """Whether each gold problem can be used: CORRECT, or why not (UNSCORABLE where `validate` names something)."""
        return self._run("gold", list(golds), _rows(golds, columns))

    def faults(self, problems: Sequence[Problem]) -> list[str]:
        """What the domain says is wrong with each gold problem, "" where it names nothing."""
        rows = _rows([p.answer for p in problems], columns_of(problems))
        found = self._pool.read([("fault", p.answer, row) for p, row in zip(problems, rows, strict=True)])
        return ["" if isinstance(text, Verdict) else str(json.loads(text))[:100] for text in found]

    def parsable(self, answers: Sequence[str]) -> list[bool]:
        """Any text; whether it can serve depends on its question (`usable_answers`)."""
        return [bool(answer.strip()) for answer in answers]

    def read_answers(self, completions: Sequence[str]) -> list[str | None]:
        """The answer that each completion commits to."""
        if self.domain.read_answer is None:
            return [extract(text, self.answer_style) for text in completions]
        found = self._pool.read([("extract", text[-MAX_COMPLETION_CHARS:], {}) for text in completions])
        return [None if isinstance(text, Verdict) else json.loads(text) for text in found]

    def solve(self, questions: Sequence[str]) -> list[str | None]:
        """The domain's own answers; None where it has none, or its solver failed."""
        found = self._pool.read([("solve", question, {}) for question in questions])
        return [None if isinstance(text, Verdict) else json.loads(text) for text in found]

    def read_problems(
        self, texts: Sequence[str], truncated: Sequence[bool], seen: set[str] | None = None, strict: bool = False
    ) -> list[Problem | Rejection]:
        """The problem in each teacher text, or why there is none.

        truncated: the text hit its token budget. seen: fingerprints of questions that count as duplicates; new ones are
        added. strict: tags as asked, for a domain without a reader of its own.
        """
        tasks = [
            ("read", text[:MAX_TEACHER_CHARS], {"truncated": cut, "strict": strict})
            for text, cut in zip(texts, truncated, strict=True)
        ]
        results: list[Problem | Rejection] = []
        for text, found in zip(texts, self._pool.read(tasks), strict=True):
            if isinstance(found, Verdict):
                detail = "reader_timeout" if found is Verdict.TIMEOUT else ""
                results.append(Rejection(Reason.READER_FAILED, text, detail))
                continue
            fields = json.loads(found)
            if "reason" in fields:
                results.append(Rejection(Reason(fields["reason"]), text, fields["detail"]))
                continue
            key = fingerprint(fields["question"])
            if seen is not None and key in seen:
                results.append(Rejection(Reason.DUPLICATE, text))
                continue
            if seen is not None:
                seen.add(key)
            results.append(Problem(key[:16], fields["question"], fields["answer"]))
        return results

    def _run(self, task: str, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Verdict]:
        return self._pool.run([(task, text, row) for text, row in zip(texts, rows, strict=True)])


def open_pool(domain: Domain, problems: ProblemsConfig) -> VerifierPool:
    """The pool that grades by a domain, with the limits of a config. Raises VerifierError."""
    limits: dict[str, Any] = {
        "timeout_s": problems.verify_timeout_s,
        "memory_mb": problems.verify_memory_mb,
        "workers": problems.verify_workers,
    }
    if domain.own:
        return DomainPool(domain, **limits)
    return VerifierPool(domain.verifier, answer_style=domain.prompts.answer_style, **limits)


def make_pool(verifier: str, answer_style: str, domain: str = "") -> VerifierPool:
    """A pool by names, for exported rewards: of a domain, or of a verifier and an answer style."""
    return DomainPool(load_domain(domain)) if domain else VerifierPool(verifier, answer_style=answer_style)


def read_problems(
    pool: Any,
    prompts: PromptFormat,
    texts: Sequence[str],
    truncated: Sequence[bool],
    seen: set[str] | None,
    strict: bool,
) -> list[Problem | Rejection]:
    """Teacher texts -> problems or rejections, by whatever pool a run has."""
    if isinstance(pool, DomainPool):
        return pool.read_problems(texts, truncated, seen, strict)
    return parse_all(texts, prompts, pool, truncated=truncated, seen=seen, strict=strict)


def read_answers(pool: Any, prompts: PromptFormat, texts: Sequence[str]) -> list[str | None]:
    """The answers of completions, by whatever pool a run has."""
    if isinstance(pool, DomainPool):
        return pool.read_answers(texts)
    return [extract(text, prompts.answer_style) for text in texts]


def usable_answers(pool: Any, problems: Sequence[Problem]) -> list[bool]:
    """Whether the answer of each problem can serve as a gold answer."""
    if isinstance(pool, DomainPool):
        verdicts = pool.check_golds([p.answer for p in problems], columns_of(problems))
        return [bool(p.answer.strip()) and v.solved for p, v in zip(problems, verdicts, strict=True)]
    return pool.parsable([p.answer for p in problems])


def _rows(golds: Sequence[str], columns: Mapping[str, Sequence[Any]] | None) -> list[dict[str, Any]]:
    for key, column in (columns or {}).items():
        if len(column) != len(golds):
            raise ValueError(f"column {key!r} has {len(column)} values for {len(golds)} gold answers")
    return [
        {**{key: column[i] for key, column in (columns or {}).items()}, "answer": gold} for i, gold in enumerate(golds)
    ]


def load_worker(reference: str) -> Callable[..., Verdict | str]:
    """What a worker of a `DomainPool` does: `(task, text, row) -> verdict or JSON`. Called in the worker."""
    domain = load_domain(reference)
    if domain.prepare is not None:
        domain.prepare()
    worker = _Worker(domain)
    tasks: dict[str, Callable[[str, dict[str, Any]], Verdict | str]] = {
        "check": worker.check,
        "compare": worker.compare,
        "gold": worker.gold,
        "fault": lambda text, row: json.dumps(worker.fault(_problem(row))),
        "read": worker.read,
        "extract": lambda text, row: json.dumps(worker.extract(text)),
        "solve": lambda text, row: json.dumps(domain.solve(text) if domain.solve else None),
    }
    return lambda task, text, row: tasks[task](text, row)


class _Worker:
    """The functions of a domain, with the defaults for those it leaves out."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def extract(self, text: str) -> str | None:
        if self.domain.read_answer is None:
            return extract(text, self.domain.prompts.answer_style)
        answer = self.domain.read_answer(text)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"read_answer returned {type(answer).__name__}, expected text or None")
        return answer

    def check(self, text: str, row: dict[str, Any]) -> Verdict:
        answer = self.extract(text)
        return Verdict.NO_ANSWER if answer is None else self.compare(answer, row)

    def compare(self, answer: str, row: dict[str, Any]) -> Verdict:
        return self._equal(answer, _problem(row))

    def gold(self, answer: str, row: dict[str, Any]) -> Verdict:
        problem = _problem(row)
        if self.fault(problem):
            return Verdict.UNSCORABLE
        if self.domain.arrange is not None:
            made = self.domain.arrange(problem)
            problem = problem if isinstance(made, str) else made
        if self.domain.validate is not None:
            return Verdict.CORRECT
        if self.domain.verify is None and self.domain.verifier == "math":
            return _symbolic("math", problem.answer, problem.answer)
        return self._equal(problem.answer, problem)

    def fault(self, problem: Problem) -> str:
        """What `arrange` or `validate` names."""
        made = problem if self.domain.arrange is None else self.domain.arrange(problem)
        if isinstance(made, str):
            return made
        return (self.domain.validate(made) if self.domain.validate else None) or ""

    def read(self, text: str, row: dict[str, Any]) -> str:
        """`{question, answer}` or `{reason, detail}` as JSON."""
        found = self._pair(text, row["truncated"], row["strict"])
        if isinstance(found, Rejection):
            return json.dumps({"reason": found.reason.value, "detail": found.detail})
        return json.dumps({"question": found[0], "answer": found[1]})

    def _pair(self, text: str, truncated: bool, strict: bool) -> tuple[str, str] | Rejection:
        domain = self.domain
        found: Any
        if domain.read_problem is None or not text.strip():
            found = read_fields(text, domain.prompts, truncated, strict)
        else:
            found = domain.read_problem(text)
        if truncated:
            return Rejection(Reason.TRUNCATED, "")
        if isinstance(found, Rejection):
            return found
        if isinstance(found, str):
            known = {reason.value for reason in Reason}
            return Rejection(Reason(found), "") if found in known else Rejection(Reason.REFUSED, "", found)
        question, answer = (found.question, found.answer) if isinstance(found, Problem) else found
        if not isinstance(question, str) or not isinstance(answer, str):
            raise TypeError("read_problem returned a pair that is not of two texts")
        question, answer = question.strip(), answer.strip()
        own = domain.read_problem is not None or domain.verify is not None
        reason = judge_fields(question, answer, domain.prompts, MAX_QUESTION_CHARS, domain.max_answer_chars, own)
        if reason is not None:
            return Rejection(reason, "")
        problem: Problem | str = Problem("", question, answer)
        if domain.arrange is not None:
            problem = domain.arrange(Problem("", question, answer))
        if isinstance(problem, str):
            return Rejection(Reason.REFUSED, "", problem)
        wrong = self._wrong(problem)
        return (problem.question, problem.answer) if wrong is None else wrong

    def _wrong(self, problem: Problem) -> Rejection | None:
        """What is wrong with a problem, by `validate` or by whether its answer can be checked."""
        domain = self.domain
        if domain.validate is not None:
            name = domain.validate(problem)
            return None if name is None else Rejection(Reason.REFUSED, "", str(name))
        if domain.verify is not None or domain.verifier not in ("math", "number"):
            good = self._equal(problem.answer, problem).solved
        elif read_number(problem.answer) is not None:
            good = True
        else:
            good = domain.verifier == "math" and _symbolic("parsable", problem.answer, "").solved
        return None if good else Rejection(Reason.UNPARSABLE_ANSWER, "")

    def _equal(self, answer: str, problem: Problem) -> Verdict:
        if self.domain.verify is not None:
            return _verdict(self.domain.verify(answer, problem))
        if self.domain.verifier == "math":
            verdict = compare_math(answer, problem.answer)
            return _symbolic("math", answer, problem.answer) if verdict is None else verdict
        return COMPARERS[self.domain.verifier](answer, problem.answer)


def _symbolic(kind: str, answer: str, gold: str) -> Verdict:
    from soar.problems.symbolic import check_symbolic  # takes a second to import, and few domains need it

    return check_symbolic(kind, answer, gold)


def _problem(row: dict[str, Any]) -> Problem:
    extra = {key: value for key, value in row.items() if key not in ("question", "answer")}
    return Problem("", str(row.get("question", "")), row["answer"], extra)


def _verdict(value: Any) -> Verdict:
    """What `verify` returned, as a verdict. Raises TypeError for anything but Verdict, truth value, number or None."""
    if isinstance(value, Verdict):
        return value
    if value is None:
        return Verdict.UNSCORABLE
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"verify returned {type(value).__name__}, expected True, False, a number, None or a Verdict")
    score = float(value)
    if math.isnan(score):
        return Verdict.UNSCORABLE
    return Verdict.CORRECT if score >= 1 else Verdict.WRONG
