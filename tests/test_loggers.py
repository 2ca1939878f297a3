"""Sinks get the numbers of metrics.jsonl under TRL's names, and never stop a run."""

import sys
from contextlib import closing
from unittest.mock import Mock, call

import pytest
from loop_helpers import events, read_jsonl, tiny_config
from tables import cases

from soar.cli import main
from soar.run import sinks as loggers
from soar.run.folder import files_of
from soar.run.sinks import Loggers, flatten


@pytest.mark.parametrize(("event", "flat"), cases("loggers", "flatten"))
def test_events_in_the_names_of_trl(event, flat):
    found = flatten(event)
    assert found is flat is None or list(found) == [*flat[:2], pytest.approx(flat[2])]


def test_the_events_of_a_run_reach_tensorboard(tiny_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with closing(Loggers(tiny_config('log.sinks=["tensorboard"]'), tmp_path, pytest.fail)) as sinks:
        sinks(events(tiny_run))
        sinks(read_jsonl(tiny_run / "rollouts.jsonl"))
    assert files_of(tmp_path) == [], "the sink writes until it is closed, so its files are in no list of hashes"
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert any(tag.startswith("completions/") for tag in read.Tags()["tensors"])
    rewards = [(item.step, item.value) for item in read.Scalars("teacher/reward")]
    assert rewards == [(e["step"], pytest.approx(e["reward_mean"])) for e in events(tiny_run, "outer_step")]
    lengths = [item.value for item in read.Scalars("hard_only/completions/mean_length")]
    arm = [e for e in events(tiny_run, "arm_step") if e["arm"] == "hard_only"]
    assert lengths == pytest.approx([e["completions/mean_length"] for e in arm])


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_tools_that_count_steps_get_an_axis_for_each_group_and_one_that_fails_is_left_out(tmp_path, monkeypatch, kind):
    """The other tool fails at its first row: that is said once, and this one goes on."""
    run, broken = Mock(), Mock(**{"log.side_effect": OSError("disk full")})
    (other,) = {"wandb", "trackio"} - {kind}
    modules = {kind: Mock(**{"init.return_value": run}), other: Mock(**{"init.return_value": broken})}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    said: list[str] = []
    sinks = Loggers(tiny_config("name=mine", f'log.sinks=["{other}","{kind}"]'), tmp_path, said.append)
    for step in (3, 4):
        sinks([{"event": "arm_step", "arm": "pq", "step": step, "kl": 0.5}, {"event": "alarm"}])
    sinks.close()
    axis = [call.define_metric("pq/kl", step_metric="steps/pq")] if kind == "wandb" else []
    logs = [[*axis, call.log({"pq/kl": 0.5, "steps/pq": step})] for step in (3, 4)]
    assert run.mock_calls == [*logs[0], *logs[1], call.finish()] and not broken.finish.called
    assert [module.init.call_args.kwargs["name"] for module in modules.values()] == ["mine", "mine"]
    words = "failed and is left out from here on; metrics.jsonl has everything (OSError: disk full)"
    assert said == [f"log.sinks: {other} {words}"]


def test_no_secret_is_sent_or_shown(tmp_path, monkeypatch, capsys):
    wandb = Mock(**{"init.side_effect": RuntimeError("refused opensesame")})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("MY_API_KEY", "opensesame")
    said: list[str] = []
    config = tiny_config("name=run-opensesame", "cluster.address=https://me:opensesame@host/v1", 'log.sinks=["wandb"]')
    Loggers(config, tmp_path, said.append)
    sent = wandb.init.call_args.kwargs
    assert (sent["name"], sent["config"]["cluster"]["address"]) == ("run-[hidden]", "https://[hidden]@host/v1")
    words = "failed and is left out from here on; metrics.jsonl has everything (RuntimeError: refused [hidden])"
    assert said == [f"log.sinks: wandb {words}"]
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    assert main(["run", "--out", str(tmp_path / "run"), "--set", 'log.sinks=["wandb"]']) == 1
    assert "log.sinks names 'wandb', which is not installed: pip install 'soar-rl[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
