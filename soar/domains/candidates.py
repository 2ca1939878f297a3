"""The candidate problems of a config: what it names, loaded, before anything is asked of a model."""

import hashlib
from typing import NamedTuple

from soar.config import Config, ConfigError
from soar.domains.world import get_world
from soar.problems.domain import Domain, domain_of
from soar.problems.load import COLUMNS, DataError, Dropped, LoadReport, fingerprint, hard_file, load_problems
from soar.types import Problem, said_by

HIDDEN = "options in a column of their own, which students do not see"


class Candidates(NamedTuple):
    """problems: in the order of the source. report: what the loader did. digest: sha256 of ids, questions and answers."""

    problems: list[Problem]
    report: LoadReport
    digest: str


def candidates(config: Config, revision: str | None = None) -> Candidates:
    """Load those of a config; revision: of the hub dataset that a resumed run began with. Raises ConfigError, DataError."""
    keys = config.problems
    if keys.world:
        try:
            problems = get_world(keys.world).problems("hard", keys.limit or 256, config.seed)
        except ValueError as error:
            raise ConfigError(f"problems.source = {keys.source!r}, problems.limit = {keys.limit}: {error}") from error
        report = LoadReport(keys.source, rows=len(problems), kept=len(problems))
    else:
        # a hard set has columns of its own, whatever those of the file were that it was made from
        settings = dict(keys) | {"revision": revision or keys.revision}
        settings |= {"question_column": "question", "answer_column": "answer"} if hard_file(keys.source) else {}
        problems, report = load_problems(**settings, seed=config.seed)
    problems = arranged(domain_of(keys), problems, report)
    lines = "\n".join(f"{p.id}\t{p.question}\t{p.answer}" for p in problems)
    return Candidates(problems, report, hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest())


def arranged(domain: Domain, problems: list[Problem], report: LoadReport) -> list[Problem]:
    """The problems as the domain puts them to students, others to `report.dropped`. Raises DataError when none is left."""
    if domain.arrange is None:
        report.notes.update(HIDDEN for problem in problems if _hides_options(problem))
        key = "problems.question_column"
        report.notes.update(
            f"column {name!r} is not asked: {key} = '{name} + {report.columns.get('question')}' puts it in front"
            for problem in problems
            for name, text in problem.extra.items()
            if name.lower() in COLUMNS["beside"] and isinstance(text, str) and text not in problem.question
        )
        return problems
    kept: dict[str, Problem] = {}
    for problem in problems:
        try:
            made = domain.arrange(problem)
        except Exception as error:  # a user's function may raise anything
            made = said_by(error)
        if isinstance(made, str):
            report.dropped.append(Dropped(f"domain {domain.name}: {made}", where=problem.id))
        elif fingerprint(made.question) in kept:
            report.dropped.append(Dropped("duplicate question", "after the domain has arranged it", where=problem.id))
        else:
            kept[fingerprint(made.question)] = made
    report.kept = len(kept)
    if not kept:
        raise DataError(f"{report.source}: domain {domain.name} can use no problem; the first: {report.dropped[0]}")
    return list(kept.values())


def _hides_options(problem: Problem) -> bool:
    """Is an option of the columns `options` or `choices` (a list, or ARC's object with one) missing in the question?"""
    texts = problem.extra.get("options", problem.extra.get("choices"))
    texts = texts.get("text") if isinstance(texts, dict) else texts
    return isinstance(texts, list) and any(str(text) not in problem.question for text in texts)
