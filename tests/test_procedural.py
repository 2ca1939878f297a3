"""Procedural problems: comparison by value or as text, families by how they are graded, the scorer in its worker."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tables import cases

from soar.domains import procedural
from soar.domains.procedural import compare, kind_of
from soar.problems.domain import load_domain
from soar.problems.load import load_problems
from soar.problems.pool import VerifierPool
from soar.types import Problem, Verdict

C, W = Verdict.CORRECT, Verdict.WRONG


@pytest.mark.parametrize(("answer", "gold", "verdict"), cases("procedural", "compared"))
def test_comparison(answer: str, gold: str, verdict: str) -> None:
    assert compare(answer, gold).value == verdict


def problem(family: str, answer: str = "7", **metadata: Any) -> Problem:
    return Problem("p", "q", answer, {"family": family, "metadata": json.dumps(metadata)})


def test_families_are_graded_by_us_by_their_scorer_or_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ["compared", "compared", "scorer", "refused"]
    assert [kind_of(name) for name in ("chain_sum", "sudoku", "jugs", "countdown")] == kinds
    assert procedural.verify("7", Problem("p", "q", "7", {"family": "jugs"})) is Verdict.UNSCORABLE  # no metadata
    assert procedural.validate(problem("chain_sum")) is procedural.validate(Problem("p", "q", "7")) is None
    assert procedural.validate(problem("countdown")) == "scorer_runs_text"
    assert procedural.verify("7", problem("countdown")) is Verdict.UNSCORABLE

    def score(answer: str, entry: dict[str, Any]) -> float:
        return {"good": 1.0, "half": 0.5}.get(answer, 0.0) if entry["metadata"] == {"size": 3} else -1.0

    monkeypatch.setattr(procedural, "_scorer", lambda family: {"jugs": score}[family])
    verdicts = [procedural.verify(text, problem("jugs", "good", size=3)) for text in ("good", "half", "bad")]
    assert verdicts == [C, W, W]
    assert procedural.validate(problem("jugs", "good", size=3)) is None
    assert procedural.validate(problem("jugs", "bad", size=3)) == "gold_answer_refused"
    assert procedural.verify("8", problem("chain_sum")) is W  # not asked: our own comparison can grade it


def test_written_puzzles_are_compared_without_a_family() -> None:
    with VerifierPool(load_domain("procedural"), workers=1) as pool:
        pair = "<question>Sort c, b, a.</question><answer>\\boxed{a, b, c}</answer>"
        good, bad = pool.read_problems([pair, pair.replace("a, b, c", "...")], [False, False])
        assert isinstance(good, Problem)
        assert not isinstance(bad, Problem) and bad.name == "placeholder"
        assert pool.check(["\\boxed{a b c}", "\\boxed{c b a}"], [good.answer] * 2) == [C, W]


def test_real_families() -> None:
    pytest.importorskip("reasoning_gym")
    problems, _ = load_problems("reasoning_gym:chain_sum", limit=3, seed=1, options={"min_terms": 6, "max_terms": 6})
    assert all(p.question.count("+") + p.question.count(" - ") >= 4 for p in problems)
    jugs, _ = load_problems("reasoning_gym:jugs", limit=2, seed=1)
    assert all(procedural.validate(p) is None for p in jugs) and procedural.verify("[]", jugs[0]) is W
