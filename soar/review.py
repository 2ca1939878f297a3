"""Promotions on hold for a person: the file that shows one, and the decision in it. Needs no torch.

With promotion.review the run saves itself and ends at every promotion; `soar review` shows the questions and their effect
and takes the decision, and the resumed run does what it says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soar.figures import visible
from soar.files import finite, write_json
from soar.runs import REVIEW_FILE as FILE
from soar.runs import read_object
from soar.types import UserError

ACCEPTED, REJECTED = "accepted", "rejected"


class ReviewError(UserError):
    """There is nothing to review, or the file is damaged."""


def ask(folder: Path, promotion: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Put a promotion up for review, unless it is up already (then its decision stays)."""
    known, _ = read_object(folder / FILE)
    if known.get("promotion") != promotion or known.get("questions") != rows:
        write_json(folder / FILE, {"promotion": promotion, "questions": rows, "decision": None, "by": None})


def answer(folder: Path, promotion: dict[str, Any]) -> tuple[str, str | None] | None:
    """(decision, by) on a promotion; None while there is none. A decision on another promotion does not count."""
    known, _ = read_object(folder / FILE)
    by = known.get("by")
    if known.get("promotion") != promotion or known.get("decision") not in (ACCEPTED, REJECTED):
        return None
    return known["decision"], by if by is None else str(by)


def close(folder: Path) -> None:
    """Take the file away once the ledger holds the decision."""
    (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any]:
    """The promotion that is up for review. Raises ReviewError."""
    if not (folder / FILE).is_file():
        raise ReviewError(
            f"{folder} has no promotion to review (no {FILE}); only runs with promotion.review = true ask"
        )
    known, notes = read_object(folder / FILE)
    rows = known.get("questions")
    whole = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not isinstance(known.get("promotion"), dict) or not whole:
        raise ReviewError(
            f"{folder / FILE} is damaged: {(notes or ['it holds no promotion'])[0]}; delete it, and the run will "
            "write it again when it is resumed"
        )
    return known


def decide(folder: Path, decision: str, by: str) -> None:
    """Write the decision on the promotion that is up for review. Raises ReviewError."""
    write_json(folder / FILE, finite({**read(folder), "decision": decision, "by": by}))


def lines(review: dict[str, Any]) -> list[str]:
    """What a person needs to decide, as lines for a terminal; text of the model has its control characters escaped."""
    promotion = review["promotion"]
    step, dataset = promotion.get("step"), promotion.get("dataset")
    found = [
        f"outer step {step}: dataset {dataset}, student {promotion.get('repeat')}",
        f"  reward {_number(promotion.get('reward'))}: pass rate on the hard reward questions "
        f"{_number(promotion.get('pass_rate'))}, baseline {_number(promotion.get('baseline_pass_rate'))}",
        f"  {len(review['questions'])} questions with the teacher's answers:",
    ]
    for number, row in enumerate(review["questions"], start=1):
        mark = {True: "", False: "  (wrong by the world's oracle)"}.get(row.get("correct"), "")
        found.append(f"  {number:3d}. {visible(_one_line(row.get('question')))}")
        found.append(f"       answer: {visible(_one_line(row.get('answer')))}{mark}")
    decision = review.get("decision")
    found.append(f"decision: {decision} by {visible(str(review.get('by')))}" if decision else "decision: none yet")
    return found


def _one_line(text: object) -> str:
    return str(text)[:1000].replace("\n", "\u2424")


def _number(value: object) -> str:
    return f"{value:+.4f}" if isinstance(value, int | float) else "-"
