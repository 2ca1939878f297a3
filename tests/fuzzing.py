"""Hostile texts and what must hold for each of them: shared by test_fuzz.py and benchmarks/fuzz.py."""

from __future__ import annotations

import random
from collections.abc import Sequence

from soar.loop.rollout import mentions
from soar.problems.answers import MAX_ANSWER_CHARS, extract, mark_up, normalize, split_choice
from soar.problems.domain import Domain, Grader
from soar.problems.prompts import FORMATS
from soar.problems.verify import compare_choice, compare_exact, compare_math, compare_number, gold_kind, read_number
from soar.types import Problem, Reason, Rejection, Verdict

FRAGMENTS = [
    "<question>What is 6 times 7?</question>", "<answer>\\boxed{42}</answer>", "\\boxed{42}", "<ans> 42",
    "<question>", "</question>", "<answer>", "</answer>", "<Question>", "< answer >", "<question", "question>",
    "</", "\\boxed{", "\\boxed", "\\fbox{", "\\boxed 7", "\\\\boxed{3}", "{", "}", "\\{", "\\}", "\\", "$", "$$",
    "\\[", "\\]", "Question:", "**Question 2:**", "Answer:", "**Answer:**", "answer :", "\nQuestion: ",
    "\nAnswer: ", "<ans>", "<eos>", "<|im_end|>", "<|eot_id|>", "<s>", "\n", "\r\n", "\t", " ", "   ",
    "What is 6 times 7?", "42", "-3.50", "1,234", "1/3", "\\frac{1}{2}", "\\frac12", "1\\frac{3}{4}", "50\\%",
    "50%", ".75", "1e5", "\\times 10^{3}", "x^2+1", "(1,2)", "[0,1)", "\\{1,2\\}", "\\text{(B)}", "(B)", "B.",
    "\\text{", "\\dfrac", "^\\circ", "\\$5", "12 cm", "10 dollars", "N/A", "nan", "[answer]", "the final answer",
    "...", ".", ",", ":", "#", "####", "* ", "_", "^", "0", "-0", "1_000", "9^{9^{9^9}}", "\u00bd", "\u2212",
    "\u221a2", "x\u00b2", "\uff14\uff12", "\u0664", "\u202e", "\u200b", "\ud800", "\x00", "\x1b[31m", "\U0001f600",
    "\ufdfa",
    "\\begin{pmatrix}", "\\end{pmatrix}", "\\cup ", "\\pm ", "x<", "|", "\\lfloor ", "!", "\\sum_{k=1}^{3} k",
    "<script>", "__import__('os')", "{{7*7}}", "=1+1", " " * 300, "(" * 50, "{" * 50, "7" * 300,
]  # fmt: skip


def make_text(rng: random.Random, fragments: Sequence[str] = FRAGMENTS, most: int = 14) -> str:
    """Fragments in a random order, sometimes with a character changed, dropped or repeated many times."""
    text = "".join(rng.choice(fragments) for _ in range(rng.randint(0, most)))
    if text and rng.random() < 0.2:
        place = rng.randrange(len(text))
        text = (
            text[:place]
            + rng.choice(["", chr(rng.randrange(0x20, 0x300)), text[place] * rng.randint(2, 400)])
            + text[place + 1 :]
        )
    return text


def check_text(text: str, other: str) -> int:
    """Raise AssertionError when extraction, parsing or a comparison breaks a promise on these texts.

    Returns how many of the formats read a problem.
    """
    accepted = 0
    answers = [extract(text, "boxed"), extract(text, "marker"), text]
    for answer in answers[:2]:
        assert answer is None or (answer.strip() == answer != "" and answer in text), "an answer stands in the text"
    for fmt in FORMATS.values():
        grader = Grader(Domain(fmt.name, fmt))
        outcome = grader.read(text)
        if isinstance(outcome, Problem):
            accepted += 1
            assert outcome.question and outcome.answer and outcome.question in text
            assert outcome.answer in text
            assert len(outcome.question) <= 4000 and len(outcome.answer) <= MAX_ANSWER_CHARS
        else:
            assert isinstance(outcome.reason, Reason) and outcome.text == text
        assert isinstance(grader.read(text, truncated=True), Rejection)
    for answer in answers:
        if answer is not None:
            check_answer(answer, other)
    return accepted


def check_answer(answer: str, gold: str) -> None:
    """The comparisons: never an exception, equal texts are equal, and the order of the two does not matter."""
    for compare in (compare_exact, compare_choice):
        assert compare(answer, answer) is Verdict.CORRECT
        assert isinstance(compare(answer, gold), Verdict)
    for kind in ("math", "number"):
        assert gold_kind(answer, kind) in ("value", "text", "none")
    assert compare_math(answer, answer) is Verdict.CORRECT
    there, back = compare_math(answer, gold), compare_math(gold, answer)
    assert there is back or Verdict.UNSCORABLE in (there, back) or not (normalize(answer) and normalize(gold))
    if "none" not in (gold_kind(answer, "math"), gold_kind(gold, "math")):
        assert compare_number(answer, gold) in (there, Verdict.UNSCORABLE)
    number = read_number(answer)
    assert number is None or len(str(number)) > 2_000 or read_number(str(number)) == number
    mark_up(answer), split_choice(answer), mentions(answer, gold)
