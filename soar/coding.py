"""The domain `code`: a student writes a Python function or program, and is right when it passes all tests.

A problem is a task and its tests (`assertions.py`): asserts on calls of one function, or inputs with outputs. The teacher
writes one Python code block: a function with a docstring (the task), a body (its own solution), and asserts (the tests).
That is what a language model has seen most of, and it can be checked: its own solution must pass the tests, the tests
must not contradict each other, and no trivial program may pass them. Programs run in the sandbox (`sandbox.py`) and
nowhere else; the tests are never run at all.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import OrderedDict
from functools import lru_cache
from typing import Any

from soar.assertions import Tests, Unusable, from_statements, parse_source, read_tests
from soar.domains import Domain
from soar.prompts import PromptFormat
from soar.sandbox import Limits, Outcome, Sandbox, SandboxError, find_backend
from soar.types import Problem, Verdict
from soar.workers import VerifierError

MAX_CODE_CHARS = 20_000
CACHE_SIZE = 20_000
LIMITS = Limits(cpu_s=2, wall_s=3.5)  # less than problems.verify_timeout_s, so that the worker outlives the program
PLACEHOLDER = "What the function returns."
PREFILL = "```python\ndef "
FENCED = re.compile(
    r"^[ \t]{0,8}```[ \t]{0,8}(?:python3?|py)?[ \t]{0,8}\n(.*?)(?:^[ \t]{0,8}```|\Z)", re.I | re.M | re.S
)

TEACHER = f'''Write one new, original Python exercise about {{subject}}: a function with a docstring that says exactly what it
returns, the code of the function, and four asserts that test it with different values. One code block, in this form:

```python
def name(values):
    """{PLACEHOLDER}"""
    return ...

assert name(...) == ...
assert name(...) == ...
assert name(...) == ...
assert name(...) == ...
```'''

STUDENT = """{question}

Answer with one ```python code block that holds the whole code."""

SUBJECTS = "lists of numbers, strings, dictionaries, arithmetic, sorting, searching, or counting"


class _Machine:
    """The sandbox of this process, and the verdicts it has given: sha256 of code and tests -> verdict."""

    def __init__(self) -> None:
        self.sandbox: Sandbox | None = None
        self.verdicts: OrderedDict[bytes, Verdict] = OrderedDict()


_machine = _Machine()


def prepare() -> None:
    """Find a sandbox. Raises SandboxError, which says what to install, where there is none."""
    sandbox = Sandbox(LIMITS, workers=1)
    sandbox.run([Tests(()).job("")])
    _machine.sandbox = sandbox


def describe() -> str:
    """Which sandbox is used. Raises SandboxError."""
    return f"programs run in the sandbox {find_backend()!r}"


def run(code: str, tests: Tests) -> Outcome:
    """What the sandbox gives for a program and the calls of its tests. Raises VerifierError when it stopped working."""
    try:
        if _machine.sandbox is None:
            prepare()
        assert _machine.sandbox is not None
        return _machine.sandbox.run([tests.job(code)])[0]
    except SandboxError as error:
        raise VerifierError(str(error)) from error


def grade(code: str, tests: Tests, text: str) -> Verdict:
    """Whether a program passes all tests. text: what the tests were read from. Equal questions are asked once.

    Raises VerifierError when the sandbox stopped working, so that a run ends rather than counts that as a wrong answer.
    """
    if len(code) > MAX_CODE_CHARS:
        return Verdict.WRONG
    try:
        parse_source(code)
    except SyntaxError:
        return Verdict.WRONG
    key = hashlib.sha256(f"{len(code)}:{code}{text}".encode("utf-8", "surrogatepass")).digest()
    if key in _machine.verdicts:
        return _machine.verdicts[key]
    verdict = tests.verdict(run(code, tests))
    _machine.verdicts[key] = verdict
    if len(_machine.verdicts) > CACHE_SIZE:
        _machine.verdicts.popitem(last=False)
    return verdict


# ---- reading ----


def blocks(text: str) -> list[str]:
    """Contents of the fenced code blocks in a text; the last one may lack its end."""
    return [match[1] for match in FENCED.finditer(text)]


def read_answer(completion: str) -> str | None:
    """The student's program: the last code block that defines a function, else the last one.

    Code before the first fence counts as a block, from the first line that begins like Python. None: there is no code.
    """
    start = re.search(r"^(?:def |import |from \w+ import |class |print\(|@)", completion, re.M)
    before = completion.split("```", 1)[0]  # code without an opening fence
    found = [before[start.start() :].rstrip("\n")] if start and start.start() < len(before) else []
    found += [block for block in blocks(completion) if block.strip()]
    if not found:
        return None
    return next((block for block in reversed(found) if re.search(r"^[ \t]*def ", block, re.M)), found[-1])


def read_problem(text: str) -> tuple[str, str] | str:
    """Task and tests of a teacher text, or the name of what is wrong with it.

    The names: `no_code`, `not_python`, `no_function`, `no_docstring`, `placeholder`, `wrong_solution` (its own solution
    fails its tests), and those of `flaw`.
    """
    module = _first_module(text)
    if isinstance(module, str):
        return module
    asserts = [node for node in module.body if isinstance(node, ast.Assert)]
    try:
        tests = from_statements(list(asserts))
    except Unusable as error:
        return error.name
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    if not functions:
        return "no_function"
    if not tests.checks:
        return "no_tests"
    if tests.entry not in functions:
        return "no_function"
    function = functions[tests.entry]
    task = (ast.get_docstring(function) or "").strip()
    if not task:
        return "no_docstring"
    if task == PLACEHOLDER:
        return "placeholder"
    answer = "\n".join(ast.unparse(ast.Assert(node.test, None)) for node in asserts)
    try:
        tests = read_tests(answer)
    except Unusable as error:
        return error.name
    name = flaw(tests)
    if name is None and _has_body(function):
        solution = ast.unparse(ast.Module([node for node in module.body if _is_definition(node)], []))
        name = None if grade(solution, tests, answer).solved else "wrong_solution"
    return name or (f"Write a Python function:\n\n{signature(function)}\n\n{task}", answer)


def _first_module(text: str) -> ast.Module | str:
    """The syntax tree of the first code block that has one (of 20); it may begin with the prefill of the prompt."""
    sources = blocks(text) if "```python" in text[:40] else [text.split("\n```")[0], *blocks(text)]
    if not any(source.strip() for source in sources):
        return "no_code"
    for source in sources[:20]:
        for candidate in (source, "def " + source.lstrip()):
            lines = candidate.split("\n")
            last = max((i for i, line in enumerate(lines) if line.startswith("assert ")), default=len(lines))
            try:
                module = parse_source("\n".join(lines[: last + 1])[:MAX_CODE_CHARS])
            except SyntaxError:
                continue
            if any(isinstance(node, ast.FunctionDef) for node in module.body):
                return module
    return "not_python"


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign))


def _has_body(function: ast.FunctionDef) -> bool:
    """Whether there is more than a docstring, `pass`, `...` or an exception."""
    idle = (ast.Pass, ast.Raise)
    return any(
        not isinstance(node, idle) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in function.body
    )


def signature(function: ast.FunctionDef) -> str:
    """`def name(arguments) -> type:` on one line."""
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"def {function.name}({ast.unparse(function.args)}){returns}:"


# ---- tests that say too little ----


def flaw(tests: Tests) -> str | None:
    """What makes tests useless: `contradicting_tests` or `trivial_tests`. None: neither.

    Contradicting: equal calls with other results. Trivial: a program passes them that returns (or prints) one and the
    same value, None among them, or its first, second ... argument (or its input). What such a program gives is known
    without running it.
    """
    known: dict[tuple[str, ...], Any] = {}
    for check in tests.checks:
        place = (check.call, check.wrapper, repr(check.rest), check.how)
        if place in known and known[place] != check.expected:
            return "contradicting_tests"
        known[place] = check.expected
    constants = [None, True, False, 0, 1, "", [], *(check.expected for check in tests.checks)]
    if any(all(check.passed(value) for check in tests.checks) for value in constants):
        return "trivial_tests"
    if not tests.entry:
        return "trivial_tests" if all(check.passed(check.call.strip()) for check in tests.checks) else None
    for place_of in range(min(len(check.arguments) for check in tests.checks)):
        if all(check.passed(check.arguments[place_of]) for check in tests.checks):
            return "trivial_tests"
    return None


@lru_cache(maxsize=4096)
def _tests(text: str) -> Tests | Unusable:
    try:
        return read_tests(text)
    except Unusable as error:
        return error


def verify(answer: str, problem: Problem) -> Verdict:
    """Whether the program in `answer` passes the tests that are the gold answer. UNSCORABLE for unusable tests."""
    tests = _tests(problem.answer)
    return Verdict.UNSCORABLE if isinstance(tests, Unusable) else grade(answer, tests, problem.answer)


def validate(problem: Problem) -> str | None:
    """What is wrong with a problem's tests, by name. A column `solution` of a problem file must pass them."""
    tests = _tests(problem.answer)
    if isinstance(tests, Unusable):
        return tests.name
    name = flaw(tests)
    solution = problem.extra.get("solution")
    if name is None and isinstance(solution, str) and not grade(solution, tests, problem.answer).solved:
        name = "wrong_solution"
    return name


CODE = Domain(
    name="code",
    prompts=PromptFormat(
        name="code",
        answer_style="marker",
        teacher_template=TEACHER,
        student_template=STUDENT,
        default_subject=SUBJECTS,
        teacher_prefill=PREFILL,
        placeholders=(PLACEHOLDER,),
        text_answers=True,
    ),
    read_problem=read_problem,
    read_answer=read_answer,
    verify=verify,
    validate=validate,
    prepare=prepare,
    describe=describe,
    gold_is_answer=False,
    max_answer_chars=MAX_CODE_CHARS,
    examples=(
        Problem(
            "code-1",
            "Write a Python function:\n\ndef double_odd(values):\n\nReturn the odd numbers of the list, each doubled.",
            "assert double_odd([1, 2, 3]) == [2, 6]\nassert double_odd([]) == []\nassert double_odd([4, 5]) == [10]",
        ),
        Problem(
            "code-2",
            "Read two whole numbers from one line, and print their product.",
            "Input:\n2 3\nOutput:\n6\n\nInput:\n-4 5\nOutput:\n-20",
        ),
    ),
)
