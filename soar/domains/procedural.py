"""Problems of reasoning-gym families (`reasoning_gym:NAME`), graded by our own comparison or by the family's scorer.

The domain `procedural` compares numbers by value and everything else as text. Families with many right answers are graded by
the family's own scorer, in the killable workers, except where that scorer evaluates the answer as code (EVALUATES): those are
refused as `scorer_runs_text`, since model-written text is never executed. `benchmarks/families.py` measures all of it.
Problems of the teacher have no family, and are compared as numbers or as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache

from soar.problems.answers import MARK, MAX_ANSWER_CHARS, extract, normalize
from soar.problems.domain import Domain
from soar.problems.prompts import plain, tagged, worked_list
from soar.problems.verify import compare_number, read_number
from soar.types import Problem, UserError, Verdict

COMPARED = frozenset(
    """ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation
    binary_matrix bitwise_arithmetic caesar_cipher calendar_arithmetic chain_sum circuit_logic coin_flip
    color_cube_rotation complex_arithmetic count_bits count_primes course_schedule cryptarithm
    decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font
    fraction_simplification futoshiki game_of_life game_of_life_halting gcd gsm_symbolic isomorphic_strings
    kakurasu largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle
    manipulate_matrix maze mini_sudoku modulo_grid needle_haystack number_filtering number_format
    number_sequence number_sorting pool_matrix prime_factorization products ransom_note rearc rectangle_count
    rotate_matrix rotten_oranges self_reference sentence_reordering simple_equations simple_geometry
    spell_backward spiral_matrix string_insertion string_manipulation string_splitting string_synthesis sudoku
    survo syllogism time_intervals word_sequence_reversal word_sorting zebra_puzzles""".split()  # noqa: SIM905
)
"""Families with one right answer: a number, a word, a list, a grid."""
EVALUATES = frozenset(
    """binary_matrix countdown intermediate_integration n_queens polynomial_multiplication puzzle24 simple_integration
    spiral_matrix string_insertion""".split()  # noqa: SIM905
)
"""Families whose scorer (reasoning-gym 0.1.25) hands the answer to `eval` or to sympy's parser, which evaluates."""

LIST = """Question: State the final answer to the following arithmetic problem: 3 + 9 = Answer: 12
Question: State the final answer to the following arithmetic problem: 8 - 2 + 5 = Answer: 11
Question: State the final answer to the following arithmetic problem: 7 + 6 = Answer: 13
"""
JOINTS = re.compile(r"[\s,;\[\](){}'\"|]+")


def kind_of(family: str) -> str:
    """How answers of a family are graded: `compared` (also without a family), `scorer` or `refused`."""
    if not family or family in COMPARED:
        return "compared"
    return "refused" if family in EVALUATES else "scorer"


def compare(answer: str, gold: str) -> Verdict:
    """Equal values where the gold answer is a number, else equal words.

    Words: the texts without case, white space, commas, quotes and brackets, which models and families write differently.
    """
    if read_number(gold) is not None:
        return compare_number(answer, gold) or Verdict.WRONG
    return Verdict.CORRECT if words(answer) == words(gold) else Verdict.WRONG


def words(text: str) -> list[str]:
    """What of a text is compared."""
    plain = normalize(text) if len(text) <= MAX_ANSWER_CHARS else text
    return [word for word in JOINTS.split(plain.casefold()) if word]


def read_marked(completion: str) -> str | None:
    """What follows the last answer mark, up to a blank line: a grid is an answer of several lines."""
    marks = [match.end() for match in MARK.finditer(completion)]
    if not marks:
        return None
    found = completion[marks[-1] :].strip().split("\n\n", 1)[0].strip()
    boxed = extract(found, "boxed") if "box" in found else None
    return boxed or found or None


@lru_cache(maxsize=8)
def _scorer(family: str) -> Callable[..., float]:
    try:
        from reasoning_gym.factory import get_score_answer_fn
    except ImportError as error:
        raise UserError(f"the scorer of {family} needs reasoning-gym: pip install 'soar-rl[procedural]'") from error
    return get_score_answer_fn(family)


def verify(answer: str, problem: Problem) -> Verdict:
    """By our own comparison where it can grade the family, else by the family's scorer (1 is correct, less is wrong)."""
    family = str(problem.extra.get("family") or "")
    kind = kind_of(family)
    if kind == "compared":
        return compare(answer, problem.answer)
    if kind == "refused" or "metadata" not in problem.extra:
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


PROMPTS = {
    "tags": tagged(
        "procedural",
        """Write one new, original and challenging puzzle about {subject}.
It should have one final answer that can be checked. """,
        "arithmetic, sequences, sorting, or logic",
        question="the full puzzle",
        noun="puzzle",
    ),
    "plain": plain(
        "procedural_plain",
        "Write a puzzle about {subject}.",
        'End with "Answer:" and the answer.',
        "adding and subtracting small numbers",
    ),
    "list": worked_list("procedural_list", LIST),
}
PROCEDURAL = {
    style: Domain(
        name="procedural",
        prompts=prompts,
        read_answer=read_marked if style == "plain" else None,
        verify=verify,
        validate=validate,
        examples=(
            Problem("gcd", "Find the greatest common divisor of 12 and 18.", "6"),
            Problem("sort", "Sort these words: pear, apple, fig.", "apple, fig, pear"),
        ),
    )
    for style, prompts in PROMPTS.items()
}
"""The domain `procedural`, by prompt style."""
