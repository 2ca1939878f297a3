"""The embedded world: oracle, labels, text, tokenizer, the shipped models, and their pretraining."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pretrain
import pytest
import torch
from world_text import WorldText

from soar.config import builtin_path, load
from soar.domains import world as worlds
from soar.loop.write import teacher_prompt
from soar.problems.parse import parse_all
from soar.run.setup import open_env
from soar.types import Problem

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
    for index, step in enumerate(steps):
        if len(step) != 3 or step[0] not in "abcdefghij" or ord(step[0]) != ord(steps[0][0]) + index:
            return None
        if step[1] != "+" or step[2] not in "123456789" or index > 6:
            return None
        ones += int(step[2])
        if ones >= 10:
            ones -= 10
            tens = 0 if tens == 9 else tens + 1
        readings.append(f"{tens}{ones}")
    return " ".join(readings)


def documents(count: int, world: str = "tiny") -> list[tuple[str, str, str]]:
    """(question, prompt, completion) of a world's pretraining text."""
    text, rng = WorldText(world), random.Random(3)
    rows = [text.document(rng, index / count) for index in range(count)]
    return [(b.split(worlds.ANSWER_MARK)[0].strip() if a == worlds.TEACHER_PROMPT else a[8:-7], a, b) for a, b in rows]


def test_oracle_agrees_with_a_second_transcription() -> None:
    questions = [question for question, _, _ in documents(4000)]
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
    assert WORLD.well_posed(question) is (answer is not None)
    assert WORLD.difficulty(question) == difficulty
    assert WORLD.useful(question) is (topic == "counter" and difficulty > 0)


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


def test_worlds_need_no_torch() -> None:
    code = "import sys, soar.domains.world; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pupils_forget_most_carries_and_nothing_else() -> None:
    carries = carried = 0
    for question, prompt, completion in documents(6000):
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
    share = 1 - WorldText("tiny").shares.forget_carry
    assert carries > 5000
    assert abs(carried / carries - share) < 4 * (share * (1 - share) / carries) ** 0.5


def test_tokenizer_round_trip() -> None:
    tokens = pretrain.tokenizer()
    rows = documents(1500)
    texts = [a + b for _, a, b in rows] + [question for question, _, _ in rows]
    ids_N = tokens(texts)["input_ids"]
    for ids in ids_N:
        assert ids[0] == tokens.bos_token_id and ids.count(tokens.bos_token_id) == 1
        assert tokens.unk_token_id not in ids
    assert tokens.batch_decode([ids[1:] for ids in ids_N]) == texts
    assert tokens.batch_decode(ids_N[:100], skip_special_tokens=True) == texts[:100]


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


def test_the_untrained_teacher_of_tiny_rare_seldom_asks_a_useful_question() -> None:
    shares = {}
    for recipe in ("tiny-rare", "tiny"):
        asked = [question for question, prompt, _ in documents(4000, recipe) if prompt == worlds.TEACHER_PROMPT]
        config = load(recipe, ["threads=1", "model.device=cpu"])
        with open_env(config) as env:
            prompt = teacher_prompt(env, config)
            rollouts = env.sampler.sample(None, [[prompt]], 600, [[1]], config.teacher.sampling)
            cut = [not ended for ended in rollouts.ended_B.tolist()]
            pairs = parse_all(rollouts.texts(env.backbone), env.fmt, env.verifier, truncated=cut)
        useful = [p for p in pairs if isinstance(p, Problem) and WORLD.useful(p.question)]
        shares[recipe] = sum(map(WORLD.useful, asked)) / len(asked), len(useful) / len(pairs)
        assert sum(WORLD.solve(p.question) == p.answer for p in useful) / len(useful) > 0.5
    assert shares["tiny-rare"][0] < 0.5 * shares["tiny"][0]
    assert 0.09 < shares["tiny-rare"][1] < 0.18 < 0.35 < shares["tiny"][1]


def test_pretraining_is_reproducible_and_learns(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = {"steps": 25, "rows": 8, "width": 32, "layers": 1, "hidden": 48, "warmup_steps": 5}
        losses = [pretrain.build(tmp_path / name, 3, **size) for name in ("a", "b")]
    finally:
        torch.set_num_threads(threads)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert one == two and losses[0] == losses[1]
    assert sum(losses[0][-5:]) / 5 < 0.8 * losses[0][0]
