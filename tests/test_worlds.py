"""The embedded world: oracle, labels, the shipped model and its pretraining."""

from __future__ import annotations

import pretrain
import pytest
import torch

from soar.config import builtin_path
from soar.domains import world as worlds

WORLD = worlds.get_world("tiny")


@pytest.mark.parametrize(
    ("question", "answer", "topic", "difficulty"),
    [
        ("47 a+8 b+5", "55 60", "counter", 2),
        ("47 a+1 b+5", "48 53", "counter", 1),
        ("40 a+1", "41", "counter", 0),
        ("99 a+9 b+9", "08 17", "counter", 2),
        ("03 a+7 b+9 c+1 d+1 e+9 f+9", "10 19 20 21 30 39", "counter", 3),
        ("reverse bdk", "kdb", "reverse", 0),
        ("last 5204", "4", "last", 0),
        ("max 5204", "5", "max", 0),
        ("times 0 8", "00", "times", 0),
        ("47 h+8 i+5 j+1", "55 60 61", "counter", 2),
        *[
            (text, None, "ill-posed", 0)
            for text in (
                "47 j+8 k+5", "47 j+8 a+5", "47 b+8 a+5", "47 a+8 a+5", "47 a+8 c+5", "47", "7 a+8", "47 a+0",
                "47  a+8", "47 a+8 ", "47 a+8\n", "٤٧ a+8", "47 a+1 b+1 c+1 d+1 e+1 f+1 g+1 h+1", "reverse", "reverse 52",
                "max bd", "times 7", "",
            )
        ],
    ],
)  # fmt: skip
def test_labels(question: str, answer: str | None, topic: str, difficulty: int) -> None:
    assert (WORLD.solve(question), WORLD.topic(question)) == (answer, topic)
    assert (WORLD.well_posed(question), WORLD.difficulty(question)) == (answer is not None, difficulty)
    assert WORLD.useful(question) is (difficulty > 0)


def test_hard_problems_are_distinct_graded_right_and_fixed_by_the_seed() -> None:
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


def test_shipped_model_loads_with_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = builtin_path("tiny")
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
