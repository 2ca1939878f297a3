"""Any causal language model folder and any problem file through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import events, read_jsonl, sets
from tables import cases
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from soar.cli import main

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "3", "5", "8", "apples", "and")


def save_model(folder: Path) -> Path:
    """A random Gemma with a word-level tokenizer that puts a BOS in front; two rows of its output layer have no token."""
    config = Gemma3TextConfig(
        vocab_size=len(WORDS) + 2, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, pad_token_id=0, bos_token_id=1, eos_token_id=2, head_dim=8,
        sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def write_sums(path: Path, count: int = 8) -> Path:
    """Columns under other names than ours: the loader finds them."""
    rows = [{"problem": f"What is {i} and {i} and 5 ?", "solution": f"think\n#### {2 * i + 5}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SMALL = json.loads((Path(__file__).parent / "cases" / "small.json").read_text(encoding="utf-8"))


def soar_run(model: Path, problems: Path, out: Path, **changes: Any) -> int:
    values = sets(*(f"{key}={json.dumps(value)}" for key, value in {**SMALL, **changes}.items()))
    return main(["run", "--model", str(model), "--problems", str(problems), "--out", str(out), "--quiet", *values])


def test_a_random_model_runs_to_the_end(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    out = tmp_path / "run"
    code = soar_run(model, write_sums(tmp_path / "sums.jsonl"), out)
    assert code == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["outer_steps"], summary["promotions"]) == (2, 2)
    assert list(summary["arms"]) == ["base", "hard_only", "ps", "pq"]
    assert all(set(row["answer"]) & set("358") for row in read_jsonl(out / "questions.jsonl"))
    assert all(row["question"] for row in read_jsonl(out / "pq.jsonl"))
    assert [row["failed_students"] for row in events(out, "outer_step")] == [0, 0]
    assert all(set(row) == {"step", "dataset", "question", "answer", "reward"} for row in read_jsonl(out / "pq.jsonl"))
    hard = read_jsonl(out / "hard" / "train.jsonl") + read_jsonl(out / "hard" / "test.jsonl")
    assert sorted(int(row["answer"]) for row in hard) == [2 * i + 5 for i in range(8)]
    printed = capsys.readouterr().out
    assert "promotions: 2 in 2 outer steps" in printed
    assert "pass@2" in printed


@pytest.mark.parametrize(("changes", "message"), cases("any_model", "refused"))
def test_what_does_not_fit_the_model_is_refused_by_key(tmp_path, capsys, changes, message):
    code = soar_run(save_model(tmp_path / "model"), write_sums(tmp_path / "p.jsonl"), tmp_path / "run", **changes)
    error = capsys.readouterr().err
    assert code == 1
    assert message in error
    assert "Traceback" not in error
