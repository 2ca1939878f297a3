"""Procedural problems: comparison by value or as text, families by how they are graded, the scorer in its worker."""

from __future__ import annotations

import json
from typing import Any

import pytest

from soar.domains import procedural
from soar.domains.procedural import EVALUATES, NUMBERS, TEXTS, compare, kind_of, read_marked
from soar.problems.domain import load_domain
from soar.problems.pool import VerifierPool
from soar.types import Problem, Verdict

C, W = Verdict.CORRECT, Verdict.WRONG


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("-14282", "-14,282", C),
        ("it is 62.", "62", C),
        ("2.50", "2.5", C),
        ("63", "62", W),
        ("1 0 1\n0 1 0", "[[1, 0, 1], [0, 1, 0]]", C),
        ("1 0 1\n0 1 1", "1 0 1\n0 1 0", W),
        ("Hart, find, inform", "hart find inform", C),
        ("find, Hart, inform", "Hart, find, inform", W),
        ("yes", "Yes", C),
        ("", "Yes", W),
        ("Yes Yes", "Yes", W),
    ],
)
def test_comparison(answer: str, gold: str, verdict: Verdict) -> None:
    assert compare(answer, gold) is verdict


def test_families_have_one_kind_each() -> None:
    assert not NUMBERS & TEXTS
    assert [kind_of(name) for name in ("chain_sum", "sudoku", "jugs", "countdown")] == [
        "number",
        "text",
        "scorer",
        "refused",
    ]
    assert {
        "spiral_matrix",
        "binary_matrix",
        "string_insertion",
    } <= EVALUATES & TEXTS  # our own comparison needs no scorer


def test_a_grid_is_an_answer_of_several_lines() -> None:
    assert read_marked("so\nAnswer:\n1 2\n3 4\n\nThat is it") == "1 2\n3 4"
    assert read_marked(r"Answer: \boxed{7}") == "7"
    assert read_marked("Answer:") is None
    assert read_marked("none") is None


def problem(family: str, answer: str = "7", **metadata: Any) -> Problem:
    return Problem("p", "q", answer, {"family": family, "metadata": json.dumps(metadata)})


def test_families_that_cannot_be_graded_are_refused_by_name() -> None:
    assert procedural.verify("7", Problem("p", "q", "7", {"family": "jugs"})) is Verdict.UNSCORABLE  # no metadata
    assert procedural.validate(problem("chain_sum")) is None
    assert procedural.validate(Problem("p", "q", "7")) is None
    assert procedural.validate(problem("countdown")) == "scorer_runs_text"
    assert procedural.verify("7", problem("countdown")) is Verdict.UNSCORABLE


def test_the_scorer_of_a_family_decides_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    def score(answer: str, entry: dict[str, Any]) -> float:
        return {"good": 1.0, "half": 0.5}.get(answer, 0.0) if entry["metadata"] == {"size": 3} else -1.0

    monkeypatch.setattr(procedural, "_scorer", lambda family: {"jugs": score}[family])
    found = [procedural.verify(text, problem("jugs", "good", size=3)) for text in ("good", "half", "bad")]
    assert found == [C, W, W]
    assert procedural.validate(problem("jugs", "good", size=3)) is None
    assert procedural.validate(problem("jugs", "bad", size=3)) == "gold_answer_refused"
    assert procedural.verify("8", problem("chain_sum")) is W  # not asked: our own comparison can grade it


def test_written_puzzles_are_compared_without_a_family() -> None:
    with VerifierPool(load_domain("procedural/plain"), workers=1) as pool:
        found = pool.read_problems([" Sort c, b, a.\nAnswer: a, b, c", " What?\nAnswer: ..."], [False, False])
        assert isinstance(found[0], Problem)
        assert not isinstance(found[1], Problem) and found[1].name == "placeholder"
        assert pool.check(["Answer: a b c", "Answer: c b a"], [found[0].answer] * 2) == [C, W]


def test_real_families(tmp_path: Any) -> None:
    pytest.importorskip("reasoning_gym")
    from soar.problems.load import load_problems

    problems, _ = load_problems("reasoning_gym:chain_sum", limit=3, seed=1, options={"min_terms": 6, "max_terms": 6})
    assert all(p.question.count("+") + p.question.count(" - ") >= 4 for p in problems)
    assert all(procedural.verify(p.answer, p) is C for p in problems)
    jugs, _ = load_problems("reasoning_gym:jugs", limit=2, seed=1)
    assert all(procedural.validate(p) is None for p in jugs)
    assert procedural.verify("[]", jugs[0]) is W
