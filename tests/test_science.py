"""The domains `science` and `procedural`, and the one of examples/multiple_choice.py. The embedded world: oracle, labels, the
shipped model and its pretraining."""

import json
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
from helpers import ROOT
from multiple_choice import arrange
from multiple_choice import verify as verify_choice
from tables import cases

from soar.config import load, resolve_path
from soar.domains import procedural
from soar.domains import world as worlds
from soar.domains.candidates import candidates
from soar.domains.procedural import compare, kind_of
from soar.domains.science import compare_quantities, read_gold, read_quantity, read_unit
from soar.problems.domain import load_domain
from soar.problems.load import load_problems
from soar.problems.pool import VerifierPool
from soar.types import Problem, Rejection, Verdict

C, W = Verdict.CORRECT, Verdict.WRONG


@pytest.mark.parametrize(("answer", "gold", "verdict"), [*cases("science", "quantity"), ("9" * 500, "3 m", "wrong")])
def test_quantities(answer, gold, verdict):
    assert compare_quantities(answer, gold).value == verdict


def test_reading():
    found = read_quantity("0.0450 kg m/s")
    assert found is not None
    assert (found.value, found.step) == (0.045, 1e-4)
    assert str(found.unit) == "kilogram * meter / second"
    steps = {text: q.step for text in ("1500", "1.50e3", "0.05") if (q := read_quantity(text))}
    assert steps == {"1500": 0, "1.50e3": 10, "0.05": 0}
    assert str(read_unit("J/(mol K)")) == "joule / kelvin / mole"
    assert read_gold("5 m [soon]") is read_gold("5 m [3 %") is read_quantity("5 parrots") is None
    assert compare_quantities("5 m", "tall") is Verdict.UNSCORABLE


def question(*options: str, stem: str = "What is it?") -> str:
    return "\n".join([stem, *(f"{letter}) {option}" for letter, option in zip("ABCDEFGHIJ", options, strict=False))])


def test_options_are_shuffled_and_the_same_for_every_order_they_came_in():
    made = [arrange(Problem("p", question("iron", "copper", "tin", "none of the above"), answer)) for answer in "ABCD"]
    assert all(isinstance(p, Problem) for p in made)
    problems: list[Any] = made
    assert len({p.question for p in problems}) == 1 and problems[3].answer == "D", "stays last"
    assert sorted(p.answer for p in problems) == ["A", "B", "C", "D"]
    other: Any = arrange(Problem("p", question("tin", "iron", "none of the above", "copper"), "copper"))
    assert (other.question, other.answer) == (problems[1].question, problems[1].answer)
    assert arrange(other) == other
    assert [verify_choice(text, other) for text in ("copper", "tin", "A or B")] == [C, W, Verdict.NO_ANSWER]


def test_multiple_choice_is_loaded_like_any_file(tmp_path):
    domain, path = f"{ROOT / 'examples' / 'multiple_choice.py'}:DOMAIN", tmp_path / "choices.jsonl"
    rows = ['{"question": "Q1?", "answer": "1", "options": ["yes", "no"]}', '{"question": "Q2?", "answer": "no"}']
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    loaded = candidates(load("small-1gpu", [f"problems.source={path}", f"problems.domain={domain}"]))
    assert len(loaded.problems) == 1 and "no_options" in str(loaded.report.dropped[0])
    texts = [
        f"<question>\n{body}\n</question>\n<answer>\n\\boxed{{B}}\n</answer>"
        for body in (question("iron", "copper"), question("iron", "iron"))
    ]
    with VerifierPool(load_domain(domain), workers=1) as pool:
        good, bad = pool.read_problems(texts, [False] * 2)
        assert isinstance(good, Problem) and isinstance(bad, Rejection) and bad.name == "duplicate_options"
        told = [r"\boxed{copper}", "the answer is iron", r"\boxed{A or B}", "nothing"]
        verdicts = pool.check(told, [good.answer] * 4, {"question": [good.question] * 4})
        assert verdicts == [C, W, Verdict.NO_ANSWER, Verdict.NO_ANSWER]


@pytest.mark.parametrize("name", ["code", "science", "procedural"])
def test_every_built_in_domain_verifies_its_examples(name):
    domain = load_domain(name)
    assert domain.name == name
    assert domain.verify is not None
    for problem in domain.examples:
        assert name == "code" or domain.verify(problem.answer, problem) is C  # code: see test_coding.py
        assert domain.validate is None or domain.validate(problem) is None


@pytest.mark.parametrize(("answer", "gold", "verdict"), cases("procedural", "compared"))
def test_comparison(answer, gold, verdict):
    assert compare(answer, gold).value == verdict


def problem(family: str, answer: str = "7", **metadata: Any) -> Problem:
    return Problem("p", "q", answer, {"family": family, "metadata": json.dumps(metadata)})


def test_families_are_graded_by_us_by_their_scorer_or_refused_by_name(monkeypatch):
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


def test_real_families():
    pytest.importorskip("reasoning_gym")
    problems, _ = load_problems("reasoning_gym:chain_sum", limit=3, seed=1, options={"min_terms": 6, "max_terms": 6})
    assert all(p.question.count("+") + p.question.count(" - ") >= 4 for p in problems)
    jugs, _ = load_problems("reasoning_gym:jugs", limit=2, seed=1)
    assert all(procedural.validate(p) is None for p in jugs) and procedural.verify("[]", jugs[0]) is W


WORLD = worlds.get_world("tiny")


@pytest.mark.parametrize(("question", "answer", "topic", "difficulty"), cases("worlds", "label"))
def test_labels(question, answer, topic, difficulty):
    assert (WORLD.solve(question), WORLD.topic(question)) == (answer, topic)
    assert (WORLD.well_posed(question), WORLD.difficulty(question)) == (answer is not None, difficulty)


def test_hard_problems_are_distinct_graded_right_and_fixed_by_the_seed():
    problems = WORLD.hard_problems(300, 5)
    assert problems == worlds.get_world("tiny-rare").hard_problems(300, 5)
    assert {p.question for p in problems} != {p.question for p in WORLD.hard_problems(300, 6)}
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 300
    chains = [(p.extra["steps"], p.extra["carries"]) for p in problems]
    assert {chain: chains.count(chain) for chain in chains} == {(4, 4): 75, (5, 4): 75, (5, 5): 75, (6, 5): 75}
    for problem in problems:
        assert WORLD.difficulty(problem.question) == problem.extra["carries"]
        assert WORLD.solve(problem.question) == problem.answer
    with pytest.raises(ValueError, match="ask for fewer"):
        WORLD.real_problems(50_000, 0)


def test_shipped_model_loads_with_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(resolve_path("builtin:tiny"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000_000
    tokens = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert tokens.get_vocab() == pretrain.tokenizer().get_vocab()
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokens.eos_token_id, tokens.pad_token_id)
    ids = tokens("<solve> 41 a+8 b+7 <work>", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=20, do_sample=False)
    # 49 needs no carry; 49 + 7 does, and the base model's likeliest text forgets it.
    assert tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == " start=41 a=49 b=46 <ans> 49 46"
    assert next(model.parameters()).dtype == torch.float32
