"""Any causal language model folder and any problem file through the command line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import BOS, tiny_model, tiny_tokenizer
from loop_helpers import events, read_jsonl, sets
from run_folders import write_jsonl
from tables import cases
from tokenizers import processors

from soar.cli import main

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "Answer:", "3", "5", "8", "apples", "and")


def save_model(folder: Path, words: Sequence[str] = WORDS) -> Path:
    """A random Gemma with a tokenizer that puts a BOS in front; two rows of its output layer have no token."""
    shape = {"num_key_value_heads": 1, "max_position_embeddings": 160, "sliding_window": 16}
    model, tokenizer = tiny_model("gemma3", vocab_size=len(words) + 2, **shape), tiny_tokenizer(words)
    for parameter in model.parameters():
        parameter.data.mul_(0.05)  # it says every word now and then
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.backend_tokenizer.post_processor = begin
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sums(path: Path) -> Path:
    """Columns under other names than ours: the loader finds them."""
    rows = [{"problem": f"What is {i} and {i} and 5 ?", "solution": f"think\n#### {2 * i + 5}"} for i in range(8)]
    return write_jsonl(path, rows)


def small_sets(changes: dict[str, Any]) -> list[str]:
    """The settings of `cases/small.json` with changes, as words of a command."""
    small = json.loads((Path(__file__).parent / "cases" / "small.json").read_text(encoding="utf-8"))
    return sets(*(f"{key}={json.dumps(value)}" for key, value in {**small, **changes}.items()))


def soar_run(out: Path, **changes: Any) -> int:
    """A run with a model and problems beside its folder."""
    model, problems = save_model(out.with_name("model")), write_sums(out.with_name("sums.jsonl"))
    words = ["run", "--model", str(model), "--problems", str(problems), "--out", str(out), "--quiet"]
    return main([*words, *small_sets(changes)])


def test_a_random_model_runs_to_the_end(tmp_path, capsys):
    out = tmp_path / "run"
    assert soar_run(out) == 0, capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["outer_steps"], summary["promotions"]) == (2, 2)
    assert list(summary["arms"]) == ["base", "hard_only", "ps", "pq"]
    assert all(set(row["answer"]) & set("358") for row in read_jsonl(out / "questions.jsonl"))
    assert [row["failed_students"] for row in events(out, "outer_step")] == [0, 0]
    for row in read_jsonl(out / "pq.jsonl"):
        assert set(row) == {"step", "dataset", "question", "answer", "reward"} and row["question"]
    hard = read_jsonl(out / "hard" / "train.jsonl") + read_jsonl(out / "hard" / "test.jsonl")
    assert sorted(int(row["answer"]) for row in hard) == [2 * i + 5 for i in range(8)]
    printed = capsys.readouterr().out
    assert "promotions: 2 in 2 outer steps" in printed and "pass@2" in printed


@pytest.mark.parametrize(("changes", "message"), cases("any_model", "refused"))
def test_what_does_not_fit_the_model_is_refused_by_key(tmp_path, capsys, changes, message):
    assert soar_run(tmp_path / "run", **changes) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
