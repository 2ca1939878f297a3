"""The ledger: one line for every promotion, chained by hashes, so that a changed or missing line is found. Pure.

Each line holds what was promoted (hashes of questions, adapter and verdicts), who decided, the sha256 of the line before
and its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

FIRST = "0" * 64  # what stands for the line before the first
FIELDS = (
    "step", "dataset", "repeat", "reward", "pass_rate", "baseline_pass_rate", "questions", "student", "verdicts",
)  # fmt: skip


def digest(value: Any) -> str:
    """sha256 of a JSON value, written with sorted keys and without spaces."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def questions_digest(rows: Sequence[dict[str, Any]]) -> str:
    """sha256 over questions and answers in their order."""
    return digest([[row["question"], row["answer"]] for row in rows])


def entry(
    previous: str, promotion: dict[str, Any], rows: Sequence[dict[str, Any]], decision: str, by: str | None = None
) -> dict[str, Any]:
    """The line for a promotion event and its questions. decision: `automatic`, `accepted` or `rejected`; by: a person."""
    body = {name: promotion[name] for name in FIELDS}
    body |= {"questions_sha256": questions_digest(rows), "decision": decision, "by": by, "previous": previous}
    return {**body, "sha256": digest(body)}


def complaints(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with the chain: lines that do not follow from the one before, or were changed."""
    found = []
    previous = FIRST
    for number, line in enumerate(lines, start=1):
        body = {name: value for name, value in line.items() if name != "sha256"}
        if line.get("sha256") != digest(body):
            found.append(f"ledger.jsonl:{number}: the line was changed: its sha256 is not that of its content")
        if line.get("previous") != previous:
            found.append(f"ledger.jsonl:{number}: does not follow the line before: one was changed, moved or left out")
        previous = str(line.get("sha256"))
    return found
