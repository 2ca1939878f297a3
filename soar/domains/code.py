"""The domain `code` (docs/code.md): a student writes a Python function or program, and is right when it passes all tests.

Tests are read and never run. Calls and inputs go into the sandbox, where programs run and nowhere else; expected values stay
here, so that no program can see them, patch the comparison, or pass by ending early.
"""

import ast
import json
import math
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

from soar.problems.answers import PATTERNS
from soar.problems.domain import styled
from soar.problems.prompts import PromptFormat
from soar.problems.verify import VerifierError
from soar.sandbox.run import End, Job, Limits, Outcome, Sandbox, SandboxError
from soar.types import Problem, Verdict

MAX_CODE_CHARS = 20_000  # of a program, and of the text of all tests
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
MAX_TESTS = 64
MAX_PLACES = 30  # that a value is rounded to: round(7, -10**9) would compute 10**10**9
Wrapped = tuple[tuple[str, tuple[Any, ...]], ...]
WRAPPERS: dict[str, Callable[..., Any]] = {f.__name__: f for f in (abs, bool, len, list, round, set, sorted, tuple)}
WRAPPERS["is"] = operator.is_  # no name that a test can write
TRUTH: Wrapped = (("bool", ()),)


class Unusable(Exception):
    """Tests that cannot be used; its text is one of no_tests, too_many_tests, unreadable_tests, unsafe_tests."""


class Check(NamedTuple):
    """One test of a program."""

    call: str  # source of `(args, kwargs)`
    expected: Any
    arguments: tuple[Any, ...] = ()  # values of the call's arguments
    read: Wrapped = ()  # functions of WRAPPERS, with further arguments, applied to the value before it is compared

    def passed(self, value: Any) -> bool:
        """Whether a value is the expected one."""
        with suppress(TypeError, ValueError, ArithmeticError, RecursionError):
            for name, rest in self.read:
                value = WRAPPERS[name](value, *rest)
            return _equal(value, self.expected)
        return False


class Tests(NamedTuple):
    """All tests of one task. entry: the function that they call; "" for input and output."""

    checks: tuple[Check, ...]
    entry: str = ""

    def job(self, source: str) -> Job:
        """What the sandbox must run for a program."""
        return Job(source, self.entry, f"[{', '.join(check.call for check in self.checks)}]")

    def verdict(self, outcome: Outcome) -> Verdict:
        """CORRECT when every test was answered with its expected value."""
        if outcome.end is not End.DONE:
            return Verdict.TIMEOUT if outcome.end is End.TIMEOUT else Verdict.CRASHED
        with suppress(ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            values = [decode(outcome.answers[index]) for index in range(len(self.checks))]
            values = values if self.entry else list(map(tidy, values))
            if 0 < len(values) == len(outcome.answers) and all(map(Check.passed, self.checks, values)):
                return Verdict.CORRECT
        return Verdict.WRONG


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return value == expected or math.isclose(value, expected, rel_tol=1e-6, abs_tol=1e-6)
    if type(value) is not type(expected) or not isinstance(value, (list, tuple, dict)):
        return bool(value == expected)
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(_equal(value[key], expected[key]) for key in expected)
    return len(value) == len(expected) and all(_equal(a, b) for a, b in zip(value, expected, strict=True))


def decode(data: Any) -> Any:
    """The value that `jail.encode` wrote as JSON. Raises ValueError, TypeError or KeyError for anything else."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item) for item in data]
    ((name, content),) = data.items()
    if name in ("bytes", "complex"):
        return bytes.fromhex(content) if name == "bytes" else complex(*content)
    if name == "dict":
        return {decode(key): decode(value) for key, value in content}
    made = {"tuple": tuple, "set": set, "frozenset": frozenset}[name]
    return made(decode(item) for item in content)


def tidy(text: Any) -> str:
    """Printed text as it is compared: without white space at the ends of lines and of the whole."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def read_tests(text: str) -> Tests:
    """The tests in a text. Raises Unusable."""
    if len(text) > MAX_CODE_CHARS:
        raise Unusable("too_many_tests")
    plain = PATTERNS["fence"].sub("", text).strip()
    blocks = PATTERNS["test_block"].match(plain)
    read = _read_json if plain.startswith(("[", "{")) else _read_blocks if blocks else read_asserts
    tests = read(plain)
    if not 0 < len(tests.checks) <= MAX_TESTS:
        raise Unusable("too_many_tests" if tests.checks else "no_tests")
    return tests


def _printed(pairs: Iterable[Iterable[str]]) -> Tests:
    """Tests from standard inputs and what must be printed."""
    return Tests(tuple(Check(f"(({given!r},), {{}})", tidy(wanted), (tidy(given),)) for given, wanted in pairs))


def _read_json(text: str) -> Tests:
    try:
        data = json.loads(text)
        if isinstance(data, list):
            return read_asserts("\n".join(data))
        pairs = zip(data["inputs"], data["outputs"], strict=True)
        return _printed([x if isinstance(x, str) else "\n".join(map(str, x)) for x in pair] for pair in pairs)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Unusable("unreadable_tests") from error


def _read_blocks(text: str) -> Tests:
    names, fields = (PATTERNS["test_block"].split(text)[first::2] for first in (1, 2))
    if [name.lower() for name in names] != ["input", "output"] * (len(names) // 2):
        raise Unusable("unreadable_tests")
    return _printed((given.strip("\n") + "\n", wanted) for given, wanted in zip(fields[::2], fields[1::2], strict=True))


def parse_source(text: str) -> ast.Module:
    """The syntax tree of Python text. Raises SyntaxError for whatever Python cannot read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise SyntaxError(str(error)) from error


def read_asserts(text: str) -> Tests:
    """Tests from asserts on calls of one function; imports, comments and texts between them are left out."""
    try:
        body = parse_source(text).body
    except SyntaxError as error:
        raise Unusable("unreadable_tests") from error
    checks: list[tuple[str, Check]] = []
    for statement in body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if is_text or isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if not isinstance(statement, ast.Assert):
            raise Unusable("unsafe_tests")
        test = statement.test
        parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
        checks += map(_read_assert, parts)
    entries = {entry for entry, _ in checks}
    if len(entries) > 1:
        raise Unusable("unsafe_tests")
    return Tests(tuple(check for _, check in checks), "".join(entries))


def _read_assert(node: ast.expr) -> tuple[str, Check]:
    """Function name and check of one assertion; the call may stand on either side. Raises Unusable."""
    try:
        match node:
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                try:
                    return _check(left, ast.literal_eval(right))
                except ValueError:
                    return _check(right, ast.literal_eval(left))
            case ast.Compare(left=call, ops=[ast.Is()], comparators=[ast.Constant(value=None | True | False as value)]):
                return _check(call, True, (("is", (value,)),))
            case ast.UnaryOp(op=ast.Not(), operand=call):
                return _check(call, False, TRUTH)
        return _check(node, True, TRUTH)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise Unusable("unsafe_tests") from error


def _check(node: ast.expr, expected: Any, read: Wrapped = ()) -> tuple[str, Check]:
    """The check of a call, or of a call inside of some of WRAPPERS."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("expected a call of the function with literal arguments, and == between it and a value")
    inner = node.args[0] if node.args and not node.keywords else None
    if node.func.id in WRAPPERS and isinstance(inner, ast.Call):
        rest = tuple(ast.literal_eval(argument) for argument in node.args[1:])
        if any(isinstance(value, int) and abs(value) > MAX_PLACES for value in rest):
            raise ValueError(f"more than {MAX_PLACES} places of rounding")
        return _check(inner, expected, ((node.func.id, rest), *read))
    if any(word.arg is None for word in node.keywords):
        raise ValueError("** in a call")
    arguments = tuple(ast.literal_eval(argument) for argument in (*node.args, *(word.value for word in node.keywords)))
    pairs = ", ".join(f"{word.arg!r}: {ast.unparse(word.value)}" for word in node.keywords)
    source = f"({ast.unparse(ast.Tuple(node.args, ast.Load()))}, {{{pairs}}})"
    return node.func.id, Check(source, expected, arguments, read=read)


def flaw(tests: Tests) -> str | None:
    """What makes tests useless, None for useful ones. `contradicting_tests`: equal calls, other results. `trivial_tests`: a
    program passes them that gives one and the same value, or one of its arguments, or its input.
    """
    expected: dict[tuple[str, str], Any] = {}
    for check in tests.checks:
        if expected.setdefault((check.call, repr(check.read)), check.expected) != check.expected:
            return "contradicting_tests"
    constants = [None, True, False, 0, 1, "", [], *(check.expected for check in tests.checks)]
    programs = [[value] * len(tests.checks) for value in constants]  # what each gives is known without running it
    programs += map(list, zip(*(check.arguments for check in tests.checks), strict=False))
    trivial = any(all(map(Check.passed, tests.checks, values)) for values in programs)
    return "trivial_tests" if trivial else None


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    """The sandbox of this process. Raises SandboxError, which says what to install, where there is none."""
    sandbox = Sandbox()
    sandbox.run(Job(""))
    return sandbox


@lru_cache(maxsize=4_000)  # programs and tests are some kilobytes each
def grade(code: str, text: str) -> Verdict:
    """Whether a program passes the tests that `text` holds; UNSCORABLE for unusable tests. Equal questions are asked once.

    Raises VerifierError when the sandbox stopped working: a run ends rather than counting that as a wrong answer.
    """
    try:
        tests = read_tests(text)
        if len(code) > MAX_CODE_CHARS:
            return Verdict.WRONG
        parse_source(code)  # a process for what is no Python would take seventy times as long
        return tests.verdict(_sandbox().run(tests.job(code)))
    except Unusable:
        return Verdict.UNSCORABLE
    except SyntaxError:
        return Verdict.WRONG
    except SandboxError as error:
        raise VerifierError(str(error)) from error


def read_answer(completion: str) -> str | None:
    """The student's program: the last code block that defines a function, else the last one; None where there is no code."""
    before = completion.split("```", 1)[0]  # code without an opening fence, from the first line that begins like Python
    start = re.search(r"^(?:def |import |from \w+ import |class |print\(|@)", before, re.M)
    blocks = [before[start.start() :].rstrip("\n")] if start else []
    blocks += [block for block in PATTERNS["code_block"].findall(completion) if block.strip()]
    functions = [block for block in blocks if re.search(r"^[ \t]*def ", block, re.M)]
    return next(reversed(functions or blocks), None)


def read_problem(text: str) -> tuple[str, str] | str:
    """Task and tests of a teacher text, or the name of what is wrong with it; its own solution must pass its tests."""
    module = _first_module(text)
    if isinstance(module, str):
        return module
    asserts = [ast.Assert(node.test, None) for node in module.body if isinstance(node, ast.Assert)]
    try:
        answer = "\n".join(map(ast.unparse, asserts))
        tests = read_tests(answer)
    except (RecursionError, ValueError, Unusable) as error:  # deeply nested, or numbers of thousands of digits
        return str(error) if isinstance(error, Unusable) else "unsafe_tests"
    function = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}.get(tests.entry)
    if function is None:
        return "no_function"
    task = (ast.get_docstring(function) or "").strip()
    if not task:
        return "no_docstring"
    if task in CODE.prompts.placeholders:
        return "placeholder"
    if name := flaw(tests):
        return name
    body = [node.value if isinstance(node, ast.Expr) else node for node in function.body]
    if not all(isinstance(node, (ast.Pass, ast.Raise, ast.Constant)) for node in body):  # there is a solution
        solution = ast.unparse(ast.Module([node for node in module.body if isinstance(node, DEFINITIONS)], []))
        if not grade(solution, answer).solved:
            return "wrong_solution"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"def {function.name}({ast.unparse(function.args)}){returns}:"
    return f"Write a Python function:\n\n{signature}\n\n{task}", answer


def _first_module(text: str) -> ast.Module | str:
    """The syntax tree of the first code block that has one (of 20); it may begin with the prefill of the prompt."""
    sources = PATTERNS["code_block"].findall(text)
    if "```python" not in text[:40]:
        sources.insert(0, text.split("\n```")[0])
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


def validate(problem: Problem) -> str | None:
    """What is wrong with a problem's tests, by name. A column `solution` of a problem file must pass them."""
    try:
        name = flaw(read_tests(problem.answer))
    except Unusable as error:
        return str(error)
    solution = problem.extra.get("solution")
    wrong = name is None and isinstance(solution, str) and not grade(solution, problem.answer).solved
    return "wrong_solution" if wrong else name


CODE = styled(
    "code",
    PromptFormat,
    read_problem=read_problem,
    read_answer=read_answer,
    verify=lambda answer, problem: grade(answer, problem.answer),
    seconds=2 * Limits().wall_s + 1.5,  # the worker outlives the program, which may be run twice
    validate=validate,
    prepare=_sandbox,
    max_answer_chars=MAX_CODE_CHARS,
)
