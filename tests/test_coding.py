"""The domain `code`: reading tests and programs, naming bad tasks, grading in workers."""

from __future__ import annotations

from typing import Any

import pytest

from soar.domains import code as coding
from soar.domains.assertions import MAX_CHARS, MAX_TESTS, Unusable, flaw, read_tests
from soar.domains.code import CODE, read_answer, read_problem, verify
from soar.problems.domain import load_domain
from soar.problems.pool import VerifierError, VerifierPool
from soar.sandbox import run as sandbox
from soar.sandbox.run import End, Outcome, SandboxError
from soar.types import Problem, Verdict

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


def answers(*values: Any) -> Outcome:
    return Outcome(End.DONE, dict(enumerate(values)))


@pytest.mark.parametrize(
    ("test", "right", "wrong"),
    [
        ("assert f(2) == 4", 4, 5),
        ("assert 4 == f(2)", 4, "4"),
        ("assert f(2) is True", True, 1),
        ("assert f(2) is None", None, 0),
        ("assert f(2)", "x", ""),
        ("assert not f(2)", [], [0]),
        ("assert f(2) == 0.3", 0.30000000000000004, 0.31),
        ("assert f(2) == [1.0, 'a']", [1, "a"], [1.1, "a"]),
        ("assert abs(f(2) - 1.5) < 0.01", 1.505, 1.6),
        ("assert abs(f(2) - 1000) < 0.01", 1000.005, 1009),
        ("assert math.isclose(f(2), 1.5, rel_tol=0.1)", 1.4, 1.2),
        ("assert sorted(f(2)) == [1, 2]", {"set": [2, 1]}, [1, 1]),
        ("assert len(f('ab')) == 3", "abc", "ab"),
        ("assert round(f(2), 2) == 1.23", 1.2345, 1.24),
        ("assert f(2) == {'a': [1]}", {"dict": [["a", [1]]]}, {"dict": [["a", [2]]]}),
        ("assert f(2) == set()", {"set": []}, {"dict": []}),
        ("assert f(2) == float('inf')", float("inf"), 1e300),
        ("assert f(2) == 10**9 + 7", 1_000_000_007, 1e9),
        ("assert f(2) == 'é' * 3", "ééé", "é"),
        ("assert len(sorted(f(2))) == 2", [1, 1], [1]),
        ("assert f([1] * 3, key={'a': (1,)}) == -1", -1, 1),
        ('```python\n"""Tests."""\nimport math\nassert f(2) == 4  # four\n```', 4, None),
        ('["assert f(2) == 4"]', 4, 3),
    ],
)
def test_asserts_are_taken_apart(test: str, right: Any, wrong: Any) -> None:
    tests = read_tests(test)
    assert (tests.entry, len(tests.checks)) == ("f", 1)
    assert tests.verdict(answers(right)) is Verdict.CORRECT
    assert tests.verdict(answers(wrong)) is Verdict.WRONG


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "no_tests"), ("assert f(1) ==", "unreadable_tests"), ('{"inputs": ["1"]}', "unreadable_tests"),
        ("Input: 1\nInput: 2\nOutput: 3", "unreadable_tests"),
        *[(text, "unsafe_tests") for text in (
            "assert True", "assert f(g(1)) == 2", "assert f(1) == 1\nassert g(1) == 2", "assert f(1) != 2",
            "assert f(1) == __import__('os').system('true')", "import os\nos.system('true')", "assert f(1) == 1 / 0",
            "for i in range(3):\n    assert f(i) == i", "assert f(1) == 9**9**9", "assert f(1) == [0] * 10**9",
            "assert f(1) == [[[0] * 1000] * 1000] * 1000", "assert f(**{'a': 1}) == 1", "assert f(1) == {[]: 1}",
            "assert round(f(1), -(10**9)) == 0", "assert f(1) == float('nan')", "assert f(0x" + "f" * 9000 + ") == 1",
            "assert abs() < 1", "assert f(1) == " + "[" * 90 + "]" * 90,
        )],
        *[("assert f(1) == " + text, "unreadable_tests") for text in (
            "[" * 900 + "]" * 900, "-" * 9000 + "1", "9" * 9000, "'\0'",
        )],
        ("\n".join(f"assert f({i}) == {i + 1}" for i in range(MAX_TESTS + 1)), "too_many_tests"),
        ("x" * (MAX_CHARS + 1), "too_many_tests"),
    ],
)  # fmt: skip
def test_tests_that_cannot_be_used_are_named(text: str, name: str) -> None:
    with pytest.raises(Unusable) as caught:
        read_tests(text)
    assert caught.value.name == name


def test_hostile_values_are_wrong_and_nothing_else() -> None:
    tests = read_tests("assert sorted(f(1)) == [1]")
    deep: Any = 0
    for _ in range(100):
        deep = [deep]
    values = (deep, {"dict": [[[], 1]]}, {"complex": [10**400, 0]}, {"set": [[1]]}, {"bytes": "zz"}, {"unheard": 1}, {})
    ends = [Outcome(End.DONE, {0: [1]}, {-1: "error"}), Outcome(End.DONE, {0: [1], 1: [1]}), Outcome(End.DONE)]
    for outcome in (*map(answers, (*values, {"tuple": 3}, [1, "a"])), *ends):
        assert tests.verdict(outcome) is Verdict.WRONG
    assert tests.verdict(Outcome(End.TIMEOUT, {0: [1]})) is Verdict.TIMEOUT
    assert tests.verdict(Outcome(End.FLOOD, {0: [1]})) is Verdict.CRASHED


@pytest.mark.parametrize(
    ("tests", "name"),
    [
        *[(text, "trivial_tests") for text in (
            "assert f(1) == 2", "assert f(1) == 2\nassert f(2) == 2", "assert f(1) is None\nassert not f(2)",
            "assert f(1) == 1\nassert f([2]) == [2]", "assert f(0, 1) == 1\nassert f(0, b=2) == 2",
            "assert len(f('ab')) == 2\nassert len(f('abc')) == 3", "Input: 1\nOutput: 1\nInput: 2\nOutput: 2",
        )],
        ("assert f(1) == 2\nassert f(2) == 3\nassert f(1) == 4", "contradicting_tests"),
        ("Input: 1\nOutput: 5\nInput: 1\nOutput: 6", "contradicting_tests"),
        ("assert f(1) == 2\nassert f(2) == 3", None), ("Input: 1\nOutput: 2\nInput: 2\nOutput: 3", None),
    ],
)  # fmt: skip
def test_tests_that_say_too_little_are_named(tests: str, name: str | None) -> None:
    assert flaw(read_tests(tests)) == name


@needs_sandbox
def test_a_teacher_text_is_a_task_with_tests() -> None:
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
        (ADD, " ", "no_code"), (ADD, "a story about numbers", "not_python"), ("assert ", "# ", "no_tests"),
        ('    """Return the sum of a and b."""\n', "", "no_docstring"), ("assert add", "assert plus", "no_function"),
        ("Return the sum of a and b.", coding.PLACEHOLDER, "placeholder"), ("return a + b", "return a - b", "wrong_solution"),
        (ADD_TESTS.split("\n")[0], "assert sum([1, 2]) == 3", "unsafe_tests"),
        ("assert add(1, 2) == 3\n", "", "trivial_tests"), ("add(-1, 1) == 0", "add(1, 2) == 0", "contradicting_tests"),
        ("return a + b", "import sys; sys.exit(0)", "wrong_solution"),
        ("add(-1, 1) == 0", "add(-1, 1) == eval('0')", "unsafe_tests"),
    ],
)  # fmt: skip
def test_a_bad_teacher_text_is_named(change: str, to: str, name: str) -> None:
    text = ADD.replace(change, to).replace(', "zero"', "")
    assert read_problem(text) == name


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("Text\n```python\ndef f(x):\n    return x\n```\nMore\n```\nf(1)\n```", "def f(x):\n    return x\n"),
        ("```\nprint(1)\n```\n```py\nprint(2)\n```", "print(2)\n"),
        ("```python\ndef f(x):\n    return x", "def f(x):\n    return x"),
        ("Sure.\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),
        ("import math\nprint(math.pi)", "import math\nprint(math.pi)"),
        ("The answer is 4.", None), ("", None), ("```python\n```", None),
    ],
)  # fmt: skip
def test_the_program_is_taken_out_of_a_completion(completion: str, code: str | None) -> None:
    assert read_answer(completion) == code


def test_a_sandbox_that_breaks_ends_the_run_and_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: sandbox.Sandbox, jobs: Any) -> list[Outcome]:
        raise SandboxError("the sandbox broke")

    monkeypatch.setattr(sandbox.Sandbox, "run", broken)
    assert verify("def f(x) return", Problem("", "", "assert f(1) == 2\nassert f(2) == 3")) is Verdict.WRONG  # not run
    assert verify("def f(x):\n    return x", Problem("", "", "no tests")) is Verdict.UNSCORABLE
    with pytest.raises(VerifierError, match="the sandbox broke"):
        verify("def f(x):\n    return 7\n", Problem("", "", "assert f(1) == 7\nassert f(2) == 8"))


@needs_sandbox
def test_the_pool_grades_in_killable_workers() -> None:
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
