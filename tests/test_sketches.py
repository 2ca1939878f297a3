"""The quick numerical reading: it calls answers different only when they are, whichever way they are written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soar.problems.sketches import read_sketches, surely_different
from soar.problems.verify import compare_math
from soar.types import Verdict

EQUAL = [
    (r"2\sqrt{3}", r"\sqrt{12}"), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{x}{2}", "x/2"), (r"\frac{1}{2}x", "x/2"), ("2x/3", r"\frac{2}{3}x"), ("3+4i", "4i+3"), ("i^2", "-1"),
    ("e", r"2.718281828459045"), (r"\pi/2", r"\frac{\pi}{2}"), ("x=3", "3"), ("y = 2x+1", "1+2x"), ("5 m", "5"),
    ("12 cm^2", "12"), (r"\{1, \sqrt{4}\}", r"\{2, 1\}"), (r"(-\infty, \sqrt{9})", r"(-\infty, 3)"), ("-x^2", "-(x^2)"),
    (r"\sqrt[3]{8}", "2"), ("2^{10}", "1024"), (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix} 1 \\2 \end{pmatrix}"),
    ("ab", "b a"), ("xy^2", "y^2x"), (r"4 \cdot x", "4x"), ("(x+1)(x-1)", "x^2-1"),
    (r"-\frac{\sqrt3}{2}", r"\frac{-\sqrt{3}}{2}"),
]  # fmt: skip
DIFFERENT = [
    (r"2\sqrt{3}", r"\sqrt{13}"), ("x^2+2x+1", "x^2+2x+2"), (r"\frac{\pi}{2}", "1.57"), ("3+4i", "4+3i"), ("5", "5x^2+1"),
    ("x=3", "x=4"), (r"(1, \sqrt{2})", r"(1, \sqrt{3})"), (r"(1, \sqrt{2})", "1"), (r"[3,\infty)", r"[4,\infty)"),
    (r"[3,\infty)", r"(-\infty,3]"), (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}2\\ 1\end{pmatrix}"),
    (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1 & 2\end{pmatrix}"), ("xy", "xz"), ("6 m", "5"),
]  # fmt: skip
HUGE = "9^{200}" + "*9^{200}" * 2
UNREAD = [
    "", "2 3", r"1\frac{1}{2}", "f(2)", "x(y+1)", "1/2x", "a/b/c", "sin x", "pi", "50%", "1/0", r"\frac{1}{x-x}", "x^23",
    "2^3^4", r"\pm 3", "x<3", "1,2", "(1,234)", "9^{9^{9^9}}", "(" * 50 + "1" + ")" * 50, "x" * 400, r"\text{Evelyn}",
    r"\sqrt{-1}", "(-8)^{1/3}", "5^{", "}", "2 or 3", "__import__('os')", r"\begin{pmatrix}1\\2&3\end{pmatrix}",
    "\u0664", "1_6", "0^{-1}", "(-1)^{" + "9" * 90 + "^9*" + "9" * 90 + "^9}", f"(-1)^{{{HUGE}*{HUGE}-{HUGE}*{HUGE}}}",
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_answers_are_never_called_different(one: str, other: str) -> None:
    assert not surely_different(one, other)
    assert not surely_different(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_are_told_apart(one: str, other: str) -> None:
    assert surely_different(one, other)
    assert compare_math(one, other) is Verdict.WRONG


@pytest.mark.parametrize("text", UNREAD)
def test_what_has_two_readings_or_none_is_left_to_the_symbolic_engine(text: str) -> None:
    assert read_sketches(text) == ()


def expressions(letters: str) -> st.SearchStrategy[tuple[str, str]]:
    """One expression in two spellings: infix with explicit signs, and LaTeX with fractions and groups swapped."""
    leaf = st.one_of(st.integers(1, 99).map(str), st.sampled_from([*letters])).map(lambda t: (t, t))

    def grow(part: st.SearchStrategy[tuple[str, str]]) -> st.SearchStrategy[tuple[str, str]]:
        two = st.tuples(part, part)
        return st.one_of(
            two.map(lambda p: (f"({p[0][0]}+{p[1][0]})", f"({p[1][1]}+{p[0][1]})")),
            two.map(lambda p: (f"({p[0][0]})*({p[1][0]})", rf"({p[1][1]})({p[0][1]})")),
            two.map(lambda p: (f"(({p[0][0]})/({p[1][0]}))", rf"(\frac{{{p[0][1]}}}{{{p[1][1]}}})")),
            part.map(lambda p: (f"({p[0]})^2", rf"({p[1]})({p[1]})")),
        )

    return st.recursive(leaf, grow, max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(expressions("abxyz"), st.integers(1, 9))
def test_spellings_of_one_expression_agree_and_a_shift_is_seen(pair: tuple[str, str], shift: int) -> None:
    one, other = pair
    assert not surely_different(one, other)
    if read_sketches(one) and abs(read_sketches(one)[0].values[0]) < 1e6:
        assert surely_different(f"{one}+{shift}", f"{other}+{shift + 1}")


def test_symbolic_checks_agree_with_the_quick_reading() -> None:
    from soar.problems.symbolic import check_symbolic

    assert [check_symbolic("math", one, other) for one, other in EQUAL[:7]] == [Verdict.CORRECT] * 7
    assert [check_symbolic("math", one, other) for one, other in DIFFERENT[:8]] == [Verdict.WRONG] * 8


PIECES = [
    *"0123456789xyie+-*/^(){}[],.= ", r"\frac", r"\sqrt", r"\pi", r"\cdot", r"\infty", "9" * 40, "{9^{99}}", r"\{", r"\}",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "&", "10^{300}", "(-1)", "^{-1}", "ab",
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.sampled_from(["42", "x^2", r"\pi", "(1,2)"]))
def test_any_arrangement_of_its_own_language_is_read_or_left(text: str, other: str) -> None:
    assert all(sketch.values for sketch in read_sketches(text))
    assert not surely_different(text, text)
    assert surely_different(text, other) == surely_different(other, text)
