"""Tables of cases: a line of `cases/NAME.jsonl` is the name of its table and then the values of one case. And what else
needs no torch: the files of run folders."""

import json
import time
from pathlib import Path
from typing import Any

CASES = Path(__file__).parent / "cases"


def cases(name: str, table: str) -> list[list[Any]]:
    """The rows of a table of `cases/NAME.jsonl`, in order."""
    lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [row for of, *row in map(json.loads, filter(None, lines)) if of == table]


def ends(process: int) -> bool:
    """Whether a process ends within ten seconds; a dead one that nobody has waited for has ended."""
    for _ in range(200):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def change(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
