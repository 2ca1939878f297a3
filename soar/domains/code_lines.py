"""The domain `code_list`: one-line functions that teacher and student continue as a list, for models of a few hundred million
parameters, which write few correct tests.

The teacher writes a function of one argument and what it returns. The tests are not the teacher's: the function is called
in the sandbox with inputs of ours (lists of whole numbers, texts, whole numbers), and what it gives is expected. So the
tests cannot contradict the solution. The student is told the first.
"""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

from soar.domains.code import CODE, Unusable, decode, flaw, parse_source, read_tests, run
from soar.problems.prompts import PromptFormat
from soar.sandbox.run import End

MAX_VALUE_CHARS = 300  # of one expected value
FEWEST = 3  # inputs of a kind that the function must take
INPUTS = {
    "numbers": ("[4, 7, 1]", "[3]", "[2, 2, 9, 5]", "[10, 3, 8, 0, 6]", "[5, 1, 5, 12, 7, 4]", "[]"),
    "text": ("'Blue river'", "'a'", "'noon'", "'orange'", "'Stone echo tree'", "''"),
    "number": ("7", "0", "12", "3", "25", "1"),
}
HINTS = {"text": r"text|string|word|letter|character|vowel", "numbers": r"list|numbers|array|elements|values|items"}
LINE = re.compile(r"(?P<code>[^\n#]{1,1000}[^\n# ])[ ]{0,9}#[ ]{0,9}(?P<task>[^\n ][^\n]{4,500})")

TEACHER = """def double(x): return [2 * v for v in x] # Return the list with every number doubled.
def count_even(x): return len([v for v in x if v % 2 == 0]) # Return how many of the numbers are even.
def backwards(x): return x[::-1] # Return the text in reverse order.
def total(x): return sum([v for v in x if v > 3]) # Return the sum of the numbers greater than 3.
def capitals(x): return x.upper() # Return the text in capital letters.
"""
STUDENT = """Write a Python function backwards(x). Return the text in reverse order.
For example, backwards('abc') returns 'cba'.
def backwards(x): return x[::-1]

Write a Python function total(x). It is given a list of whole numbers, x, and does these steps:
1. Add 3 to every number.
2. Return the sum of the numbers.
For example, total([1, 2]) returns 9.
def total(x): return sum([v + 3 for v in x])

{question}
def"""


def read_answer(completion: str) -> str | None:
    """The student's function: its first line, behind the `def` that the prompt ends with."""
    line = completion.split("\n", 1)[0].strip()
    return None if not line else line if line.startswith("def ") else f"def {line}"


def read_problem(text: str) -> tuple[str, str] | str:
    """Task and tests of a teacher line, or the name of what is wrong with it: one of those of `coding.read_problem`."""
    line = text.strip().split("\n", 1)[0].strip()
    found = LINE.fullmatch(line if line.startswith("def ") else f"def {line}")
    if found is None:
        return "no_docstring"
    try:
        body = parse_source(found["code"]).body
    except SyntaxError:
        return "not_python"
    function = body[0] if len(body) == 1 else None
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) != 1 or not function.name.isascii():
        return "no_function"
    name, task = function.name, found["task"].strip().rstrip(".")
    try:
        results = _results(found["code"], name, task)
        if len(results) < FEWEST:
            return "wrong_solution"
        answer = "\n".join(f"assert {call} == {value}" for call, value in results)
        wrong = flaw(read_tests(answer))
    except Unusable as error:
        return error.name
    argument = ast.unparse(function.args)
    example = f"For example, {results[0][0]} returns {results[0][1]}."
    return wrong or (f"Write a Python function {name}({argument}). {task}.\n{example}", answer)


def _results(code: str, name: str, task: str) -> list[tuple[str, str]]:
    """Calls with the literal that each returns: inputs of the kind that the task speaks of, else of the first that works."""
    calls = [f"{name}({value})" for values in INPUTS.values() for value in values]
    outcome = run(code, read_tests("\n".join(f"assert {call}" for call in calls)))
    if outcome.end is not End.DONE:
        return []
    literals: dict[str, str] = {}
    for index, answer in outcome.answers.items():
        try:
            value = spell(decode(answer)) if 0 <= index < len(calls) else ""
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            continue
        if 0 < len(value) <= MAX_VALUE_CHARS:
            literals[calls[index]] = value
    told = [kind for kind, words in HINTS.items() if re.search(words, task, re.IGNORECASE)]
    for kind in [*told, *INPUTS]:
        found = [(call, literals[call]) for call in (f"{name}({v})" for v in INPUTS[kind]) if call in literals]
        if len(found) >= FEWEST:
            return found
    return []


def spell(value: Any) -> str:
    """A plain value as a literal that is the same in every process: sets are sorted."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{spell(key)}: {spell(item)}" for key, item in value.items()) + "}"
    if not isinstance(value, (list, tuple, set, frozenset)):
        return repr(value)
    items = [spell(item) for item in value]
    if isinstance(value, list):
        return f"[{', '.join(items)}]"
    if isinstance(value, tuple):
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    held = "{" + ", ".join(sorted(items)) + "}" if items else ""
    return held if held and isinstance(value, set) else f"{type(value).__name__}({held})"


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
