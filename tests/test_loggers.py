"""Sinks get the numbers of metrics.jsonl under TRL's names, and never stop a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from loop_helpers import events, read_jsonl, run_tiny, tiny_config, without_clock

from soar.cli import main
from soar.run import doctor
from soar.run import sinks as loggers
from soar.run.sinks import Loggers, flatten


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.closed = False
        self.tables: list[dict[str, Any]] = []

    def table(self, rows: list[dict[str, Any]]) -> None:
        self.tables += rows

    def log(self, group: str, step: int, values: dict[str, float]) -> None:
        self.rows.append((group, step, values))

    def close(self) -> None:
        self.closed = True


def test_an_outer_step_in_the_names_of_trl() -> None:
    event = {
        "event": "outer_step", "step": 4, "reward_G": [0.1, None, 0.3], "reward_mean": 0.2, "teacher_kl": 0.01,
        "teacher_grad_norm": None, "accepted": 3, "sampled": 4, "promoted": True, "reason": "x", "best_pass_rate": 0.5,
        "student_last": {"reward_mean": 0.7, "kl": float("nan"), "completions/mean_length": 9.5,
                         "frac_reward_zero_std": 0.25},
    }  # fmt: skip
    group, step, values = flatten(event) or ("", -1, {})
    assert (group, step) == ("outer_step", 4)
    assert values == {
        "teacher/reward": pytest.approx(0.2),
        "teacher/reward_std": pytest.approx(0.02**0.5),
        "teacher/kl": 0.01,
        "teacher/accepted_share": 0.75,
        "outer/best_pass_rate": 0.5,
        "outer/promoted": 1.0,
        "student/reward": 0.7,
        "student/completions/mean_length": 9.5,
        "student/frac_reward_zero_std": 0.25,
    }


@pytest.mark.parametrize(
    ("event", "flat"),
    [
        (
            {"event": "arm_step", "arm": "pq", "step": 7, "reward_mean": 1.0, "frac_mixed": 0.5},
            ("pq", 7, {"pq/reward": 1.0, "pq/frac_mixed": 0.5}),
        ),
        (
            {"event": "evaluation", "arm": "ps", "pass_at": {"1": 0.25, "8": 0.5}, "correct": [1]},
            ("evaluation", 0, {"eval/ps/pass@1": 0.25, "eval/ps/pass@8": 0.5}),
        ),
        ({"event": "alarm", "step": 1, "message": "x"}, None),
    ],
)
def test_other_events(event: dict[str, Any], flat: Any) -> None:
    assert flatten(event) == flat


def test_a_whole_run_reaches_its_sinks_and_changes_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept, run, real = Kept(), tmp_path / "run", loggers.open_sink
    monkeypatch.setattr(loggers, "open_sink", lambda kind, *more: kept if kind == "wandb" else real(kind, *more))
    monkeypatch.setattr("soar.run.pipeline.check_installed", lambda kinds: None)
    run_tiny(run, 'log.sinks=["wandb","tensorboard"]')
    assert kept.closed
    wanted = [flat for event in events(run) if (flat := flatten(event)) is not None]
    assert [(g, s, set(v)) for g, s, v in kept.rows] == [(g, s, set(v)) for g, s, v in wanted]
    assert kept.tables == read_jsonl(run / "rollouts.jsonl")
    assert {g for g, _, _ in kept.rows} == {"screen", "outer_step", "hard_only", "pq", "evaluation"}
    assert without_clock(events(run)) == without_clock(events(tiny_run))
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    assert any(tag.startswith("completions/") for tag in read.Tags()["tensors"])
    rewards = [(item.step, item.value) for item in read.Scalars("teacher/reward")]
    assert rewards == [(e["step"], pytest.approx(e["reward_mean"])) for e in events(run, "outer_step")]
    lengths = [item.value for item in read.Scalars("hard_only/completions/mean_length")]
    arm = [e for e in events(run, "arm_step") if e["arm"] == "hard_only"]
    assert lengths == pytest.approx([e["completions/mean_length"] for e in arm])
    assert [line for _, complaints in doctor.examine(run) for line in complaints] == []
    hashes = json.loads((run / "hashes.json").read_text())
    assert "metrics.jsonl" in hashes
    assert not [name for name in hashes if name.startswith("tensorboard/")], "the sink writes until it is closed"


def fake_tool() -> tuple[Any, list[Any]]:
    """A module with `init` as wandb and trackio have it, and the calls made on its run."""
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda values: calls.append(("log", values)),
        define_metric=lambda name, step_metric: calls.append(("axis", name, step_metric)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**settings: Any) -> Any:
        calls.append(("init", settings["project"], settings["name"]))
        return run

    return types.SimpleNamespace(init=init), calls


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_tools_that_count_steps_get_an_axis_for_each_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tool, calls = fake_tool()
    monkeypatch.setitem(sys.modules, kind, tool)
    sinks = loggers.open_loggers(tiny_config("name=mine", f'log.sinks=["{kind}"]'), tmp_path, pytest.fail)
    sinks([{"event": "arm_step", "arm": "pq", "step": 3, "kl": 0.5}, {"event": "alarm"}])
    sinks.close()
    assert [call for call in calls if call[0] != "axis"] == [
        ("init", "soar", "mine"),
        ("log", {"pq/kl": 0.5, "steps/pq": 3}),
        ("finish",),
    ]
    assert [call for call in calls if call[0] == "axis"] == ([("axis", "pq/kl", "steps/pq")] if kind == "wandb" else [])


def test_a_failing_sink_warns_once_and_the_others_go_on() -> None:
    class Broken(Kept):
        def log(self, group: str, step: int, values: dict[str, float]) -> None:
            raise OSError("disk full")

    good, said = Kept(), list[str]()
    sinks = Loggers({"tensorboard": Broken, "wandb": lambda: good}, said.append)
    for step in range(3):
        sinks([{"event": "arm_step", "arm": "pq", "step": step, "kl": 0.5}])
    sinks.close()
    assert [step for _, step, _ in good.rows] == [0, 1, 2]
    assert said == [
        "log.sinks: tensorboard failed and is left out from here on; metrics.jsonl has everything (OSError: disk full)"
    ]


def test_no_secret_is_sent_or_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def init(**settings: Any) -> None:
        sent.append(settings)
        raise RuntimeError("refused opensesame")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("MY_API_KEY", "opensesame")
    said: list[str] = []
    config = tiny_config("name=run-opensesame", "cluster.address=https://me:opensesame@host/v1", 'log.sinks=["wandb"]')
    loggers.open_loggers(config, tmp_path, said.append)
    assert (sent[0]["name"], sent[0]["config"]["cluster"]["address"]) == ("run-[hidden]", "https://[hidden]@host/v1")
    assert said == [
        "log.sinks: wandb failed and is left out from here on; metrics.jsonl has everything (RuntimeError: refused [hidden])"
    ]


def test_a_sink_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert main(["run", "--out", str(tmp_path / "run"), "--set", 'log.sinks=["wandb"]']) == 1
    assert "log.sinks names 'wandb', which is not installed: pip install 'soar-rl[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
