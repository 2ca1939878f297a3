"""The domain code_list: functions of one line, tests from what they return, and what is refused by name."""

from __future__ import annotations

import pytest
from test_coding import needs_sandbox

from soar.domains.code import read_tests, verify
from soar.domains.code_lines import CODE_LIST, read_answer, read_problem, spell
from soar.types import Problem, Verdict

pytestmark = needs_sandbox


def test_a_line_is_a_task_whose_tests_come_from_its_function() -> None:
    found = read_problem(" first(x): return x[0] # Return the first letter.")
    assert isinstance(found, tuple)
    question, answer = found
    assert (
        question
        == "Write a Python function first(x). Return the first letter.\nFor example, first('Blue river') returns 'B'."
    )
    assert len(read_tests(answer).checks) == 5  # the empty text has no first letter
    problem = Problem("", question, answer)
    assert verify(read_answer(" first(x): return x[:1]\nmore") or "", problem) is Verdict.CORRECT
    assert verify(read_answer(" first(x): return x[-1]") or "", problem) is Verdict.WRONG
    assert read_answer("\nnothing") is None


def test_the_kind_of_inputs_is_the_one_that_the_task_speaks_of() -> None:
    for task, call in (("Return half of the list", "[4, 7, 1]"), ("Return half of the text", "'Blue river'")):
        found = read_problem(f" half(x): return x[: len(x) // 2] # {task}.")
        assert isinstance(found, tuple) and f"half({call})" in found[0]
    found = read_problem(" more(x): return x + 1 # Return one more.")
    assert isinstance(found, tuple) and "assert more(7) == 8" in found[1]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "no_docstring"),
        (" f(x): return x + 1", "no_docstring"),
        (" f(x): return (x # Return the list.", "not_python"),
        (" f(x, y): return x # Return the list.", "no_function"),
        (" f(): return 1 # Return the list.", "no_function"),
        (" f(x): return x # Return the list.", "trivial_tests"),
        (" f(x): return 7 # Return the list.", "trivial_tests"),
        (" f(x): return f(x) # Return the list.", "wrong_solution"),
        (" f(x): return open('/etc/passwd').read() # Return the list.", "wrong_solution"),
        (" f(x): return [x] * 10**7 # Return the list.", "wrong_solution"),
        (" f(x): return float('nan') # Return the list.", "unsafe_tests"),
        (" f(x): return lambda: x # Return the list.", "wrong_solution"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(line: str, name: str) -> None:
    assert read_problem(line) == name


def test_a_value_is_spelled_alike_in_every_process() -> None:
    for value in (
        {"b", "a"},
        set(),
        frozenset({2, 1}),
        frozenset(),
        (1,),
        {"k": {"y", "x"}},
        [(), {}],
        1.5,
        b"a",
        None,
    ):
        assert eval(spell(value)) == value
    assert spell({"b", "a", "c"}) == "{'a', 'b', 'c'}"


def test_the_prompts_show_functions_that_can_be_used() -> None:
    for line in CODE_LIST.prompts.teacher_template.splitlines():
        assert isinstance(read_problem(line), tuple), line
