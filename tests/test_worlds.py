"""The embedded world: oracle, labels, the shipped model and its pretraining."""

from pathlib import Path

import pretrain
import pytest
import torch
from tables import cases

from soar.config import resolve_path
from soar.domains import world as worlds

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
