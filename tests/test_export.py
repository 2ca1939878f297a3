"""Exports are read by the programs that they are for: TRL, datasets, PEFT, transformers, and verl by its schema."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, call

import pyarrow.parquet as pq
import pytest
import torch
from helpers import logits_of, random_stack
from loop_helpers import read_jsonl, tiny_config
from tables import cases, change, write_json, write_jsonl
from world_text import ANSWER_MARK

from soar.cli import main
from soar.config import resolve_path
from soar.engine.load import load_backbone
from soar.engine.policy import load_adapter
from soar.problems.load import load_problems
from soar.report import export
from soar.report.runs import ReportError, read_run
from soar.run.setup import save_adapter


@pytest.fixture
def boxed(run: Path) -> Path:
    """A run whose manifest asks for boxed answers and math-verify."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["problems"] = {"format": "tags", "verifier": "math"}
    write_json(run / "manifest.json", manifest)
    (run / "hashes.json").unlink()
    return run


def module_at(path: Path) -> SimpleNamespace:
    """What a written Python file defines."""
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_plain_rows_are_the_promotion_questions_a_dataset_and_a_problem_file(tiny_run, tmp_path, monkeypatch):
    assert main(["export", str(tiny_run), "--format", "jsonl", "--out", str(tmp_path / "out")]) == 0
    rows, source = read_jsonl(tmp_path / "out" / "questions.jsonl"), read_jsonl(tiny_run / "pq.jsonl")
    keys = ("question", "answer", "step", "dataset", "reward")
    assert [{k: row[k] for k in keys} for row in rows] == [{k: row[k] for k in keys} for row in source]
    everything = export.collect(read_run(tiny_run), "all", with_hard=True)
    parts = [read_jsonl(tiny_run / name) for name in ("questions.jsonl", "hard/train.jsonl")]
    assert [row["question"] for row in everything] == [row["question"] for rows in parts for row in rows]
    problems, _ = load_problems(str(tmp_path / "out" / "questions.jsonl"), skip_bad_rows=True)
    assert {p.question for p in problems} <= {row["question"] for row in source}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "nobody checked them" in card and f"{len(source):,} promotion questions" in card
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["question"] == [row["question"] for row in source]


def test_the_trl_file_trains_a_step(tiny_run, tmp_path, monkeypatch):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    export.export_questions(tiny_run, out, "trl")
    rows = datasets.Dataset.from_list(read_jsonl(out / "train.jsonl"))
    reward = module_at(out / "reward.py")

    def counted(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        said = [f"{ANSWER_MARK} {gold}{'' if i % 2 else ' 1'}" for i, gold in enumerate(answer)]
        return reward.accuracy(said, answer, **columns)

    model, _ = export.base_of(read_run(tiny_run))
    settings = trl.RLOOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=8, report_to=[], learning_rate=1e-3, save_strategy="no", temperature=5.0,
    )  # fmt: skip
    trainer = trl.RLOOTrainer(model=model, reward_funcs=counted, args=settings, train_dataset=rows)
    trainer.train()
    log = next(row for row in trainer.state.log_history if "reward" in row)
    assert float(log["reward"]) == 0.5, "every second completion is graded on the gold answer"


def test_the_verl_file_and_its_reward(boxed, tmp_path, monkeypatch):
    """Fields and types as in verl's `examples/data_preprocess/gsm8k.py`; the reward is the verifier of the run."""
    with monkeypatch.context() as patch, pytest.raises(ReportError, match=r"pip install .soar-rl\[parquet\]"):
        patch.setitem(sys.modules, "pyarrow", None)
        export.export_questions(boxed, tmp_path / "out", "verl")
    assert not (tmp_path / "out").exists()
    for no in ([{"level": {}}], [{"level": 1}, {"level": "x"}], [{"level": "\ud800"}], [{"level": 10**40}]):
        with pytest.raises(ReportError, match="parquet cannot hold the columns of these problems"):
            export._parquet(no)
    export.export_questions(boxed, tmp_path / "out", "verl", with_hard=True)
    table = pq.read_table(tmp_path / "out" / "train.parquet")
    schema = {field.name: str(field.type) for field in table.schema}
    assert list(schema) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert schema["prompt"] == "list<element: struct<role: string, content: string>>"
    assert schema["reward_model"] == "struct<style: string, ground_truth: string>"
    rows, promoted = table.to_pylist(), read_jsonl(boxed / "pq.jsonl")
    assert len(rows) == len(promoted) + len(read_jsonl(boxed / "hard" / "train.jsonl"))
    assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": promoted[0]["answer"]}
    assert rows[-1]["extra_info"]["reward"] is None and {row["ability"] for row in rows} == {"math"}
    reward = module_at(tmp_path / "out" / "reward.py")
    assert reward.compute_score("soar_tiny", r"so \boxed{\frac{2}{4}}", "0.5", {"index": 0}) == 1.0
    assert reward.compute_score("soar_tiny", "0.5", "0.5") == 0.0, "no box, no answer"
    messages = [[{"role": "assistant", "content": r"\boxed{7}"}], [{"role": "assistant", "content": r"\boxed{8}"}]]
    assert reward.accuracy(messages, answer=["7", "7"], prompts=["?", "?"]) == [1.0, 0.0]
    reward._pool.close()
    accuracy_reward = pytest.importorskip("trl.rewards").accuracy_reward
    domain = export.domain_of_run(read_run(boxed))
    golds = ["42", r"\frac{1}{3}", "0.5", "(1, 2)", r"\{1,2\}", "x=3", "x^2+1", r"\sqrt{2}", "3 or 5", r"2\pi"]
    said = [[{"role": "assistant", "content": rf"So it is \boxed{{{gold}}}"}] for gold in golds]
    assert accuracy_reward(said, [export.solution(domain, gold) for gold in golds]) == [1.0] * len(golds)


def test_a_reward_function_goes_along(boxed, tmp_path, monkeypatch):
    """With its file, its threshold and the columns that it reads, so it judges wherever the export lies."""
    monkeypatch.chdir(tmp_path)
    body = "return {'x': 0.5}[data_source] * solution_str.endswith(ground_truth)"
    Path("mine.py").write_text(f"def grade(data_source, solution_str, ground_truth, extra_info):\n    {body}\n")
    manifest, half = json.loads((boxed / "manifest.json").read_text()), boxed / "hard" / "train.jsonl"
    manifest["config"]["problems"] = {"format": "tags", "verifier": "mine.py:grade", "success_at": 0.5}
    write_jsonl(half, [{**row, "data_source": "x", "level": i} for i, row in enumerate(read_jsonl(half))])
    for form, paid in (("trl", "binary"), ("verl", "paper")):  # its scores as they are, and only right or not
        manifest["config"]["student"]["reward"] = paid
        write_json(boxed / "manifest.json", manifest)
        words = ["export", str(boxed), "--trust-run", "--with-hard", "--format", form, "--out", str(tmp_path / form)]
        assert main(words) == 0
    monkeypatch.chdir(boxed)
    with pytest.raises(ReportError, match=r"verifier mine\.py is not here .*; export from where it was begun"):
        export.export_questions(boxed, tmp_path / "elsewhere", "trl")
    rows, reward = read_jsonl(tmp_path / "trl" / "train.jsonl"), module_at(tmp_path / "trl" / "reward.py")
    columns = {key: [row.get(key) for row in rows] for key in rows[-1]}
    assert {*columns["data_source"]} == {"x"} and columns["level"][-1] == len(read_jsonl(half)) - 1
    assert reward.accuracy(columns["answer"], **columns) == [0.5] * len(rows)
    row = pq.read_table(tmp_path / "verl" / "train.parquet").to_pylist()[0]
    reward = module_at(tmp_path / "verl" / "reward.py")
    scores = [reward.compute_score(row["data_source"], text, "7", row["extra_info"]) for text in ("it is 7", "it is 8")]
    assert scores == [1.0, 0.0] and row["extra_info"]["index"] == 0


@pytest.mark.parametrize(("verifier", "style", "right", "wrong"), cases("export", "reward alone"))
def test_the_reward_runs_without_this_package(boxed, tmp_path, monkeypatch, verifier, style, right, wrong):
    pytest.importorskip("math_verify")
    domain = export.domain_of_run(read_run(boxed))
    file, prompts = tmp_path / "reward.py", replace(domain.prompts, answer_style=style)
    monkeypatch.setitem(sys.modules, "soar.problems.pool", None)
    file.write_bytes(export.reward_files(replace(domain, verifier=verifier, prompts=prompts), {})["reward.py"])
    reward = module_at(file)
    assert reward.accuracy([right, wrong, "none"], ["0.5"] * 3) == [1.0, 0.0, 0.0]
    other = tmp_path / "other.py"
    other.write_bytes(export.reward_files(replace(domain, verifier="mine:grade"), {})["reward.py"])
    with pytest.raises(ModuleNotFoundError, match="soar"):
        module_at(other)


def test_hostile_text_stays_inside_the_card(boxed, tmp_path):
    pairs = ("``````\n# owned <script>", "\u202e`````` ---\n"), ("\ud800 b", "1")
    write_jsonl(boxed / "pq.jsonl", [{"question": question, "answer": answer} for question, answer in pairs])
    change(boxed / "manifest.json", b'"builtin:tiny"', b'"a\\n# owned\\n``````"')
    export.export_questions(boxed, tmp_path / "out", "jsonl")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    headings = [line for line in card.splitlines() if line.startswith("# ")]
    assert "\u202e" not in card and headings == ['# Questions of the SOAR run "tiny"']
    assert sum(line.startswith("``````") for line in card.splitlines()) == 2 and "`a # owned ''''''`" in card
    assert read_jsonl(tmp_path / "out" / "questions.jsonl")[1]["question"] == "? b", "no lone surrogate"
    hostile = replace(export.domain_of_run(read_run(boxed)), verifier='a"); import os; os.abort() #\n\u2028:f')
    tree = compile(export.reward_files(hostile, {})["reward.py"].decode(), "reward.py", "exec")
    assert hostile.verifier in [c for c in tree.co_consts if isinstance(c, str)]


@pytest.mark.parametrize(("policy", "kind", "base"), [("student", "full", "builtin:tiny"), ("pq", "lora", "hard")])
def test_exported_weights_give_our_logits(run, tmp_path, monkeypatch, policy, kind, base):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "hard").symlink_to(resolve_path("builtin:tiny"))
    monkeypatch.chdir(tmp_path)
    change(run / "manifest.json", b'"builtin:tiny"', json.dumps(base).encode())
    backbone = load_backbone(tiny_config(f"model.adapter={kind}", "model.lora_rank=4", f"model.path={base}").model)
    (run / "hashes.json").unlink()  # another adapter than the run's own
    save_adapter(backbone, random_stack(backbone, 1, size=0.02), run / export.adapter_folder(policy))
    stack = load_adapter(backbone, run / export.adapter_folder(policy))
    question = read_jsonl(run / "hard" / "train.jsonl")[0]["question"]
    ids = torch.tensor([backbone.tokenizer.encode(f"{question} {ANSWER_MARK} 12", add_special_tokens=False)])
    with torch.no_grad():
        wanted, base = (logits_of(backbone, given, ids) for given in (stack, None))
    assert not torch.equal(wanted, base)
    monkeypatch.chdir(run)  # exported and loaded from elsewhere, where another folder has the base model's name
    export.export_adapter(run, tmp_path / "peft", policy)
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "peft"))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=2e-5, rtol=1e-5)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "peft")
    assert tokenizer.encode(question) == backbone.tokenizer.encode(question)
    card = (tmp_path / "peft" / "README.md").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert f"- {'PS' if policy == 'student' else 'PQ'}: " in card and "- Hard-Only: " in card
    assert "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n" in card
    assert f"AutoModelForCausalLM.from_pretrained({json.dumps(settings['base_model_name_or_path'])}" in card
    assert "base_model:" not in card, "a model here is no name on the hub"


@pytest.mark.parametrize(("form", "first"), cases("export", "killed"))
def test_an_export_that_was_killed_is_taken_for_none_and_is_made_again(tiny_run, tmp_path, form, first):
    program = (Path(__file__).parent / "cases" / "killed_export.txt").read_text(encoding="utf-8")
    command = [sys.executable, "-c", program, str(tiny_run), str(tmp_path), form, first]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("whole at last\n"), done.stderr


def test_push_uploads_a_folder_with_its_card(tiny_run, tmp_path, monkeypatch, capsys):
    hub = Mock(**{"upload_folder.side_effect": lambda repo_id, **named: f"https://hub/{repo_id}"})
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    for form, kind in (("jsonl", "dataset"), ("peft", "model")):
        words = ["export", str(tiny_run), "--format", form, "--out", str(tmp_path / form), "--push"]
        assert main([*words, f"me/{kind}"]) == 0 and f"pushed: https://hub/me/{kind}" in capsys.readouterr().out
        made = call.create_repo(f"me/{kind}", repo_type=kind, private=True, exist_ok=True)
        sent = call.upload_folder(repo_id=f"me/{kind}", repo_type=kind, folder_path=tmp_path / form)
        assert hub.mock_calls[-2:] == [made, sent]
        assert "# " in (tmp_path / form / "README.md").read_text(encoding="utf-8")
    hub.create_repo.side_effect = OSError("401 Unauthorized")
    assert main(["export", str(tiny_run), "--format", "trl", "--out", str(tmp_path / "t"), "--push", "me/gone"]) == 1
    assert "401 Unauthorized" in capsys.readouterr().err and (tmp_path / "t" / "README.md").is_file()
    hub.create_repo.side_effect = RuntimeError("Connection refused")  # as httpx says it
    with pytest.raises(ReportError, match="--push me/offline: Connection refused; the export is in"):
        export.push_folder(tmp_path / "t", "me/offline", "dataset")
