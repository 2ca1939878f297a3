"""The scripts that make problem files: the same every time, and gradable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import code_exercises
import science_exercises

from soar.domains.assertions import flaw, read_tests
from soar.domains.quantities import compare_quantities
from soar.types import Verdict


def written(main: Any, path: Path, *options: str) -> list[dict[str, Any]]:
    main([str(path), *options])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_science_exercises_are_distinct_and_graded(tmp_path: Path) -> None:
    rows = written(
        science_exercises.main, tmp_path / "a.jsonl", "--count", "120", "--kind", "choices", "--largest", "400"
    )
    assert len({row["question"] for row in rows}) == 120
    for row in rows:
        verdicts = [compare_quantities(option, row["answer"]) for option in row["options"]]
        assert verdicts == [Verdict.CORRECT, *[Verdict.WRONG] * 3]


def test_code_exercises_have_solutions_that_pass(tmp_path: Path) -> None:
    rows = written(code_exercises.main, tmp_path / "a.jsonl", "--count", "48", "--levels", *"12345678")
    assert len({row["question"] for row in rows}) == 48
    for row in rows:
        assert flaw(read_tests(row["answer"])) is None
        exec("\n".join([row["solution"], row["answer"]]), {})
