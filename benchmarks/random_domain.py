"""A domain for random weights: any text is a problem, and a coin (the checksum of the completion) says what is right.

So a model that knows nothing goes through whole outer steps (`two_workers.py`): the teacher's texts are read, the students'
attempts are graded in worker processes as always, and half of them earn a reward.
"""

from __future__ import annotations

import zlib

from soar.problems.domain import Domain
from soar.problems.prompts import PromptFormat
from soar.types import Problem

QUESTION_WORDS = 80


def words(count: int, first: int) -> str:
    """So many words that the tokenizer of `two_workers.py` knows as one token each."""
    return " ".join(f"w{100 + (first + 7 * i) % 100}" for i in range(count))


def read_problem(text: str) -> tuple[str, str]:
    """The first words of a teacher text as the question; the answer is always 1."""
    return " ".join(text.split()[:QUESTION_WORDS]) or words(1, 0), "1"


def read_answer(completion: str) -> str:
    """1 or 0, by the checksum of the text."""
    return str(zlib.crc32(completion.encode()) & 1)


def verify(answer: str, problem: Problem) -> bool:
    """Whether the coin fell on the gold answer."""
    return answer == problem.answer


RANDOM = Domain(
    name="random",
    prompts=PromptFormat(
        name="random",
        answer_style="marker",
        teacher_template=words(240, 0),
        student_template=f"{words(60, 3)} {{question}}",
        turns=False,
        text_answers=True,
    ),
    read_problem=read_problem,
    read_answer=read_answer,
    verify=verify,
)
