"""The scripts that make problem files: the same every time, and gradable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import code_exercises
import pytest
import science_exercises

from soar.domains.assertions import flaw, read_tests
from soar.domains.quantities import compare_quantities
from soar.types import Verdict


def written(main: Any, path: Path, *options: str) -> list[dict[str, Any]]:
    main([str(path), *options])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_science_exercises_are_distinct_repeatable_and_graded(tmp_path: Path) -> None:
    options = ("--count", "120", "--kind", "choices", "--largest", "400")
    rows = written(science_exercises.main, tmp_path / "a.jsonl", *options)
    assert rows == written(science_exercises.main, tmp_path / "b.jsonl", *options)
    assert len({row["question"] for row in rows}) == 120
    for row in rows:
        assert row["options"][0] == row["answer"]
        verdicts = [compare_quantities(option, row["answer"]) for option in row["options"]]
        assert verdicts == [Verdict.CORRECT, *[Verdict.WRONG] * 3]


def test_code_exercises_need_every_step_and_their_solutions_pass(tmp_path: Path) -> None:
    options = ("--count", "48", "--levels", *"12345678")
    rows = written(code_exercises.main, tmp_path / "a.jsonl", *options)
    assert rows == written(code_exercises.main, tmp_path / "b.jsonl", *options)
    assert len({row["question"] for row in rows}) == 48
    for row in rows:
        assert flaw(read_tests(row["answer"])) is None
        head, *steps, last = row["solution"].split("\n")
        exec("\n".join([head, *steps, last, row["answer"]]), {})
        for left_out in range(len(steps)):
            shorter = [head, *steps[:left_out], *steps[left_out + 1 :], last]
            with pytest.raises((AssertionError, ValueError)):
                exec("\n".join([*shorter, row["answer"]]), {})
