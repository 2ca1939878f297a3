"""Hostile texts through parser, extraction and comparison; benchmarks/fuzz.py runs the same checks on a million of them."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import cases

from soar.loop.rollout import mentions
from soar.problems.answers import MAX_ANSWER_CHARS, extract, mark_up, normalize, split_choice
from soar.problems.domain import Domain, Grader
from soar.problems.prompts import FORMATS
from soar.problems.verify import compare_choice, compare_exact, compare_math, compare_number, gold_kind, read_number
from soar.types import Problem, Reason, Rejection, Verdict

FRAGMENTS = [text for (text,) in cases("fuzz", "fragment")]


def make_text(rng: random.Random, fragments: Sequence[str] = FRAGMENTS, most: int = 14) -> str:
    """Fragments in a random order, sometimes with a character changed, dropped or repeated many times."""
    text = "".join(rng.choice(fragments) for _ in range(rng.randint(0, most)))
    if text and rng.random() < 0.2:
        place = rng.randrange(len(text))
        other = rng.choice(["", chr(rng.randrange(0x20, 0x300)), text[place] * rng.randint(2, 400)])
        text = text[:place] + other + text[place + 1 :]
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
            assert outcome.question and outcome.answer and outcome.question in text and outcome.answer in text
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


def test_parser_extraction_and_comparison_survive_any_text():
    rng = random.Random(0)
    for _ in range(700):
        check_text(make_text(rng), make_text(rng, most=3))


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=60), st.text(max_size=30))
def test_any_unicode_text_can_be_compared(answer, gold):
    check_answer(answer, gold)


@pytest.mark.timeout(15)
@pytest.mark.parametrize("piece", [text for (text,) in cases("fuzz", "repeated")])
def test_long_repetitions_take_linear_time(piece):
    text = piece * (50_000 // len(piece))
    check_text(text, piece)
    check_text("Question" + text, "<" + piece)
    check_text("\\boxed{" + text + "}", "1")
    check_text("<question>" + text + "</question><answer>" + text + "</answer>", "1")
