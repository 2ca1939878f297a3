"""`soar screen`: its files, its table, that it goes on after any interruption, and that a run uses its evidence."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from loop_helpers import TINY, easy_problems, events, read_jsonl, sets, tiny_config
from run_folders import write_jsonl

from soar.cli import main
from soar.domains.world import get_world
from soar.run import screen as hardset
from soar.run.screen import screen_event, table_lines, what_fits
from soar.types import Screening

OWN = ("problems.limit", "screen.")
SETS = sets(*(override for override in TINY if not override.startswith(OWN)))
HARD_ONLY = ["--set", "screen.max_successes=0"]
FILES = ("hard.jsonl", "hard.jsonl.evidence.json", "hard/screen.jsonl", "screen.json", "table.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of problems of which the embedded model solves some and others not."""
    problems = [*easy_problems(12), *get_world("tiny").hard_problems(8, 0)]
    rows = [{"uid": p.id, "task": p.question, "gold": p.answer, "level": i % 3} for i, p in enumerate(problems)]
    return write_jsonl(tmp_path_factory.mktemp("source") / "p.jsonl", rows)


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    names = ["--set", "problems.question_column=task", "--set", "problems.answer_column=gold"]
    words = ["screen", "--problems", str(source), "--out", str(out), *SETS, *names, *HARD_ONLY]
    return [*words, "--attempts", "40", *more]


@pytest.fixture(scope="module")
def screened(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished screening. Change nothing in it."""
    out = tmp_path_factory.mktemp("screened") / "out"
    assert main([*arguments(source, out), "tiny", "--quiet"]) == 0
    return out


def test_files_and_table(source, screened, capsys):
    rows = read_jsonl(screened / "hard" / "screen.jsonl")
    assert rows[0]["evidence"]["attempts"] == 40 and len(rows) == 1 + 3 * 20
    last = {row["id"]: row for row in rows[1:]}  # of three waves
    hard = read_jsonl(screened / "hard.jsonl")
    assert [row["id"] for row in hard] == [name for name, row in last.items() if row["successes"] == 0]
    assert 8 <= len(hard) < 20 and {row["attempts"] for row in hard} == {40}
    assert {"level", "question", "answer"} < set(hard[0])
    assert json.loads((screened / "hard.jsonl.evidence.json").read_text()) == rows[0]["evidence"]
    event = json.loads((screened / "screen.json").read_text())
    assert (event["candidates"], event["hard"]) == (20, len(hard))
    table = (screened / "table.txt").read_text().splitlines()
    assert table[0] == "20 problems, 40 attempts each (temperature 1.0, at most 48 tokens)"
    assert main([*arguments(source, screened, "--resume"), "tiny"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(table)] == table
    command = shlex.split(printed[-1].removeprefix("next: "))
    assert command[:3] == ["soar", "run", "tiny"] and "problems.question_column=task" not in command
    assert {"screen.attempts=40", "screen.max_successes=0", str(screened / "hard.jsonl")} < set(command)


def test_an_interrupted_screening_ends_like_a_straight_one(source, screened, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", hardset.screen_call

    def interrupted(*given: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(hardset, "screen_call", interrupted)
        assert main([*arguments(source, out), "tiny", "--quiet"]) == 128 + signal.SIGTERM
    command = shlex.join(["soar", *arguments(source, out), "tiny", "--quiet", "--resume"])
    assert f"soar: stopped by SIGTERM; everything is saved. Continue with: {command}\n" in capsys.readouterr().err
    assert not (out / "table.txt").exists()
    assert main([*arguments(source, out, "--resume"), "tiny", "--quiet"]) == 0
    for name in FILES:
        assert (out / name).read_bytes() == (screened / name).read_bytes(), name


def test_a_run_uses_the_evidence(screened, tmp_path, monkeypatch):
    monkeypatch.setattr(hardset, "screen", lambda *given: pytest.fail("screened again"))
    words = ["run", "tiny", "--quiet", "--problems", str(screened / "hard.jsonl"), "--out", str(tmp_path / "run")]
    short = ["teacher.steps=1", "arms.run=[]", "screen.attempts=40", "problems.question_column=task", "seed=3"]
    assert main([*words, *SETS, *HARD_ONLY, *sets(*short)]) == 0
    (event,) = events(tmp_path / "run", "screen")
    hard = read_jsonl(screened / "hard.jsonl")
    assert (event["hard"], event["candidates"], event["frac_all_wrong"]) == (len(hard), len(hard), 1.0)
    rows = [row for half in ("train", "test") for row in read_jsonl(tmp_path / "run" / "hard" / f"{half}.jsonl")]
    assert {(row["id"], row["attempts"]) for row in rows} == {(row["id"], 40) for row in hard}
    copied = (tmp_path / "run" / "hard" / "train.jsonl.evidence.json").read_bytes()
    assert copied == (screened / "hard.jsonl.evidence.json").read_bytes()


def test_words_for_what_plain_rl_sees():
    def words(counts: list[int], **event: float) -> str:
        config = tiny_config("screen.attempts=100", "screen.max_successes=0", "student.attempts=4")
        rows = {str(i): Screening(count, 100) for i, count in enumerate(counts)}
        return "\n".join(table_lines({**screen_event(rows, config), **event}, config))

    assert "no learning signal: nearly every group is all wrong" in words([0] * 99 + [1])
    assert "no learning signal: nearly every group is all right, the problems are solved" in words([100] * 10)
    assert "43.8% with a learning signal" in words([50] * 5 + [0] * 5)
    assert "raise student.sampling.max_tokens (now 48)" in words([0] * 10, truncated_share=0.6)
    config = tiny_config("student.prompts_per_step=8", "student.attempts=32", "arms.steps=1000")
    assert what_fits(0.9, config).startswith("try first: harder problems")
    budget = "in the planned budget 1,000 of 256,000 attempts of plain RL are expected to be correct, 1 a step"
    assert what_fits(1 / 256, config) == f"try first: plain RL, the arm hard_only: {budget}"
    assert what_fits(0.001, config, 31).startswith("try first: ps and pq of SOAR: ")
    easier = "try first: solvable (the easier candidates first), beside ps and pq"
    assert what_fits(0.001, config, 32).startswith(easier)


def test_golds_that_are_no_values_are_left_out_counted_and_named(tmp_path, capsys):
    golds = ["7", "1/2", "x+1", "(1, 2)", "isosceles triangle", "Monday", "proof"]
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": g, "question": f"q {g}", "answer": g} for g in golds])
    words = ["screen", "tiny", "--problems", str(path), "--verifier", "math", "--attempts", "1", *SETS]
    for kept, more in ((4, []), (6, ["--set", "screen.text_golds=true"])):
        assert main([*words, *more, "--out", str(tmp_path / str(kept))]) == 0
        event, shown = json.loads((tmp_path / str(kept) / "screen.json").read_text()), capsys.readouterr()
        assert (event["candidates"], event["text_golds"], event["ungradable"]) == (kept, 0 if more else 2, 1)
        assert "the gold answer of Monday can only be compared as text: 'Monday'" in shown.err
        assert "the gold answer of proof cannot be graded: 'proof'" in shown.err
        assert ("2 whose gold answer can only be compared as text" in shown.out) == (not more)
    assert main(["verify", str(path), "--golds"]) == 1
    assert "2 gold answers (28.57%) can only be compared as text" in capsys.readouterr().out
