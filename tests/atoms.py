"""A third party's domain, written from docs/domains.md alone: how many atoms a molecule has, in question tags and a box."""

import re

from soar.problems.domain import Domain
from soar.problems.prompts import PromptFormat
from soar.types import Problem

ASKED = re.compile(r"How many atoms are in one molecule of ([A-Za-z0-9()]{1,30})\?")
PIECE = re.compile(r"([A-Z][a-z]?)(\d*)|(\()|(\))(\d*)")


def atoms(formula):
    stack, place = [0], 0
    while place < len(formula):
        found = PIECE.match(formula, place)
        if not found:
            return None
        place = found.end()
        if found[1]:
            stack[-1] += int(found[2] or 1)
        elif found[3]:
            stack.append(0)
        elif len(stack) > 1:
            inner = stack.pop()
            stack[-1] += inner * int(found[5] or 1)
        else:
            return None
    return stack[0] if len(stack) == 1 else None


def solve(question):
    found = ASKED.fullmatch(question)
    number = atoms(found[1]) if found else None
    return None if number is None else str(number)


def validate(problem):
    if not ASKED.fullmatch(problem.question):
        return "not_about_atoms"
    return None if problem.answer.isdigit() else "not_a_count"


ATOMS = Domain(
    name="atoms",
    verifier="number",
    prompts=PromptFormat(
        name="atoms",
        answer_style="boxed",
        teacher_template="Ask how many atoms are in one molecule of a substance.\n"
        "<question>How many atoms are in one molecule of X?</question>\n<answer>\\boxed{number}</answer>",
        student_template="{question}\nEnd with \\boxed{number}.",
    ),
    validate=validate,
    solve=solve,
    examples=(
        Problem("water", "How many atoms are in one molecule of H2O?", "3"),
        Problem("lime", "How many atoms are in one molecule of Ca(OH)2?", "5"),
    ),
)
