"""Problems of reasoning-gym families (`reasoning_gym:NAME`), graded by our own comparison or by the family's scorer.

Numbers are compared by value, everything else as text, problems of the teacher too, which have no family. Families with many
right answers are graded by the family's own scorer, in the killable workers, except where that scorer evaluates the answer as
code (EVALUATES): those are refused, since model-written text is never executed. `benchmarks/families.py` measures it.
"""

import json
from collections.abc import Callable
from functools import lru_cache

from soar.problems.answers import PATTERNS, normalize
from soar.problems.domain import WORDS, styled
from soar.problems.verify import compare_number, read_number
from soar.types import Problem, UserError, Verdict, import_extra

COMPARED, EVALUATES = (frozenset(WORDS["procedural"][key].split()) for key in ("compared", "evaluates"))


def kind_of(family: str) -> str:
    """How answers of a family are graded: `compared` (also without a family), `scorer` or `refused`."""
    if not family or family in COMPARED:
        return "compared"
    return "refused" if family in EVALUATES else "scorer"


def compare(answer: str, gold: str) -> Verdict:
    """Equal values where the gold answer is a number, else equal words: without case, commas, quotes and brackets."""
    if read_number(gold) is not None:
        return compare_number(answer, gold)
    pieces = (PATTERNS["joint"].split(normalize(text).casefold()) for text in (answer, gold))
    read, wanted = (list(filter(None, words)) for words in pieces)
    return Verdict.CORRECT if read == wanted else Verdict.WRONG


@lru_cache(maxsize=8)
def _scorer(family: str) -> Callable[..., float]:
    missing = f"the scorer of {family} needs reasoning-gym: pip install 'soar-rl[procedural]'"
    return import_extra("reasoning_gym.factory", UserError, missing).get_score_answer_fn(family)


def verify(answer: str, problem: Problem) -> Verdict:
    """By our own comparison where it can grade the family, else by the family's scorer (1 is correct, less is wrong)."""
    family = str(problem.extra.get("family") or "")
    if kind_of(family) == "compared":
        return compare(answer, problem.answer)
    if kind_of(family) == "refused" or "metadata" not in problem.extra:
        return Verdict.UNSCORABLE
    metadata = json.loads(problem.extra["metadata"])
    entry = {"question": problem.question, "answer": problem.answer, "metadata": metadata}
    return Verdict.CORRECT if float(_scorer(family)(answer=answer, entry=entry)) >= 1 else Verdict.WRONG


def validate(problem: Problem) -> str | None:
    """`scorer_runs_text`, or `gold_answer_refused` where the scorer does not accept the family's own answer."""
    kind = kind_of(str(problem.extra.get("family") or ""))
    if kind == "refused":
        return "scorer_runs_text"
    return "gold_answer_refused" if kind == "scorer" and not verify(problem.answer, problem).solved else None


PROCEDURAL = styled("procedural", verify=verify, validate=validate)
