"""The domain `code`: reading tests and programs, naming bad tasks, grading in workers."""

from typing import Any
from unittest.mock import Mock

import pytest
from tables import cases

from soar.domains import code as coding
from soar.domains.code import CODE, MAX_CHARS, MAX_TESTS, Unusable, flaw, grade, read_answer, read_problem, read_tests
from soar.problems.domain import load_domain
from soar.problems.pool import VerifierError, VerifierPool
from soar.sandbox import run as sandbox
from soar.sandbox.run import End, Outcome, SandboxError
from soar.types import Verdict

try:
    sandbox.find_backend()
    NO_SANDBOX = ""
except SandboxError as error:
    NO_SANDBOX = str(error)
needs_sandbox = pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX)

ADD = '''add(a, b):
    """Return the sum of a and b."""
    return a + b

assert add(1, 2) == 3
assert add(0, 0) == 0, "zero"
# a comment
assert add(-1, 1) == 0
```
Text after the block.'''
ADD_TASK = "Write a Python function:\n\ndef add(a, b):\n\nReturn the sum of a and b."
ADD_TESTS = "assert add(1, 2) == 3\nassert add(0, 0) == 0\nassert add(-1, 1) == 0"


DEEP = ("[" * 900 + "]" * 900, "-" * 9000 + "1", "9" * 9000)


def answers(*values: Any) -> Outcome:
    return Outcome(End.DONE, dict(enumerate(values)))


@pytest.mark.parametrize(("test", "right", "wrong"), cases("coding", "assert"))
def test_asserts_are_taken_apart(test, right, wrong):
    tests = read_tests(test)
    assert (tests.entry, len(tests.checks)) == ("f", 1)
    assert tests.verdict(answers(right)) is Verdict.CORRECT
    assert tests.verdict(answers(wrong)) is Verdict.WRONG


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *cases("coding", "unusable"),
        ("assert f(0x" + "f" * 9000 + ") == 1", "unsafe_tests"),
        *((f"assert f(1) == {text}", "unreadable_tests") for text in DEEP),
        ("\n".join(f"assert f({i}) == {i + 1}" for i in range(MAX_TESTS + 1)), "too_many_tests"),
        ("x" * (MAX_CHARS + 1), "too_many_tests"),
    ],
)
def test_tests_that_cannot_be_used_are_named(text, name):
    with pytest.raises(Unusable, match=name):
        read_tests(text)


def test_hostile_values_are_wrong_and_nothing_else():
    tests = read_tests("assert sorted(f(1)) == [1]")
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    values: tuple[Any, ...] = (deep, {"dict": [[[], 1]]}, {"set": [[1]]}, {"unheard": 1}, {})
    ends = [Outcome(End.DONE, {0: [1], 1: [1]}), Outcome(End.DONE)]
    for outcome in (*map(answers, (*values, {"tuple": 3}, [1, "a"])), *ends):
        assert tests.verdict(outcome) is Verdict.WRONG
    assert tests.verdict(Outcome(End.TIMEOUT, {0: [1]})) is Verdict.TIMEOUT
    assert tests.verdict(Outcome(End.KILLED, {0: [1]})) is Verdict.CRASHED


@pytest.mark.parametrize(("tests", "name"), cases("coding", "flaw"))
def test_tests_that_say_too_little_are_named(tests, name):
    assert flaw(read_tests(tests)) == name


@needs_sandbox
def test_a_teacher_text_is_a_task_with_tests():
    wanted = (ADD_TASK, ADD_TESTS)
    texts = [ADD, "```python\ndef " + ADD, "Here it is:\n```python\ndef " + ADD, ADD.split("```")[0]]
    texts.append(ADD.replace("    return a + b\n", "    ...\n"))  # no solution of its own
    assert [read_problem(text) for text in texts] == [wanted] * len(texts)
    typed = read_problem(ADD.replace("add(a, b):", "add(a: int, b: int = 2) -> int:"))
    assert typed[0].split("\n")[2] == "def add(a: int, b: int=2) -> int:"


@needs_sandbox
@pytest.mark.parametrize(
    ("change", "to", "name"),
    [
        *cases("coding", "teacher"),
        (ADD, " ", "no_code"),
        (ADD, "a story about numbers", "not_python"),
        ("Return the sum of a and b.", coding.PLACEHOLDER, "placeholder"),
        (ADD_TESTS.split("\n")[0], "assert sum([1, 2]) == 3", "unsafe_tests"),
    ],
)
def test_a_bad_teacher_text_is_named(change, to, name):
    text = ADD.replace(change, to).replace(', "zero"', "")
    assert read_problem(text) == name


@pytest.mark.parametrize(("completion", "code"), cases("coding", "program"))
def test_the_program_is_taken_out_of_a_completion(completion, code):
    assert read_answer(completion) == code


def test_a_sandbox_that_breaks_ends_the_run_and_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox.Sandbox, "run", Mock(side_effect=SandboxError("the sandbox broke")))
    assert grade("def f(x) return", "assert f(1) == 2\nassert f(2) == 3") is Verdict.WRONG  # not run
    assert grade("def f(x):\n    return x", "no tests") is Verdict.UNSCORABLE
    with pytest.raises(VerifierError, match="the sandbox broke"):
        grade("def f(x):\n    return 7\n", "assert f(1) == 7\nassert f(2) == 8")


@needs_sandbox
def test_the_pool_grades_in_killable_workers():
    golds = [problem.answer for problem in CODE.examples]
    columns = {"question": [problem.question for problem in CODE.examples]}
    right = [
        "```python\ndef double_odd(values):\n    return [2 * v for v in values if v % 2]\n```",
        "```python\na, b = map(int, input().split())\nprint(a * b)\n```",
    ]
    with VerifierPool(load_domain("code"), workers=1, timeout_s=20) as pool:
        assert pool.check_golds(golds, columns) == [Verdict.CORRECT] * 2
        assert pool.check(right, golds, columns) == [Verdict.CORRECT] * 2
        assert pool.check(["I do not know", right[0]], golds, columns) == [Verdict.NO_ANSWER, Verdict.WRONG]
        loop = "```python\ndef double_odd(values):\n    while True:\n        pass\n```"
        assert pool.check([loop], golds[:1], {"question": [""]}) == [Verdict.TIMEOUT]
        found = pool.read_problems([ADD, "nothing"], [False, False])
        assert (found[0].question, found[0].answer) == (ADD_TASK, ADD_TESTS)  # type: ignore[union-attr]
        assert found[1].name == "not_python"  # type: ignore[union-attr]
