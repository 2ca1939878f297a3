"""Prompt styles that the built-in domains share.

`tags`: question tags and a box, for instruction-tuned models. `plain`: `Question:` and `Answer:`, for small ones. The third,
`list`, is `prompts.worked_list`: solved problems, one a line, that a model of a few hundred million parameters continues.
"""

from __future__ import annotations

from soar.problems.prompts import PromptFormat

FORM = """
<question>
{question}
</question>
<answer>
\\boxed{{{answer}}}
</answer>

Put nothing but the {noun} between the question tags, and nothing but the boxed answer between the answer tags.
Reasoning belongs outside of the tags."""
SUBJECTS = "mechanics, electricity, heat, waves, chemistry, or radioactivity"
PLACEHOLDERS = (
    "the full problem statement", "the question", "the full puzzle", "number and unit", "letter", "the final answer",
    "question", "answer", "...",
)  # fmt: skip


def tagged(name: str, teacher: str, end: str, subject: str, question: str, answer: str, noun: str) -> PromptFormat:
    """Style `tags`. teacher: the prompt up to the form with `question` and `answer`. end: what students end with."""
    return PromptFormat(
        name,
        "boxed",
        teacher + FORM.format(question=question, answer=answer, noun=noun),
        f"{{question}}\n\nReason step by step, and end with {end} in \\boxed{{}}.",
        default_subject=subject,
        placeholders=PLACEHOLDERS,
        text_answers=True,
    )


def plain(name: str, teacher: str, end: str, subject: str) -> PromptFormat:
    """Style `plain`. teacher: the whole prompt. end: the last line of the student's."""
    return PromptFormat(
        name,
        "marker",
        teacher,
        f"{{question}}\n{end}",
        default_subject=subject,
        teacher_prefill="Question:",
        answer_marks=("Answer:",),
        placeholders=PLACEHOLDERS,
        text_answers=True,
    )
