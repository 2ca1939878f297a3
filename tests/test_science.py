"""Science: quantities with units, multiple choice, and the generated exercises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tables import cases

from soar.config import ProblemsConfig, load
from soar.domains import choice as choices
from soar.domains.candidates import candidates
from soar.domains.choice import Choices, arrange, read_choices, read_letter
from soar.domains.quantities import compare_quantities, read_gold, read_quantity, read_unit
from soar.problems.domain import DomainError, domain_of, load_domain
from soar.problems.pool import VerifierPool
from soar.types import Problem, Rejection, Verdict

STYLES = dict.fromkeys(("science", "procedural"), ("tags", "plain", "list")) | {"multiple_choice": ("tags", "plain")}
C, W = Verdict.CORRECT, Verdict.WRONG


@pytest.mark.parametrize(("answer", "gold", "verdict"), [*cases("science", "quantity"), ("9" * 500, "3 m", "wrong")])
def test_quantities(answer: str, gold: str, verdict: str) -> None:
    assert compare_quantities(answer, gold).value == verdict


def test_reading() -> None:
    found = read_quantity("0.0450 kg m/s")
    assert found is not None
    assert (found.value, found.figures, found.step) == (0.045, (3, 3), 1e-4)
    assert str(found.unit) == "kilogram * meter / second"
    figures = {text: q.figures for text in ("1500", "1500.", "1.50e3", "0.05") if (q := read_quantity(text))}
    assert figures == {"1500": (2, 4), "1500.": (2, 4), "1.50e3": (3, 3), "0.05": (1, 1)}
    assert str(read_unit("J/(mol K)")) == "joule / kelvin / mole"
    assert read_gold("5 m [soon]") is read_gold("5 m [3 sf") is read_quantity("5 parrots") is None
    assert compare_quantities("5 m", "tall") is Verdict.UNSCORABLE


METALS = Choices("Which metal?", ("iron", "copper", "a noble gas", "gold"))


@pytest.mark.parametrize(("answer", "letter"), cases("science", "letter"))
def test_letters(answer: str, letter: str | None) -> None:
    assert read_letter(answer, METALS) == letter


def test_completions_commit_in_several_ways() -> None:
    said = [r"so \boxed{B}", "Answer: (B)", "I say the answer is B.\nOk", "no idea"]
    assert [choices.read_answer(text) for text in said] == ["B", "(B)", "B.", None]


def question(*options: str, stem: str = "What is it?") -> str:
    return "\n".join([stem, *(f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))])


@pytest.mark.parametrize(("text", "answer", "name"), cases("science", "degenerate"))
def test_degenerate_questions_are_named(text: str, answer: str, name: str) -> None:
    assert arrange(Problem("p", text, answer)) == name


def test_options_are_shuffled_and_the_same_for_every_order_they_came_in() -> None:
    made = [arrange(Problem("p", question("iron", "copper", "tin", "none of the above"), answer)) for answer in "ABCD"]
    assert all(isinstance(p, Problem) for p in made)
    problems: list[Any] = made
    assert len({p.question for p in problems}) == 1 and problems[3].answer == "D", "stays last"
    assert sorted(p.answer for p in problems) == ["A", "B", "C", "D"]
    other: Any = arrange(Problem("p", question("tin", "iron", "none of the above", "copper"), "copper"))
    assert (other.question, other.answer) == (problems[1].question, problems[1].answer)
    assert arrange(other) == other
    assert [choices.verify(text, other) for text in ("copper", "tin", "A or B")] == [C, W, Verdict.NO_ANSWER]
    column: Any = arrange(Problem("p", "What is it?", "2", {"options": ["tin", "iron", "copper"], "level": 1}))
    assert read_choices(column.question) != "no_options"
    assert choices.verify("copper", column) is C and column.extra == {"level": 1}


def test_the_place_of_the_right_option_cannot_be_learned() -> None:
    """The teacher always writes the right option first; afterwards every letter is right about equally often."""
    texts = [question("yes", "no", "maybe", "later", stem=f"Question {i}?") for i in range(400)]
    counts = Counter(p.answer for text in texts if isinstance(p := arrange(Problem("p", text, "A")), Problem))
    assert sum((counts[letter] - 100) ** 2 / 100 for letter in "ABCD") < 16.3  # chi squared, p = 0.001


def test_written_questions_are_shuffled_or_rejected() -> None:
    def text(body: str, answer: str) -> str:
        return f"<question>\n{body}\n</question>\n<answer>\n\\boxed{{{answer}}}\n</answer>"

    bodies = [question("iron", "copper", "tin"), "What is it?", question("iron", "iron")]
    with VerifierPool(load_domain("multiple_choice"), workers=1) as pool:
        found = pool.read_problems([text(bodies[0], "B"), text(bodies[1], "B"), text(bodies[2], "A")], [False] * 3)
        assert isinstance(found[0], Problem)
        assert [f.name for f in found if isinstance(f, Rejection)] == ["no_options", "duplicate_options"]
        told = [r"\boxed{copper}", r"\boxed{A or B}", "nothing"]
        verdicts = pool.check(told, [found[0].answer] * 3, {"question": [found[0].question] * 3})
        assert verdicts == [C, Verdict.NO_ANSWER, Verdict.NO_ANSWER]


def test_a_file_of_choices_loses_what_cannot_be_used_by_name(tmp_path: Path) -> None:
    path = tmp_path / "choices.jsonl"
    rows = ['{"question": "Q1?", "answer": "yes", "options": ["yes", "no"]}', '{"question": "Q2?", "answer": "no"}']
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    loaded = candidates(load("small-1gpu", [f"problems.source={path}", "problems.domain=multiple_choice"]))
    assert len(loaded.problems) == 1
    assert "domain multiple_choice: no_options" in str(loaded.report.dropped[0])


@pytest.mark.parametrize("name", ["code", *(f"{name}/{style}" for name, styles in STYLES.items() for style in styles)])
def test_every_built_in_domain_verifies_its_examples(name: str) -> None:
    domain = load_domain(name)
    assert domain.name == name.partition("/")[0]
    assert domain.verify is not None
    for problem in domain.examples:
        made = domain.arrange(problem) if domain.arrange else problem
        assert isinstance(made, Problem)
        assert name == "code" or domain.verify(made.answer, made) is C  # code: see test_coding.py
        assert domain.validate is None or domain.validate(made) is None


@pytest.mark.parametrize(("keys", "message"), cases("science", "style"))
def test_a_style_that_a_domain_lacks_is_refused(keys: dict[str, str], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        domain_of(ProblemsConfig(**keys))  # type: ignore[arg-type]
