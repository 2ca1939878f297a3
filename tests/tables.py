"""Tables of cases: a line of `cases/NAME.jsonl` is the name of its table and then the values of one case."""

import json
from pathlib import Path
from typing import Any


def cases(name: str, table: str) -> list[list[Any]]:
    """The rows of a table of `cases/NAME.jsonl`, in order."""
    lines = (Path(__file__).parent / "cases" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [row for of, *row in map(json.loads, filter(None, lines)) if of == table]
