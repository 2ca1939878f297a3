"""Teacher text to problems with a reason for every refusal, and the rewards as numbers."""

from __future__ import annotations

from soar.problems.load import fingerprint
from soar.problems.parse import parse
from soar.problems.prompts import PromptFormat, get_format
from soar.types import Reason, Rejection

TAGS, LABELS, TINY, SUMS, TOTALS = map(get_format, ("tags", "question_answer", "tiny", "sums", "totals"))


def read(text: str, fmt: PromptFormat = TAGS, truncated: bool = False) -> tuple[str, str] | Reason:
    outcome = parse(text, fmt, truncated=truncated)
    if isinstance(outcome, Rejection):
        assert outcome.text == text
        return outcome.reason
    assert outcome.id == fingerprint(outcome.question)[:16]
    return outcome.question, outcome.answer


def tags(question: str, answer: str) -> str:
    return f"Let me think.\n<question>\n{question}\n</question>\n<answer>\n{answer}\n</answer>\nDone."


GOOD = tags("What is 6 times 7?", r"\boxed{42}")
PAIR = ("What is 6 times 7?", "42")
