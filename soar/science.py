"""The domains `science` and `multiple_choice`, each for instruction-tuned models and plain for small ones; and
`science_list`, a list of worked exercises, one a line, that a model of a few hundred million parameters continues."""

from __future__ import annotations

from dataclasses import replace

from soar import choices
from soar.domains import Domain
from soar.prompts import PromptFormat, worked_list
from soar.quantities import compare_quantities, read_gold, registry
from soar.types import Problem, Verdict

SUBJECTS = "mechanics, electricity, heat, waves, chemistry, or radioactivity"
TAGS = """
<question>
{question}
</question>
<answer>
\\boxed{{{answer}}}
</answer>

Put nothing but the problem between the question tags, and nothing but the boxed answer between the answer tags.
Reasoning belongs outside of the tags."""

QUANTITY_TEACHER = """Write one new, original and challenging science problem from {subject}.
It should take at least two steps, state every constant that is needed, and have one number with a unit as its answer.
You may think first. Then write exactly one problem, in this form:
""" + TAGS.format(question="the full problem statement", answer="number and unit")
QUANTITY_STUDENT = """{question}

Reason step by step, and end with the final number and its unit in \\boxed{}."""
CHOICE_TEACHER = """Write one new, original and challenging multiple-choice question from {subject}.
It should have four options, one of them right, and take reasoning to answer.
You may think first. Then write exactly one question, in this form:
""" + TAGS.format(
    question="the question\n(A) first option\n(B) second option\n(C) third option\n(D) fourth option", answer="letter"
)
CHOICE_STUDENT = """{question}

Reason step by step, and end with the letter of the right option in \\boxed{}."""

PLAIN_QUANTITY_TEACHER = """Write a science problem about {subject} whose answer is a number with a unit. Format:
Question: ...
Answer: ..."""
PLAIN_QUANTITY_STUDENT = """{question}
Solve it step by step. End with "Answer:", the number and its unit."""
PLAIN_CHOICE_TEACHER = """Write a science question about {subject} with four options, one of them right. Format:
Question: ...
(A) ...
(B) ...
(C) ...
(D) ...
Answer: letter"""
PLAIN_CHOICE_STUDENT = """{question}
End with "Answer:" and the letter of the right option."""

LIST = """Question: A car drives at 5 m/s for 4 s. How far does it go? Answer: 5 x 4 = 20 m
Question: A block has a mass of 12 g and a volume of 3 cm^3. What is its density? Answer: 12 / 3 = 4 g/cm^3
Question: A resistor of 6 ohm is connected to 12 V. What current flows? Answer: 12 / 6 = 2 A
Question: A train moves at 20 m/s for 7 s. How far does it go? Answer: 20 x 7 = 140 m
Question: A stone has a mass of 30 g and a volume of 5 cm^3. What is its density? Answer: 30 / 5 = 6 g/cm^3
"""

PLACEHOLDERS = ("the full problem statement", "the question", "number and unit", "letter", "question", "answer", "...")


def _tagged(name: str, teacher: str, student: str) -> PromptFormat:
    return PromptFormat(
        name, "boxed", teacher, student, default_subject=SUBJECTS, placeholders=PLACEHOLDERS, text_answers=True
    )


def _plain(name: str, teacher: str, student: str) -> PromptFormat:
    return PromptFormat(
        name,
        "marker",
        teacher,
        student,
        default_subject="speed, density, or electric current",
        teacher_prefill="Question:",
        answer_marks=("Answer:",),
        placeholders=PLACEHOLDERS,
        text_answers=True,
    )


def verify_quantity(answer: str, problem: Problem) -> Verdict:
    """`quantities.compare_quantities` against the problem's gold answer."""
    return compare_quantities(answer, problem.answer)


def validate_quantity(problem: Problem) -> str | None:
    """`answer_is_no_quantity` for a gold answer that is no number with or without a unit."""
    return None if read_gold(problem.answer) else "answer_is_no_quantity"


def prepare_quantities() -> None:
    """Load the unit registry once a worker. Raises quantities.MissingPint."""
    registry().get_name("m")


QUANTITIES = Domain(
    name="science",
    prompts=_tagged("science", QUANTITY_TEACHER, QUANTITY_STUDENT),
    verify=verify_quantity,
    validate=validate_quantity,
    prepare=prepare_quantities,
    examples=(
        Problem("speed", "A cyclist rides at 5 m/s for 2 minutes. How far does the cyclist ride?", "600 m"),
        Problem("heat", "How hot is 25 degrees Celsius in kelvin?", "298.15 K [+- 0.2]"),
    ),
)
PLAIN_QUANTITIES = replace(
    QUANTITIES,
    name="science_plain",
    prompts=_plain("science_plain", PLAIN_QUANTITY_TEACHER, PLAIN_QUANTITY_STUDENT),
)
QUANTITY_LIST = replace(
    QUANTITIES,
    name="science_list",
    prompts=worked_list("science_list", LIST),
)
CHOICES = Domain(
    name="multiple_choice",
    prompts=_tagged("multiple_choice", CHOICE_TEACHER, CHOICE_STUDENT),
    read_answer=choices.read_answer,
    verify=choices.verify,
    arrange=choices.arrange,
    examples=(Problem("metal", "Which of these conducts best?\n(A) glass\n(B) copper\n(C) wood\n(D) air", "B"),),
)
PLAIN_CHOICES = replace(
    CHOICES,
    name="multiple_choice_plain",
    prompts=_plain("multiple_choice_plain", PLAIN_CHOICE_TEACHER, PLAIN_CHOICE_STUDENT),
)
