"""The completions that a run kept (rollouts.jsonl), folded by what came of them: why is the reward 0? Needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from soar.files import Row, clipped
from soar.report.runs import Run, count

OUTCOMES = {  # of `VerifierPool.outcomes` -> the cause in a word, and what to do
    "right": ("correct", ""),
    "near miss": ("difficulty", "wrong, but the gold answer occurs in the text, or a graded reward is not 0"),
    "wrong": ("difficulty", "an answer was read, and it is another one"),
    "no answer": (
        "format",
        "it ends without an answer to read: try another problems.format or an instruction-tuned model",
    ),
    "cut off": ("truncation", "it is cut off before an answer: raise student.sampling.max_tokens"),
    "runs on": ("stop tokens", "it goes on after its answer: set student.sampling.stop to what begins its next turn"),
    "refused": (
        "verifier",
        "what is read equals the gold answer, and the verifier says no: too strict, or another form",
    ),
    "not judged": ("verifier", "the verifier could not decide: see `soar verify`, or choose another problems.verifier"),
}
KINDS = {"hard": "hard problems", "question": "own questions", "teacher": "teacher texts"}
TEXTS = ("question", "answer", "completion")
SHOWN = 8  # completions of each outcome


def _place(row: Row) -> str:
    """Who wrote a completion, and when: `student, outer step 3, RLOO step 0`."""
    steps = [(name, count(row.get(key))) for key, name in (("step", "outer step"), ("rloo_step", "RLOO step"))]
    return ", ".join([str(row.get("by"))[:40], *(f"{name} {step}" for name, step in steps if step is not None)])


def rollouts_section(run: Run) -> dict[str, Any]:
    """Every outcome with its number, its meaning and some of its completions, evenly spaced over the run.

    Attempts in the order of OUTCOMES, then what came of teacher texts.
    """
    folded: dict[str, list[Row]] = {outcome: [] for outcome in OUTCOMES}
    for row in run.rollouts:
        folded.setdefault("teacher: " * (row.get("kind") == "teacher") + str(row.get("outcome"))[:40], []).append(row)
    groups = []
    for outcome, rows in ((outcome, rows) for outcome, rows in folded.items() if rows):
        kinds = Counter(KINDS.get(str(row.get("kind")), "other") for row in rows)
        title = f"{outcome} ({', '.join(f'{kind} {number:,}' for kind, number in kinds.items())})"
        shown = [
            {"place": _place(row), **{key: clipped(str(row.get(key) or ""), 300, 900) for key in TEXTS}}
            for row in rows[:: math.ceil(len(rows) / SHOWN)]
        ]
        groups.append({"title": title, "meaning": OUTCOMES.get(outcome, ("", ""))[1], "rows": shown})
    return {"groups": groups, "total": len(run.rollouts)}
