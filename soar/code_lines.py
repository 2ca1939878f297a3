'''The domain `code_list`: one-line functions in a list that teacher and student continue, for models of a few hundred million
parameters, which write few correct tests.

The teacher writes a function, what it returns, and calls of it. The expected values are not the teacher's: they are what its
function returns in the sandbox, so the tests cannot contradict the reference. The first call is told to the student.
'''

from __future__ import annotations

import ast
import re
from dataclasses import replace

from soar.assertions import Tests, Unusable, decode, literal, parse_source, read_tests
from soar.boxes import End
from soar.coding import CODE, flaw, run
from soar.prompts import PromptFormat

MAX_VALUE_CHARS = 500  # of one expected value
FEWEST, MOST = 2, 16  # calls
LINE = re.compile(r"(?P<code>[^\n#]{1,1000})#[ ]{0,3}(?P<task>[^\n#]{1,1000}?)[ ]{0,3}Calls?:(?P<calls>[^\n]{1,2000})")

TEACHER = """def double(x): return [2 * v for v in x] # Return the list with every number doubled. Calls: double([1, 5]), double([]), double([3])
def count_even(x): return len([v for v in x if v % 2 == 0]) # Return how many numbers are even. Calls: count_even([1, 2, 4]), count_even([3, 5]), count_even([6])
def backwards(x): return x[::-1] # Return the text in reverse order. Calls: backwards("abc"), backwards(""), backwards("no")
def total(x): return sum([v for v in x if v > 3]) # Return the sum of the numbers greater than 3. Calls: total([1, 5, 9]), total([2]), total([4, 4])
"""  # noqa: E501 - one line each is the format
STUDENT = '''Write a Python function backwards(x). Return the text in reverse order.
For example, backwards("abc") returns "cba".
def backwards(x): return x[::-1]

Write a Python function total(x). It is given a list of whole numbers, x, and does these steps:
1. Add 3 to every number.
2. Return the sum of the numbers.
For example, total([1, 2]) returns 9.
def total(x): return sum([v + 3 for v in x])

{question}
def'''


def read_answer(completion: str) -> str | None:
    """The student's function: its first line, behind the `def` that the prompt ends with."""
    line = completion.split("\n", 1)[0].strip()
    return None if not line else line if line.startswith("def ") else f"def {line}"


def read_problem(text: str) -> tuple[str, str] | str:
    """Task and tests of a teacher line, or the name of what is wrong with it: one of those of `coding.read_problem`."""
    line = text.strip().split("\n", 1)[0].strip()
    found = LINE.fullmatch(line if line.startswith("def ") else f"def {line}")
    if found is None:
        return "no_docstring" if "#" not in line else "no_tests"
    try:
        body = parse_source(found["code"]).body
        calls = ast.parse(f"[{found['calls'].strip().rstrip('.,')}]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not_python"
    function = body[0] if len(body) == 1 else None
    if not isinstance(function, ast.FunctionDef) or not isinstance(calls, ast.List):
        return "no_function"
    return _task(function, found["code"].strip(), found["task"].strip(), calls.elts)


def _task(function: ast.FunctionDef, code: str, task: str, calls: list[ast.expr]) -> tuple[str, str] | str:
    """The problem of a parsed line."""
    if not FEWEST <= len(calls) <= MOST:
        return "no_tests" if len(calls) < FEWEST else "too_many_tests"
    texts = []
    for call in calls:
        try:
            name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
            if not isinstance(call, ast.Call) or name != function.name or call.keywords:
                return "unsafe_tests"
            for argument in call.args:
                literal(argument)
            texts.append(ast.unparse(call))
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            return "unsafe_tests"
    texts = list(dict.fromkeys(texts))
    try:
        values = _values(code, read_tests("\n".join(f"assert {call}" for call in texts)))
        if values is None:
            return "wrong_solution"
        answer = "\n".join(f"assert {call} == {value}" for call, value in zip(texts, values, strict=True))
        name = flaw(read_tests(answer))
    except Unusable as error:
        return error.name
    told = f"Write a Python function {function.name}({ast.unparse(function.args)}). {task.rstrip('.')}."
    return name or (f"{told}\nFor example, {texts[0]} returns {values[0]}.", answer)


def _values(code: str, tests: Tests) -> list[str] | None:
    """What the function returns for each call, as literals; None where it fails, or returns what is no short plain value."""
    outcome = run(code, tests)
    if outcome.end is not End.DONE or outcome.errors or set(outcome.answers) != set(range(len(tests.checks))):
        return None
    try:
        values = [repr(decode(outcome.answers[i])) for i in range(len(tests.checks))]
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        return None
    return values if all(len(value) <= MAX_VALUE_CHARS for value in values) else None


CODE_LIST = replace(
    CODE,
    name="code_list",
    prompts=PromptFormat(
        name="code_list",
        answer_style="line",
        teacher_template=TEACHER,
        student_template=STUDENT,
        turns=False,
        teacher_prefill="def",
        text_answers=True,
        one_line=True,
    ),
    read_problem=read_problem,
    read_answer=read_answer,
)
