"""Tests of a programming task, read from text without running any of it, and compared with what a program gave.

Two forms. Asserts: each is taken apart into a call of the function and the value that is expected (`assert f(2) == 4`).
Input and output: `Input:` and `Output:` blocks, or JSON `{"inputs": [...], "outputs": [...]}`. The calls and inputs go
into the sandbox, the expected values stay here, so that no program can see them, patch the comparison, or pass by
ending early. An assert of another form cannot be checked that way, and is refused by name.

Values are those of literals: None, bool, int, float, str, bytes, complex, list, tuple, set, dict. Equality is Python's;
where a float is expected, 1e-6 of difference is allowed.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soar.sandbox.run import End, Job, Outcome
from soar.types import UserError, Verdict

MAX_CHARS = 20_000  # of the text of all tests
MAX_TESTS = 64
MAX_DEPTH = 40  # of nested values
MAX_PLACES = 30  # that a value is rounded to: round(7, -10**9) would compute 10**10**9
FLOAT_TOLERANCE = 1e-6
WRAPPERS: dict[str, Callable[..., Any]] = {
    "abs": abs, "len": len, "list": list, "round": round, "set": set, "sorted": sorted, "tuple": tuple,
}  # fmt: skip
FENCE = re.compile(r"^[ \t]{0,8}```[^\n]{0,40}\n?", re.MULTILINE)
BLOCK = re.compile(r"^[ \t]{0,8}(input|output)[ \t]{0,3}\d{0,3}:[ \t]{0,8}\n?", re.IGNORECASE | re.MULTILINE)


class Unusable(UserError, ValueError):
    """Tests that cannot be used. `name` is one of no_tests, too_many_tests, unreadable_tests, unsafe_tests."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


@dataclass(frozen=True)
class Check:
    """One test. call: source of `(args, kwargs)`, or the standard input. how: `equal`, `truth` (bool of the value), `same`.

    near: relative and absolute difference that a float may have. wrapper: the function of WRAPPERS that is applied first.
    """

    call: str
    expected: Any
    arguments: tuple[Any, ...] = ()
    how: str = "equal"
    near: tuple[float, float] = (FLOAT_TOLERANCE, FLOAT_TOLERANCE)
    wrapper: str = ""
    rest: tuple[Any, ...] = ()

    def passed(self, value: Any) -> bool:
        """Whether a value is the expected one."""
        try:
            if self.wrapper:
                value = WRAPPERS[self.wrapper](value, *self.rest)
            if self.how == "truth":
                return bool(value) == self.expected
            if self.how == "same":
                return value is self.expected
            return _equal(value, self.expected, self.near)
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            return False


@dataclass(frozen=True)
class Tests:
    """All tests of one task. entry: the function that they call; "" for input and output."""

    checks: tuple[Check, ...]
    entry: str = ""

    def job(self, source: str) -> Job:
        """What the sandbox must run for a program."""
        if not self.entry:
            return Job(source, inputs=tuple(check.call for check in self.checks))
        return Job(source, self.entry, f"[{', '.join(check.call for check in self.checks)}]")

    def verdict(self, outcome: Outcome) -> Verdict:
        """CORRECT when every test was answered with its expected value, and nothing else happened."""
        if outcome.end is not End.DONE:
            return Verdict.TIMEOUT if outcome.end is End.TIMEOUT else Verdict.CRASHED
        if outcome.errors or not self.checks or set(outcome.answers) != set(range(len(self.checks))):
            return Verdict.WRONG
        read = decode if self.entry else tidy
        try:
            passed = all(check.passed(read(outcome.answers[index])) for index, check in enumerate(self.checks))
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            return Verdict.WRONG
        return Verdict.CORRECT if passed else Verdict.WRONG


def _equal(value: Any, expected: Any, near: tuple[float, float]) -> bool:
    if isinstance(expected, float):
        if not isinstance(value, (int, float)):
            return False
        return value == expected or math.isclose(value, expected, rel_tol=near[0], abs_tol=near[1])
    if type(value) is not type(expected) or not isinstance(value, (list, tuple, dict)):
        return bool(value == expected)
    if len(value) != len(expected):
        return False
    if isinstance(value, dict):
        return all(key in value and _equal(value[key], expected[key], near) for key in expected)
    return all(_equal(a, b, near) for a, b in zip(value, expected, strict=True))


def decode(data: Any, depth: int = 0) -> Any:
    """The value that `jail.encode` wrote as JSON. Raises ValueError for anything else, TypeError for unhashable keys."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item, depth + 1) for item in data]
    ((name, content),) = data.items()
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "dict":
        return {decode(key, depth + 1): decode(value, depth + 1) for key, value in content}
    if name in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[name](decode(item, depth + 1) for item in content)
    raise ValueError(f"no type {name!r}")


def tidy(text: Any) -> str:
    """Printed text as it is compared: without white space at the ends of lines and of the whole."""
    if not isinstance(text, str):
        raise TypeError("printed text is text")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def read_tests(text: str) -> Tests:
    """The tests in a text. Raises Unusable."""
    if len(text) > MAX_CHARS:
        raise Unusable("too_many_tests", f"{len(text):,} characters, at most {MAX_CHARS:,}")
    plain = FENCE.sub("", text).strip()
    if not plain:
        raise Unusable("no_tests", "the text is empty")
    read = _read_json if plain[0] in "[{" else _read_blocks if BLOCK.match(plain) else read_asserts
    tests = read(plain)
    if not tests.checks:
        raise Unusable("no_tests", "there is no assert, and no Input: with its Output:")
    if len(tests.checks) > MAX_TESTS:
        raise Unusable("too_many_tests", f"{len(tests.checks)} tests, at most {MAX_TESTS}")
    return tests


def _read_json(text: str) -> Tests:
    try:
        data = json.loads(text)
        if isinstance(data, list):
            return read_asserts("\n".join(data))
        texts = [
            [item if isinstance(item, str) else "\n".join(map(str, item)) for item in data[key]]
            for key in ("inputs", "outputs")
        ]
        return Tests(tuple(Check(given, tidy(wanted)) for given, wanted in zip(*texts, strict=True)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        message = f"JSON without a list of asserts, or of inputs and outputs: {error}"
        raise Unusable("unreadable_tests", message) from error


def _read_blocks(text: str) -> Tests:
    marks = list(BLOCK.finditer(text))
    if [mark[1].lower() for mark in marks] != ["input", "output"] * (len(marks) // 2):
        raise Unusable("unreadable_tests", "every Input: needs one Output: after it")
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    fields = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    pairs = zip(fields[::2], fields[1::2], strict=True)
    return Tests(tuple(Check(given.strip("\n") + "\n", tidy(wanted)) for given, wanted in pairs))


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
        raise Unusable("unreadable_tests", f"not Python: {error}") from error
    checks: list[tuple[str, Check]] = []
    for statement in body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if is_text or isinstance(statement, (ast.Import, ast.ImportFrom)):
            continue
        if not isinstance(statement, ast.Assert):
            raise Unusable("unsafe_tests", f"only asserts can be checked, found {_shown(statement)}")
        test = statement.test
        parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
        checks += map(_read_assert, parts)
    entries = sorted({entry for entry, _ in checks})
    if len(entries) > 1:
        raise Unusable("unsafe_tests", f"the asserts call several functions: {', '.join(entries)}")
    return Tests(tuple(check for _, check in checks), "".join(entries))


def _shown(node: ast.AST) -> str:
    try:
        return repr(ast.unparse(node)[:80])
    except (RecursionError, ValueError):
        return "something deeply nested, or a number of thousands of digits"


def _read_assert(node: ast.expr) -> tuple[str, Check]:
    """Function name and check of one assertion. Raises Unusable."""
    try:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            return _read_comparison(node.left, node.ops[0], node.comparators[0])
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return _check(node.operand, False, how="truth")
        if isinstance(node, ast.Call) and len(_arguments(node, "isclose")) == 2:
            wanted = {word.arg: float(literal(word.value)) for word in node.keywords}
            near = (wanted.get("rel_tol", 1e-9), wanted.get("abs_tol", 0.0))
            return _check_either(node.args[0], node.args[1], near=near)
        return _check(node, True, how="truth")
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise Unusable("unsafe_tests", f"cannot be checked safely: assert {_shown(node)}: {error}") from error


def _read_comparison(left: ast.expr, op: ast.cmpop, right: ast.expr) -> tuple[str, Check]:
    if isinstance(op, ast.Eq):
        return _check_either(left, right)
    if isinstance(op, ast.Is):
        value = literal(right)
        if value is not None and not isinstance(value, bool):
            raise ValueError("`is` with a value that is not None, True or False")
        return _check(left, value, how="same")
    inside = _arguments(left, "abs") if isinstance(op, (ast.Lt, ast.LtE)) else []
    if len(inside) == 1 and isinstance(inside[0], ast.BinOp) and isinstance(inside[0].op, ast.Sub):
        return _check_either(inside[0].left, inside[0].right, near=(0.0, float(literal(right))))
    raise ValueError("expected == between a call and a value")


def _arguments(node: ast.expr, name: str) -> list[ast.expr]:
    """Those of a call of the function `name` or `math.name`; none for anything else."""
    called = isinstance(node, ast.Call) and ast.unparse(node.func) in (name, f"math.{name}")
    return node.args if called and isinstance(node, ast.Call) else []


def _check_either(left: ast.expr, right: ast.expr, **options: Any) -> tuple[str, Check]:
    """The call may stand on either side."""
    try:
        value = literal(right)
    except ValueError:
        left, value = right, literal(left)
    return _check(left, float(value) if "near" in options else value, **options)


def _check(node: ast.expr, expected: Any, **options: Any) -> tuple[str, Check]:
    """The check of a call, or of a call inside of one of WRAPPERS."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("expected a call of the function with literal arguments")
    if node.func.id in WRAPPERS and node.args and isinstance(node.args[0], ast.Call) and not node.keywords:
        inner = node.args[0].func
        if not (isinstance(inner, ast.Name) and inner.id in LITERAL_CALLS):
            rest = tuple(literal(argument) for argument in node.args[1:])
            if any(isinstance(value, int) and abs(value) > MAX_PLACES for value in rest):
                raise ValueError(f"more than {MAX_PLACES} places of rounding")
            entry, check = _check(node.args[0], expected, **options)
            if check.wrapper:
                raise ValueError("one function around the call at most")
            return entry, Check(**{**vars(check), "wrapper": node.func.id, "rest": rest})
    arguments = tuple(literal(argument) for argument in node.args)
    if any(word.arg is None for word in node.keywords):
        raise ValueError("** in a call")
    words = {str(word.arg): literal(word.value) for word in node.keywords}
    pairs = ", ".join(f"{word.arg!r}: {ast.unparse(word.value)}" for word in node.keywords)
    source = f"({ast.unparse(ast.Tuple(node.args, ast.Load()))}, {{{pairs}}})"
    return node.func.id, Check(source, expected, (*arguments, *words.values()), **options)


LITERAL_CALLS: dict[str, Callable[..., Any]] = {"set": set, "float": float, "frozenset": frozenset}
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Pow: operator.pow, ast.Div: operator.truediv,
}  # fmt: skip


def literal(node: ast.expr, depth: int = 0) -> Any:
    """The value of a literal: constants, containers, signs, arithmetic on small numbers, `[0] * 5`, `set()`, `float("inf")`.

    Raises ValueError for everything else, so that nothing is looked up, called or built without bounds.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    deeper = depth + 1
    if isinstance(node, ast.Constant) and node.value is not Ellipsis:
        return node.value
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        items = [literal(item, deeper) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items) if isinstance(node, ast.Tuple) else set(items)
    if isinstance(node, ast.Dict):
        if any(key is None for key in node.keys):
            raise ValueError("** in a dict")
        keys = [literal(key, deeper) for key in node.keys if key is not None]
        return dict(zip(keys, (literal(value, deeper) for value in node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = literal(node.operand, deeper)
        if isinstance(value, (int, float, complex)):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _arithmetic(literal(node.left, deeper), node.op, literal(node.right, deeper))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LITERAL_CALLS:
        arguments = [literal(argument, deeper) for argument in node.args]
        if len(arguments) < 2 and not node.keywords:
            value = LITERAL_CALLS[node.func.id](*arguments)
            if value != value:
                raise ValueError("nothing equals nan")
            return value
    raise ValueError(f"{_shown(node)} is not a plain value")


def _size(value: Any) -> int:
    """Elements of a value, nested ones included; characters of a text."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return 1 + sum(_size(item) for item in value)
    if isinstance(value, dict):
        return 1 + sum(_size(item) for pair in value.items() for item in pair)
    return max(1, len(value)) if isinstance(value, (str, bytes)) else 1


def _arithmetic(left: Any, op: ast.operator, right: Any) -> Any:
    """A bounded operation: numbers below 1e30, exponents to 64, repetition to 1,000 elements in all."""
    if isinstance(left, (str, list, tuple)) and isinstance(op, ast.Mult) and isinstance(right, int):
        if _size(left) * max(right, 0) <= 1_000:
            return left * right
        raise ValueError("a repetition of too many elements")
    numbers = all(isinstance(value, (int, float)) and abs(value) < 1e30 for value in (left, right))
    if numbers and (not isinstance(op, ast.Pow) or 0 <= right <= 64):
        return OPERATORS[type(op)](left, right)
    raise ValueError("arithmetic on large values")


def flaw(tests: Tests) -> str | None:
    """What makes tests useless: `contradicting_tests` (equal calls with other results) or `trivial_tests`. None: neither.

    Trivial: a program passes them that gives one and the same value, or one of its arguments, or its input.
    """
    known: dict[tuple[str, ...], Any] = {}
    for check in tests.checks:
        place = (check.call, check.wrapper, repr(check.rest), check.how)
        if place in known and known[place] != check.expected:
            return "contradicting_tests"
        known[place] = check.expected
    constants = [None, True, False, 0, 1, "", [], *(check.expected for check in tests.checks)]
    programs = [[value] * len(tests.checks) for value in constants]  # what each gives is known without running it
    if tests.entry:
        programs += map(list, zip(*(check.arguments for check in tests.checks), strict=False))
    else:
        programs.append([check.call.strip() for check in tests.checks])
    passed = (
        all(check.passed(value) for check, value in zip(tests.checks, values, strict=True)) for values in programs
    )
    return "trivial_tests" if any(passed) else None
