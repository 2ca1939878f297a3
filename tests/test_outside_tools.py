"""Exports and sinks in the tools that they are for, each where it is installed (CONTRIBUTING.md has the versions).

They are no part of the test extra: together they bring some hundred packages. Without them the same files are checked
against their schemas in test_export.py and test_loggers.py.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import types
from pathlib import Path

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


def logged(kind: str, run: Path, folder: Path) -> list[dict[str, float]]:
    """Send the events of a run to one sink; what it should hold, row by row."""
    said: list[str] = []
    loggers = Loggers.open([kind], folder, "soar-test", "tiny", {"seed": 0}, said.append)
    loggers(events(run))
    loggers.close()
    assert said == []
    wanted = [flat for event in events(run) if (flat := flatten(event)) is not None]
    return [{**values, f"steps/{group}": step} for group, step, values in wanted]


def test_trackio_keeps_the_numbers(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio")
    wanted = logged("trackio", tiny_run, tmp_path)
    with sqlite3.connect(tmp_path / "soar-test.db") as database:
        kept = database.execute("select metrics from metrics order by step").fetchall()
    assert [json.loads(metrics) for (metrics,) in kept] == [pytest.approx(row) for row in wanted]
