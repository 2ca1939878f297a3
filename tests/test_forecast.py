"""The forecast: counts and seconds by hand, the table of rates, memory from real files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import tiny_config
from safetensors.torch import save_file

from soar.cli import main
from soar.config import ConfigError, load
from soar.engine import load as memory
from soar.engine.load import LLAMA, named_size
from soar.plan import forecast
from soar.plan import forecast as workload
from soar.plan.forecast import (
    KL_FACTOR,
    PAPER_HOURS,
    Assumptions,
    Rates,
    assumed,
    table_forecast,
    table_rates,
)
from soar.problems.load import split_source

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {
    "candidates": 40.0, "hard_share": 0.5, "texts_per_pair": 2.0, "teacher_prompt_tokens": 10.0, "teacher_tokens": 20.0,
    "question_prompt_tokens": 5.0, "question_tokens": 15.0, "hard_prompt_tokens": 7.0, "hard_tokens": 30.0,
    "reward_tokens": 0.0,
    "question_gradient_share": 0.5, "hard_gradient_share": 0.25, "promotions": 0.0,
}  # fmt: skip
KNOWN = Assumptions().with_values(NUMBERS, "given")
FIXED = ("student.extra_steps_per_promotion=0", "arms.steps=10", "arms.pq_steps=6", "arms.pq_mode=curriculum")


def test_counts_by_hand() -> None:
    # 40 candidates x 4 attempts; 20 hard, 10 to train. 2 steps of 3 x 4 pairs and 6 students of 2 steps x 2 x 4 rollouts;
    # 4 reward questions x 2 for each, the baseline 3 at each of 8 questions asked; 4 arms x 10 held out x 4.
    config = tiny_config(*FIXED, "arms.curriculum_steps=2")
    works = {w.name: (w.rollouts, w.sampled, w.trained) for w in workload.workload(config, KNOWN)}
    measured = 12 * 4 * 2 + 3 * 8
    assert works == {
        "screening": (160, 160 * 30, 0),
        "teacher writes": (48, 48 * 20, 0),
        "students train": (192, 192 * 15, 192 * 0.5 * 20),
        "students measured": (measured, measured * 30, 0),
        "teacher learns": (0, 0, 24 * 30),
        "hard_only": (80, 80 * 30, 80 * 0.25 * 37),
        "pq": (48, pytest.approx(16 * 15 + 32 * 30), pytest.approx(16 * 0.5 * 20 + 32 * 0.25 * 37)),
        "evaluation": (160, 160 * 30, 0),
    }


def test_counts_follow_the_config() -> None:
    def works(*changes: str, **numbers: float) -> dict[str, workload.Work]:
        return {w.name: w for w in workload.workload(tiny_config(*changes), KNOWN.with_values(numbers, "given"))}

    # Hard-Only spends what the loop's students did (192 + 120 rollouts), in whole steps of 8.
    assert works("student.extra_steps_per_promotion=0", "arms.steps=0")["hard_only"].rollouts == 312
    # A promotion after the first of two steps: 2, then 3 RLOO steps; the limit is 3.
    assert works(promotions=2.0)["students train"].rollouts == 6 * 8 * (2 + 3)
    assert works("teacher.reward=band", "intrinsic.attempts=5")["students measured"].rollouts == 120 + 24 * 5
    assert works("teacher.reward=none")["teacher learns"].trained == 0
    assert works("screen.attempts=0")["screening"].rollouts == 0
    assert works("problems.max_hard=4")["evaluation"].rollouts == 4 * 2 * 4
    # Mixed: 4 promotion questions beside 10 hard ones.
    mixed = works(*FIXED, "arms.pq_mode=mixed")["pq"]
    assert mixed.sampled == pytest.approx(48 * (15 * 4 + 30 * 10) / 14)
    empty = works("teacher.steps=0", 'arms.run=["base","base_t"]', "arms.steps=3")
    assert empty["students train"].rollouts == empty["students measured"].rollouts == 0
    assert empty["base_t"].rollouts == 24


def test_seconds_by_hand() -> None:
    config = tiny_config(*FIXED, "arms.curriculum_steps=2")
    sample = {"screen": 100.0, "write": 10.0, "student": 50.0, "measure": 60.0, "arm": 40.0, "evaluate": 80.0}
    rates = Rates(sample, {"student": 200.0, "teacher": 30.0, "arm": 20.0}, "by hand")
    expected = forecast.forecast(config, KNOWN, rates)
    pq = (16 * 15 + 32 * 30) / 40 + (16 * 0.5 * 20 + 32 * 0.25 * 37) / 20
    assert expected.stage_seconds() == pytest.approx(
        {
            "screen": 48.0,
            "loop": 96 + 2880 / 50 + 1920 / 200 + 3600 / 60 + 720 / 30,
            "arms": 60 + 740 / 20 + pq,
            "evaluate": 60.0,
        }
    )
    total = sum(expected.stage_seconds().values())
    text = "\n".join(expected.lines())
    assert f"{total / 3600:,.2f} device-hours" in text and PAPER_HOURS in text and "1,536 to 1,920" in text
    assert "hard_gradient_share            0.25  given" in text


def test_the_papers_setting_from_the_table() -> None:
    # 200 steps x 16 students x 10 x 8 x 32 rollouts at half of 1,024 tokens, all with a gradient because of the KL term.
    config = load("paper-math", ["problems.limit=1000", "problems.source=nowhere.jsonl"])
    known = assumed(config)
    assert known.origin["question_gradient_share"] == "by the KL term" and known.question_tokens == 512
    expected = table_forecast(config, known)
    by_name = dict(zip((w.name for w in expected.works), expected.seconds, strict=True))
    rollouts = 200 * 16 * 10 * 8 * 32
    scale = 3.213e9 / 3e9
    seconds = rollouts * 512 / (40_572 * scale) + rollouts * (150 + 512) / (32_966 * scale / KL_FACTOR)
    assert by_name["students train"] == pytest.approx(seconds)
    assert "NVIDIA H200, decode-3b and train-3b" in "\n".join(expected.lines())


def test_the_papers_recipe_is_complete_and_counted_without_a_network() -> None:
    config = load("paper-math")
    assert (split_source(config.problems.source)[0], config.problems.split) == ("hub", "test")
    known = assumed(config)
    assert (known.candidates, known.origin["candidates"]) == (5000, "problems.limit")
    screening = table_forecast(config, known).works[0]
    assert (screening.name, screening.rollouts) == ("screening", 5000 * 128)


def test_the_table_is_what_was_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    decoding = json.loads((results / "h200-default.json").read_text(encoding="utf-8"))["rows"]
    training = json.loads((results / "h200-attention.json").read_text(encoding="utf-8"))["without"]["train"]["rows"]

    def rate(rows: list[dict[str, Any]], section: str) -> float:
        return next(
            float(r["tokens_per_second"]) for r in rows if r["section"] == section and "16 adapters" in r["what"]
        )

    for known, name in zip(forecast.TABLE, ("135m", "3b"), strict=True):
        assert known.decode == pytest.approx(rate(decoding, f"decode-{name}"), abs=1)
        assert known.train == pytest.approx(rate(training, f"train-{name}"), abs=1)
        assert name in known.source


def test_table_rates_scale_with_size() -> None:
    eight = table_rates(8.03e9, kl_student=False, kl_teacher=True)
    assert eight is not None
    assert eight.sample["student"] == pytest.approx(40_572 * 3.213 / 8.03)
    assert eight.train["student"] == pytest.approx(32_966 * 3.213 / 8.03)
    assert eight.train["teacher"] == pytest.approx(eight.train["student"] / KL_FACTOR)
    assert table_rates(168_000, False, False) is None


def test_assumptions_are_checked() -> None:
    for values, said in (
        ({"question_tokenz": 1.0}, "known: candidates"),
        ({"hard_share": 1.5}, "from 0 to 1"),
        ({"candidates": float("nan")}, ">= 0"),
        ({"promotions": -1.0}, ">= 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            Assumptions().with_values(values, "given")


def test_what_is_known_beforehand(tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(7)))
    known = assumed(tiny_config(f"problems.source={problems}", "problems.limit=0", "student.optimizer.kl=0"))
    assert (known.candidates, known.origin["candidates"]) == (7, "counted")
    assert "hard_share" not in known.origin and known.question_gradient_share == 0.5
    (tmp_path / "p.jsonl.evidence.json").write_text("{}")
    config = tiny_config(f"problems.source={problems}", "problems.limit=0")
    assert assumed(config).hard_share == 1.0
    assert workload.workload(config, KNOWN)[0].rollouts == 0
    away = assumed(tiny_config("problems.source=someone/somewhere", "problems.limit=77"))
    assert (away.candidates, away.origin["candidates"]) == (77, "problems.limit")


def test_sizes_are_read_from_names() -> None:
    names = {"meta-llama/Llama-3.2-3B-Instruct": 3e9, "SmolLM2-135M": 135e6, "Qwen2.5-0.5B-Instruct": 0.5e9}
    assert {name: named_size(name) for name in names} == names
    assert named_size("folder/7b/") == 7e9
    assert [named_size(name) for name in ("builtin:tiny", "gpt2", "model-v2", "8bit-model")] == [None] * 4


def test_known_shapes_have_the_known_sizes() -> None:
    assert LLAMA["3B"].parameters == 3_212_749_824
    assert LLAMA["8B"].parameters == 8_030_261_248
    assert LLAMA["70B"].parameters == 70_553_706_496
    # LoRA of rank 16 on every linear layer of Llama-3.2-3B: what PEFT reports as trainable parameters.
    assert LLAMA["3B"].adapter_parameters(16) == 24_313_856


def test_memory_by_hand() -> None:
    config = load("paper-math", ["problems.source=x.jsonl"])
    found = memory.memory_of(config, LLAMA["3B"], prompt_tokens=150)
    assert found.weights == 3_212_749_824 * 2
    assert found.adapters == 18 * 24_313_856 * 16
    assert found.cache_row == 1174 * 28 * 2 * 8 * 128 * 2
    assert found.rows == 16 * 8 * 32
    assert found.activations == 1024 * 28 * (24 * 3072 + 6 * 8192) * 2
    assert found.least == found.weights + found.adapters + found.activations
    text = "\n".join(found.lines())
    assert "5.98 GiB   3,212,749,824 parameters x 2 bytes" in text and "18 policies x 24,313,856" in text
    few = memory.memory_of(load("paper-math", ["model.chunk=4", "model.dtype=float32"]), LLAMA["3B"], 150)
    assert (few.policies, few.weights) == (6, 3_212_749_824 * 4)


def test_shapes_are_read_from_files(tmp_path: Path) -> None:
    from helpers import tiny_model

    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "m")
    shape = memory.read_shape(tmp_path / "m")
    assert shape is not None
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.tied) == (2, 1, 8, True)
    assert "headers of the weight files" in shape.source
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"text_config": config}))
    bare = memory.read_shape(tmp_path / "bare")
    # Qwen 3 has norms of queries and keys, which the count by the shape leaves out.
    assert bare is not None and shape.parameters - bare.parameters == 2 * 2 * 8
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_text(json.dumps(config))
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(i, 10)}, shards / f"model-{i}.safetensors")
    index = {"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    found = memory.read_shape(shards)
    assert found is not None and found.parameters == 30
    (shards / "model-2.safetensors").write_bytes(b"\xff" * 20)
    damaged = memory.read_shape(shards)
    assert damaged is not None and damaged.source == "config.json"


def test_damaged_configs_tell_no_shape(tmp_path: Path) -> None:
    for text in ("", "[]", '{"hidden_size": "x"}', '{"num_attention_heads": 0}', "{"):
        (tmp_path / "config.json").write_text(text)
        assert memory.read_shape(tmp_path) is None
    assert memory.shape_of(tiny_config("model.path=nobody/nothing")) is None
    named = memory.shape_of(tiny_config("model.path=nobody/model-7B"))
    assert named is not None and named.parameters == 7_000_000_000


def test_dry_run_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", "--dry-run", "--model", "x/M-3B", "--problems", "x.jsonl", "--assume", "question_tokens=100"]) == 0
    )
    out = capsys.readouterr().out
    assert "memory per device" in out and "guessed from the size" in out and "device-hours" in out
    assert "question_tokens                 100  given" in out
    vllm = ["--set", "model.sampler=vllm", "--set", "model.vllm_devices=2"]
    assert main(["run", "--dry-run", "--model", "x/M-3B", "--problems", "x.jsonl", *vllm]) == 0
    assert "40% of each of 2 GPU, by model.vllm_memory: its own 2.79 GiB" in capsys.readouterr().out
    for wrong in ("question_tokens", "question_tokens=many", "nonsense=3"):
        assert main(["run", "--dry-run", "--assume", wrong]) == 1
