"""Exports and sinks in the tools that they are for, each where it is installed (CONTRIBUTING.md has the versions).

They are no part of the test extra: together they bring some hundred packages. Without them the same files are checked
against their schemas in test_export.py and test_loggers.py.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import events, read_jsonl

from soar.domains.world import ANSWER_MARK
from soar.report import export
from soar.run.sinks import Loggers, flatten


def test_verifiers_loads_and_scores_the_package(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = pytest.importorskip("verifiers.v1.utils.loaders")
    from verifiers.v1.configs.taskset import TasksetConfig

    export.export_questions(tiny_run, tmp_path / "out", "verifiers")
    monkeypatch.syspath_prepend(str(tmp_path / "out"))
    tasks = list(loaders.load_taskset(TasksetConfig(id="soar_tiny")))
    promoted = read_jsonl(tiny_run / "pq.jsonl")
    assert [(t.data.idx, t.data.question, t.data.answer) for t in tasks] == [
        (i, row["question"], row["answer"]) for i, row in enumerate(promoted)
    ]

    async def rewards(reply: str | None) -> dict[str, float]:
        trace = types.SimpleNamespace(last_reply=reply, rewards={}, metrics={})
        trace.record_reward = lambda name, value, weight: trace.rewards.update({name: value * weight})
        await tasks[0].score(trace)
        return dict(trace.rewards)

    assert asyncio.run(rewards(f"{ANSWER_MARK} {promoted[0]['answer']}")) == {"correct": 1.0}
    assert asyncio.run(rewards(None)) == {"correct": 0.0}
    assert asyncio.run(tasks[0].validate(None)) is True
    for name in ("soar_tiny", "soar_tiny.taskset"):
        del sys.modules[name]


def test_the_dataset_class_of_verl_reads_the_file(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pytest.importorskip("verl.utils.dataset.rl_dataset")
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    monkeypatch.setattr(dataset.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    export.export_questions(tiny_run, tmp_path / "out", "verl")
    tokenizer = AutoTokenizer.from_pretrained(Path(export.__file__).parent / "assets" / "tiny")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    settings = OmegaConf.create(
        {"max_prompt_length": 64, "filter_overlong_prompts_workers": 1, "cache_dir": str(tmp_path)}
    )
    rows = dataset.RLHFDataset(str(tmp_path / "out" / "train.parquet"), tokenizer, settings)
    promoted = read_jsonl(tiny_run / "pq.jsonl")
    assert len(rows) == len(promoted), "none is filtered out"
    assert [row["reward_model"]["ground_truth"] for row in rows] == [row["answer"] for row in promoted]
    assert [row["index"] for row in rows] == list(range(len(promoted)))
    assert promoted[0]["question"] in rows[0]["raw_prompt"][0]["content"]
    batch = dataset.collate_fn([rows[0], rows[1]])
    assert set(batch) >= {"data_source", "raw_prompt", "ability", "reward_model", "extra_info", "dummy_tensor"}


def logged(kind: str, run: Path, folder: Path) -> list[dict[str, float]]:
    """Send the events of a run to one sink; what it should hold, row by row."""
    said: list[str] = []
    loggers = Loggers.open([kind], folder, "soar-test", "tiny", {"seed": 0}, said.append)
    loggers(events(run))
    loggers.close()
    assert said == []
    wanted = [flat for event in events(run) if (flat := flatten(event)) is not None]
    return [{**values, f"steps/{group}": step} for group, step, values in wanted]


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which has LevelDB's log format behind a header of seven bytes."""
    data, place, begun = path.read_bytes(), 7, b""
    while place < len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        part = data[place + 7 : place + 7 + size]
        place += 7 + size
        begun = part if kind in (1, 2) else begun + part
        if kind in (1, 4):
            yield begun


def test_wandb_keeps_the_numbers_offline(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("HOME", str(tmp_path))):
        monkeypatch.setenv(name, value)
    wanted = logged("wandb", tiny_run, tmp_path)
    rows: list[dict[str, Any]] = []
    axes: dict[str, str] = {}
    for data in records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
        axes[record.metric.name] = record.metric.step_metric
    assert rows == [pytest.approx(row) for row in wanted]
    assert axes["teacher/reward"] == "steps/outer_step" and axes["pq/reward"] == "steps/pq"


def test_trackio_keeps_the_numbers(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    wanted = logged("trackio", tiny_run, tmp_path)
    with sqlite3.connect(tmp_path / "soar-test.db") as database:
        kept = database.execute("select metrics from metrics order by step").fetchall()
    assert [json.loads(metrics) for (metrics,) in kept] == [pytest.approx(row) for row in wanted]
