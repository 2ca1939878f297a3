"""The scripts that make problem files: the same every time, and gradable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import code_exercises

from soar.domains.assertions import flaw, read_tests


def written(main: Any, path: Path, *options: str) -> list[dict[str, Any]]:
    main([str(path), *options])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_code_exercises_have_solutions_that_pass(tmp_path: Path) -> None:
    rows = written(code_exercises.main, tmp_path / "a.jsonl", "--count", "48", "--levels", *"12345678")
    assert len({row["question"] for row in rows}) == 48
    for row in rows:
        assert flaw(read_tests(row["answer"])) is None
        exec("\n".join([row["solution"], row["answer"]]), {})
