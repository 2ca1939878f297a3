"""Fuzzing of parser, extraction and comparison: 400 examples of 100 texts each, 40,000 cases.

benchmarks/fuzz.py runs the same checks on a million texts.
"""

from __future__ import annotations

import random

import pytest
from fuzzing import FRAGMENTS, check_answer, check_text, make_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TEXTS_PER_EXAMPLE = 100
EXAMPLES = 400


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), min_size=1, max_size=12),
)
def test_parser_extraction_and_comparison_survive_any_text(seed: int, fragments: list[str]) -> None:
    rng = random.Random(seed)
    for i in range(TEXTS_PER_EXAMPLE):
        pool = fragments if i % 2 else FRAGMENTS
        check_text(make_text(rng, pool), make_text(rng, pool, most=3))


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=60), st.text(max_size=30))
def test_any_unicode_text_can_be_compared(answer: str, gold: str) -> None:
    check_answer(answer, gold)


QUADRATIC = [
    "\\boxed{", "\\boxed", "<question>", "<", "Answer", "answer ", "Question 1 ", "\n* ", "\\text{", "\\frac{",
    "1 ", "1,", "$", "\\", "(", "{", "}", "^{", "<ans>", "<|im_end|>", "\u221a", "\u00b2", "..", " ", "\n",
]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", QUADRATIC)
def test_long_repetitions_take_linear_time(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    check_text(text, piece)
    check_text("Question" + text, "<" + piece)
    check_text("\\boxed{" + text + "}", "1")
    check_text("<question>" + text + "</question><answer>" + text + "</answer>", "1")
