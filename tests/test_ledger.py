"""The ledger's chain: what is in a line, and that no line can be changed, moved or taken out unnoticed."""

from __future__ import annotations

from typing import Any

import pytest

from soar.run import ledger

PROMOTION = {
    "event": "promotion", "step": 3, "dataset": 1, "repeat": 0, "reward": 0.25, "pass_rate": 0.5,
    "baseline_pass_rate": 0.25, "questions": 2, "student": "ab" * 32, "verdicts": "cd" * 32,
}  # fmt: skip
ROWS = [{"question": "1+1", "answer": "2", "reward": 0.25}, {"question": "é\ud800", "answer": "\x00"}]


def chain(count: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(count):
        previous = lines[-1]["sha256"] if lines else ledger.FIRST
        lines.append(ledger.entry(previous, {**PROMOTION, "step": step}, ROWS, "automatic"))
    return lines


def test_a_line_holds_what_was_promoted_and_who_decided() -> None:
    line = ledger.entry("0" * 64, PROMOTION, ROWS, "accepted", "ann")
    assert {name: line[name] for name in ledger.FIELDS} == {k: v for k, v in PROMOTION.items() if k != "event"}
    assert (line["decision"], line["by"], line["previous"]) == ("accepted", "ann", "0" * 64)
    assert line["questions_sha256"] == ledger.questions_digest(ROWS)
    assert line["sha256"] == ledger.digest({name: value for name, value in line.items() if name != "sha256"})


def test_digest_is_of_the_content_not_of_its_order() -> None:
    assert ledger.digest({"a": 1, "b": [2.5, None]}) == ledger.digest({"b": [2.5, None], "a": 1})
    assert ledger.digest([1, 2]) != ledger.digest([2, 1])
    assert ledger.digest({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_questions_are_told_apart_by_text_and_order() -> None:
    other = [{"question": "1+1", "answer": "3"}, ROWS[1]]
    assert len({ledger.questions_digest(rows) for rows in (ROWS, other, ROWS[::-1], ROWS[:1])}) == 4


def test_a_whole_chain_has_no_complaints() -> None:
    assert ledger.complaints([]) == []
    assert ledger.complaints(chain(4)) == []


@pytest.mark.parametrize("field", [*ledger.FIELDS, "questions_sha256", "decision", "by", "previous"])
def test_a_changed_field_is_found(field: str) -> None:
    lines = chain(3)
    lines[1] = {**lines[1], field: "changed"}
    assert any(complaint.startswith("ledger.jsonl:2: the line was changed") for complaint in ledger.complaints(lines))


def test_a_line_that_was_forged_whole_breaks_the_chain_after_it() -> None:
    lines = chain(3)
    lines[1] = ledger.entry(lines[0]["sha256"], {**PROMOTION, "step": 1, "reward": 0.9}, ROWS, "automatic")
    assert ledger.complaints(lines) == [
        "ledger.jsonl:3: does not follow the line before: one was changed, moved or left out"
    ]


def test_lines_left_out_or_moved_are_found() -> None:
    lines = chain(3)
    assert [complaint.split(":")[1] for complaint in ledger.complaints(lines[1:])] == ["1"]
    assert [complaint.split(":")[1] for complaint in ledger.complaints([lines[0], lines[2]])] == ["2"]
    assert len(ledger.complaints([lines[1], lines[0], lines[2]])) == 3
