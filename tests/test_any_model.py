"""Any causal language model folder and any problem file: random Llama, Qwen and Gemma through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import events, read_jsonl
from tables import cases
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast, Qwen2Config

from soar.cli import main

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "3", "5", "8", "apples", "and")
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": 16}),
}


def save_model(folder: Path, name: str, context: int = 160, spare: int = 0) -> Path:
    """A random model with a word-level tokenizer; `spare`: rows of the output layer that no token has, as real models
    have them."""
    kind, settings = CONFIGS[name]
    config = kind(
        vocab_size=len(WORDS) + spare,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer(name).save_pretrained(folder)
    return folder


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of WORDS: word-level, with a BOS in front for Gemma; for Qwen2, whose folders transformers reads as
    byte-level BPE whatever they hold, one letter and added tokens."""
    if name == "qwen2":
        backend = Tokenizer(models.BPE({word: i for i, word in enumerate((*WORDS[:4], "e"))}, []))
        backend.add_tokens([f" {word}" for word in WORDS[4:-1]])
    else:
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if name.startswith("gemma"):
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def write_sums(path: Path, count: int = 8) -> Path:
    """Columns under other names than ours: the loader finds them."""
    rows = [{"problem": f"What is {i} and {i} and 5 ?", "solution": f"think\n#### {2 * i + 5}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SMALL = json.loads((Path(__file__).parent / "cases" / "small.json").read_text(encoding="utf-8"))


def soar_run(model: Path, problems: Path, out: Path, **changes: Any) -> int:
    values = {**SMALL, **changes}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return main(["run", "--model", str(model), "--problems", str(problems), "--out", str(out), "--quiet", *sets])


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_random_model_runs_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    model = save_model(tmp_path / "model", name, spare=3 if name == "qwen2" else 0)
    out = tmp_path / "run"
    code = soar_run(model, write_sums(tmp_path / "sums.jsonl"), out)
    assert code == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["outer_steps"], summary["promotions"]) == (2, 2)
    assert list(summary["arms"]) == ["base", "hard_only", "ps", "pq"]
    # e: the letter of qwen2's tokenizer, which is a number
    assert {row["answer"] for row in read_jsonl(out / "questions.jsonl")} <= set("358e")
    assert all(row["question"] for row in read_jsonl(out / "pq.jsonl"))
    assert [row["failed_students"] for row in events(out, "outer_step")] == [0, 0]
    assert all(set(row) == {"step", "dataset", "question", "answer", "reward"} for row in read_jsonl(out / "pq.jsonl"))
    hard = read_jsonl(out / "hard" / "train.jsonl") + read_jsonl(out / "hard" / "test.jsonl")
    assert sorted(int(row["answer"]) for row in hard) == [2 * i + 5 for i in range(8)]
    printed = capsys.readouterr().out
    assert "promotions: 2 in 2 outer steps" in printed
    assert "pass@2" in printed


@pytest.mark.parametrize(("changes", "message"), cases("any_model", "refused"))
def test_what_does_not_fit_the_model_is_refused_by_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    code = soar_run(
        save_model(tmp_path / "model", "gemma3"), write_sums(tmp_path / "p.jsonl"), tmp_path / "run", **changes
    )
    error = capsys.readouterr().err
    assert code == 1
    assert message in error
    assert "Traceback" not in error
