"""The domain `code`: a student writes a Python function or program, and is right when it passes all tests.

The teacher writes one Python code block: a function with a docstring (the task), a body (its own solution), and asserts
(the tests, `assertions.py`). Its solution must pass them, they must not contradict each other, and no trivial program
may pass them. Programs run in the sandbox and nowhere else; the tests are never run at all."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

from soar.domains.assertions import Unusable, flaw, parse_source, read_tests
from soar.problems.domain import WORDS, styled
from soar.problems.prompts import PromptFormat
from soar.problems.verify import VerifierError
from soar.sandbox.run import Job, Limits, Sandbox, SandboxError
from soar.types import Problem, Verdict

MAX_CODE_CHARS = 20_000
DEFINITIONS = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
PLACEHOLDER = WORDS["code"]["prompts"]["placeholders"][0]
FENCED = re.compile(r"(?ims)^[ \t]{0,8}```[ \t]{0,8}(?:python3?|py)?[ \t]{0,8}\n(.*?)(?:^[ \t]{0,8}```|\Z)")


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    """The sandbox of this process. Raises SandboxError, which says what to install, where there is none."""
    sandbox = Sandbox()
    sandbox.run(Job(""))
    return sandbox


@lru_cache(maxsize=4_000)  # programs and tests are some kilobytes each
def grade(code: str, text: str) -> Verdict:
    """Whether a program passes the tests that `text` holds; UNSCORABLE for unusable tests. Equal questions are asked
    once. Raises VerifierError when the sandbox stopped working: a run ends rather than counting that as a wrong answer."""
    try:
        tests = read_tests(text)
        if len(code) > MAX_CODE_CHARS:
            return Verdict.WRONG
        parse_source(code)
        return tests.verdict(_sandbox().run(tests.job(code)))
    except Unusable:
        return Verdict.UNSCORABLE
    except SyntaxError:
        return Verdict.WRONG
    except SandboxError as error:
        raise VerifierError(str(error)) from error


def read_answer(completion: str) -> str | None:
    """The student's program: the last code block that defines a function, else the last one. Code before the first fence
    counts as a block, from the first line that begins like Python. None: there is no code."""
    start = re.search(r"^(?:def |import |from \w+ import |class |print\(|@)", completion, re.M)
    before = completion.split("```", 1)[0]  # code without an opening fence
    found = [before[start.start() :].rstrip("\n")] if start and start.start() < len(before) else []
    found += [block for block in FENCED.findall(completion) if block.strip()]
    if not found:
        return None
    return next((block for block in reversed(found) if re.search(r"^[ \t]*def ", block, re.M)), found[-1])


def read_problem(text: str) -> tuple[str, str] | str:
    """Task and tests of a teacher text, or the name of what is wrong with it; its own solution must pass its tests."""
    module = _first_module(text)
    if isinstance(module, str):
        return module
    asserts = [ast.Assert(node.test, None) for node in module.body if isinstance(node, ast.Assert)]
    try:
        answer = "\n".join(map(ast.unparse, asserts))
        tests = read_tests(answer)
    except (RecursionError, ValueError) as error:  # deeply nested, or numbers of thousands of digits
        return str(error) if isinstance(error, Unusable) else "unsafe_tests"
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    if tests.entry not in functions:
        return "no_function"
    function = functions[tests.entry]
    task = (ast.get_docstring(function) or "").strip()
    if not task:
        return "no_docstring"
    if task == PLACEHOLDER:
        return "placeholder"
    name, body = flaw(tests), [node.value if isinstance(node, ast.Expr) else node for node in function.body]
    if name is None and not all(isinstance(node, (ast.Pass, ast.Raise, ast.Constant)) for node in body):
        solution = ast.unparse(ast.Module([node for node in module.body if isinstance(node, DEFINITIONS)], []))
        name = None if grade(solution, answer).solved else "wrong_solution"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"def {function.name}({ast.unparse(function.args)}){returns}:"
    return name or (f"Write a Python function:\n\n{signature}\n\n{task}", answer)


def _first_module(text: str) -> ast.Module | str:
    """The syntax tree of the first code block that has one (of 20); it may begin with the prefill of the prompt."""
    sources = FENCED.findall(text)
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
    seconds=2 * Limits.wall_s + 1.5,  # the worker outlives the program, which may be run twice
    validate=validate,
    prepare=_sandbox,
    max_answer_chars=MAX_CODE_CHARS,
)
