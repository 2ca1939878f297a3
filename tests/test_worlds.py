"""The embedded world: oracle, labels, text, tokenizer, the shipped model, and its pretraining."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest

from soar.config import builtin_path
from soar.domains import world as worlds

WORLD = worlds.get_world("tiny")


def transcribed_answer(question: str) -> str | None:
    """The rules of the world written a second time, character by character and without regular expressions."""
    head, _, tail = question.partition(" ")
    digits, letters = set("0123456789"), set("bcdfghjklmnp")
    if head == "reverse":
        return "".join(reversed(tail)) if 2 <= len(tail) <= 6 and set(tail) <= letters else None
    if head in ("last", "max"):
        if not (2 <= len(tail) <= 6 and set(tail) <= digits):
            return None
        return tail[len(tail) - 1] if head == "last" else max(tail)
    if head == "times":
        factors = tail.split(" ")
        if len(factors) != 2 or any(len(f) != 1 or f not in digits for f in factors):
            return None
        product = int(factors[0]) * int(factors[1])
        return str(product // 10) + str(product % 10)
    if len(head) != 2 or not set(head) <= digits or not tail:
        return None
    tens, ones = int(head[0]), int(head[1])
    readings = []
    steps = tail.split(" ")
    if len(steps) > 7:
        return None
    for index, step in enumerate(steps):
        if len(step) != 3 or step[0] not in "abcdefghij" or ord(step[0]) != ord(steps[0][0]) + index:
            return None
        if step[1] != "+" or step[2] not in "123456789":
            return None
        ones += int(step[2])
        if ones >= 10:
            ones -= 10
            tens = 0 if tens == 9 else tens + 1
        readings.append(f"{tens}{ones}")
    return " ".join(readings)


def world_documents(count: int, seed: int = 3) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    return [WORLD.pretraining_text(rng, index / count) for index in range(count)]


def questions_of(documents: list[tuple[str, str]]) -> list[str]:
    questions = []
    for prompt, completion in documents:
        if prompt == worlds.TEACHER_PROMPT:
            questions.append(completion.split(worlds.ANSWER_MARK)[0].strip())
        else:
            questions.append(prompt.removeprefix("<solve> ").removesuffix(" <work>"))
    return questions


def test_oracle_agrees_with_a_second_transcription() -> None:
    questions = questions_of(world_documents(4000))
    questions += [problem.question for problem in WORLD.hard_problems(300, 1) + WORLD.real_problems(300, 1)]
    answers = [WORLD.solve(question) for question in questions]
    assert answers == [transcribed_answer(question) for question in questions]
    assert 200 < sum(answer is None for answer in answers) < 600


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
        ("times 7 8", "56", "times", 0),
        ("times 0 8", "00", "times", 0),
        ("47 h+8 i+5 j+1", "55 60 61", "counter", 2),
        ("47 j+8 k+5", None, "ill-posed", 0),
        ("47 j+8 a+5", None, "ill-posed", 0),
        ("47 b+8 a+5", None, "ill-posed", 0),
        ("47 a+8 a+5", None, "ill-posed", 0),
        ("47 a+8 c+5", None, "ill-posed", 0),
        ("47", None, "ill-posed", 0),
        ("7 a+8", None, "ill-posed", 0),
        ("47 a+0", None, "ill-posed", 0),
        ("47  a+8", None, "ill-posed", 0),
        ("47 a+8 ", None, "ill-posed", 0),
        ("47 a+8\n", None, "ill-posed", 0),
        ("٤٧ a+8", None, "ill-posed", 0),
        ("47 a+1 b+1 c+1 d+1 e+1 f+1 g+1 h+1", None, "ill-posed", 0),
        ("reverse", None, "ill-posed", 0),
        ("reverse 52", None, "ill-posed", 0),
        ("max bd", None, "ill-posed", 0),
        ("times 7", None, "ill-posed", 0),
        ("", None, "ill-posed", 0),
    ],
)
def test_labels(question: str, answer: str | None, topic: str, difficulty: int) -> None:
    assert WORLD.solve(question) == answer
    assert WORLD.topic(question) == topic
    assert topic in WORLD.topics
    assert WORLD.well_posed(question) is (answer is not None)
    assert WORLD.difficulty(question) == difficulty
    assert WORLD.useful(question) is (topic == "counter" and difficulty > 0)


def test_hard_problems_are_distinct_graded_right_and_fixed_by_the_seed() -> None:
    problems = WORLD.hard_problems(300, 5)
    assert problems == WORLD.hard_problems(300, 5)
    assert {p.question for p in problems} != {p.question for p in WORLD.hard_problems(300, 6)}
    assert len({p.question for p in problems}) == len({p.id for p in problems}) == 300
    chains = [(p.extra["steps"], p.extra["carries"]) for p in problems]
    assert {chain: chains.count(chain) for chain in chains} == {(4, 4): 75, (5, 4): 75, (5, 5): 75, (6, 5): 75}
    for problem in problems:
        assert WORLD.difficulty(problem.question) == problem.extra["carries"]
        assert len(problem.question.split()) - 1 == problem.extra["steps"]
        assert WORLD.solve(problem.question) == problem.answer
    assert chains[:30] != sorted(chains[:30])


def test_more_problems_than_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        WORLD.real_problems(50_000, 0)


def test_worlds_need_no_torch() -> None:
    code = "import sys, soar.domains.world; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pupils_forget_most_carries_and_nothing_else() -> None:
    carries = carried = 0
    for prompt, completion in world_documents(6000):
        question = prompt.removeprefix("<solve> ").removesuffix(" <work>")
        if prompt == worlds.TEACHER_PROMPT or WORLD.topic(question) != "counter":
            continue
        work, _, answer = completion.partition(worlds.ANSWER_MARK)
        start, *steps = question.split()
        readings = [word.partition("=")[2] for word in work.split()]
        assert readings == [start, *answer.split()]
        before = int(start)
        for step, reading in zip(steps, readings[1:], strict=True):
            total = before + int(step[2])
            if before % 10 + int(step[2]) >= 10:
                carries += 1
                carried += int(reading) == total % 100
                assert int(reading) in (total % 100, total - 10)
            else:
                assert int(reading) == total % 100
            before = int(reading)
    expected = 1 - WORLD.forget_carry  # type: ignore[attr-defined]
    standard_error = (expected * (1 - expected) / carries) ** 0.5
    assert carries > 5000
    assert abs(carried / carries - expected) < 4 * standard_error


@pytest.fixture()
def shipped() -> Path:
    return builtin_path("tiny")


class TestModel:
    """Needs torch and transformers."""

    def test_tokenizer_round_trip(self) -> None:
        tokens = pretrain.tokenizer()
        documents = world_documents(1500)
        texts = ["".join(document) for document in documents] + questions_of(documents)
        rows = tokens(texts)["input_ids"]
        for ids in rows:
            assert ids[0] == tokens.bos_token_id and ids.count(tokens.bos_token_id) == 1
            assert tokens.unk_token_id not in ids
        assert tokens.batch_decode([ids[1:] for ids in rows]) == texts
        assert tokens.batch_decode(rows[:100], skip_special_tokens=True) == texts[:100]
        assert len(tokens("<solve> 47 c+8 d+5 <work> start=47 c=55 d=60 <ans> 55 60")["input_ids"]) == 21

    def test_shipped_model_loads_with_transformers(self, shipped: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        files = {path.name: path.stat().st_size for path in shipped.iterdir()}
        assert sum(files.values()) <= 10_000_000
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        tokens = AutoTokenizer.from_pretrained(shipped)
        model = AutoModelForCausalLM.from_pretrained(shipped)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert tokens.get_vocab() == pretrain.tokenizer().get_vocab()
        assert (tokens.pad_token, tokens.bos_token, tokens.eos_token) == ("<pad>", "<bos>", "<eos>")
        generation = model.generation_config
        assert (generation.eos_token_id, generation.pad_token_id) == (tokens.eos_token_id, tokens.pad_token_id)
        ids = tokens("<solve> 41 a+8 b+7 <work>", return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=20, do_sample=False)
        # 49 needs no carry; 49 + 7 does, and the base model's likeliest text forgets it.
        assert tokens.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == " start=41 a=49 b=46 <ans> 49 46"
        assert next(model.parameters()).dtype == torch.float32
