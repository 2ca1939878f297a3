"""`soar verify`: counts per verdict, columns, listings, labels, and gold answers against themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_jsonl
from tables import cases

from soar.cli import grade, main
from soar.problems.pool import VerifierPool
from soar.types import Verdict

FUNCTIONS = Path(__file__).parent / "verifier_functions.py"
ROWS = [row for (row,) in cases("cli_verify", "row")]


def verified(*words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    code = main(["verify", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_counts_shares_listing_and_labels(tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "c.jsonl", ROWS))
    code, found = verified(source, "--verifier", "number", "--show", "2", capsys=capsys)
    assert code == 0
    wanted = {"correct": 2, "wrong": 1, "no_answer": 2, "unscorable": 1}
    assert {name: count for name, count in found["counts"].items() if count} == wanted
    assert found["shares"]["no_answer"] == pytest.approx(2 / 6)
    assert found["columns"] == {"completion": "completion", "gold": "gold"}
    assert [(row["where"], row["verdict"], row["answer"], row["gold"]) for row in found["listed"]] == [
        (f"{source}:2", "wrong", "2", "1"),
        (f"{source}:3", "no_answer", None, "0"),
    ]
    assert main(["verify", source, "--verifier", "number", "--show", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 rows (completion = column 'completion', gold = column 'gold')"
    assert lines[2].split() == ["correct", "2", "33.33%"]
    assert lines[-2:] == ["not correct, the first 1:", f"  {source}:2: wrong: '2' against '1'"]
    _, found = verified(source, "--verifier", "number", "--label-column", "ok", capsys=capsys)
    assert found["agree"] == 4
    assert [(row["where"], row["label"]) for row in found["listed"]] == [(f"{source}:2", True), (f"{source}:4", False)]
    write_jsonl(tmp_path / "c.jsonl", [{**ROWS[0], "ok": "perhaps"}])
    assert main(["verify", source, "--verifier", "number", "--label-column", "ok"]) == 1
    assert f"{source}:1: label 'perhaps', expected true, false or a number" in capsys.readouterr().err
    write_jsonl(tmp_path / "c.jsonl", [{"completion": [], "gold": "1"}])
    assert main(["verify", source, "--verifier", "number"]) == 1
    assert f"{source}:1: 'completion' is an empty list, expected a text or a list of texts" in capsys.readouterr().err


@pytest.mark.parametrize(("row", "columns"), cases("cli_verify", "columns"))
def test_columns_are_found(tmp_path, capsys, row, columns):
    _, found = verified(str(write_jsonl(tmp_path / "c.jsonl", [row])), "--verifier", "exact", capsys=capsys)
    assert found["columns"] == columns
    assert found["counts"]["correct"] == 1
    assert main(["verify", str(write_jsonl(tmp_path / "d.jsonl", [{"answer": "7"}]))]) == 1
    assert "no gold column" in capsys.readouterr().err


def test_golds_against_themselves(tmp_path, capsys):
    prose = "Yes, because every such triangle has two equal angles and so on"
    pairs = zip("qrst", ("7", prose, "odd", "odd"), strict=True)
    source = str(write_jsonl(tmp_path / "p.jsonl", [{"question": name, "answer": answer} for name, answer in pairs]))
    assert main(["verify", source, "--golds", "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "2 gold answers (50.00%) can only be compared as text: 'odd'" in printed
    assert "gold answers that do not grade as correct, the first 1:" in printed and f"{source}:2: unscorable" in printed
    assert main(["verify", source, "--golds", "--verifier", "exact"]) == 0


def test_user_functions_get_whole_completions_and_columns(tmp_path, capsys, monkeypatch):
    rows = [{"completion": "level", "gold": "x", "level": level} for level in ("hard", "easy")]
    rows += [{"completion": "raise", "gold": "x", "level": ""}]
    name = f"{FUNCTIONS}:obey"
    source = str(write_jsonl(tmp_path / "c.jsonl", rows))
    _, found = verified(source, "--verifier", name, "--workers", "1", capsys=capsys)
    assert (found["counts"]["correct"], found["counts"]["wrong"], found["counts"]["crashed"]) == (1, 1, 1)
    assert "KeyError" in found["last_error"]
    rows = [
        {"generations": [r"\boxed{2}", r"\boxed{3}"], "right": [True, True], "reward_model": {"ground_truth": "2"}},
        {"generations": [r"\boxed{4}"], "right": [True], "reward_model": {"ground_truth": "4"}},
    ]
    path = write_jsonl(tmp_path / "openr1.jsonl", rows)
    monkeypatch.setattr(grade, "BLOCK", 1)
    with VerifierPool("math", workers=1) as pool:
        grades = grade.grade_file(str(path), pool, {"label": "right"})
    assert (grades.counts[Verdict.CORRECT], grades.counts[Verdict.WRONG], grades.agree) == (2, 1, 2)
    assert [row["where"] for row in grades.listed] == [f"{path}:1[2]"]


def test_an_answer_cannot_move_the_cursor(tmp_path, capsys):
    source = str(write_jsonl(tmp_path / "c.jsonl", [*ROWS, {"completion": "\\boxed{\x1b[2J\u202e}", "gold": "1"}]))
    assert main(["verify", source, "--verifier", "number"]) == 0
    shown, said = capsys.readouterr()
    assert "[2J" in shown and said == ""
    assert "\x1b" not in shown and "\u202e" not in shown
