"""Sinks get the numbers of metrics.jsonl under TRL's names, and never stop a run; what a run keeps of its completions in
rollouts.jsonl, under which cap, and where it is shown."""

import sys
from contextlib import closing
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
from loop_helpers import events, read_jsonl, run_tiny, skills, tiny_config
from tables import cases, write_jsonl

from soar.cli import main
from soar.files import read_object
from soar.loop.student import Plan, Training, TrainState
from soar.problems.pool import VerifierPool
from soar.report.page import KINDS, OUTCOMES, write_report
from soar.report.runs import read_run
from soar.report.watch import view_lines
from soar.run import sinks as sinks_room
from soar.run.folder import files_of
from soar.run.sinks import Loggers, flatten
from soar.types import Verdict


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
    """The other tool fails at its first row: that is said once, and this one goes on. Completions make a table."""
    run, broken = Mock(), Mock(**{"log.side_effect": OSError("disk full")})
    (other,) = {"wandb", "trackio"} - {kind}
    modules = {name: Mock(__spec__=1, **{"init.return_value": r}) for name, r in ((kind, run), (other, broken))}
    for name, module in modules.items():
        module.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]
        monkeypatch.setitem(sys.modules, name, module)
    said: list[str] = []
    sinks = Loggers(tiny_config("name=mine", f'log.sinks=["{other}","{kind}"]'), tmp_path, said.append)
    for step in (3, 4):
        sinks([{"event": "arm_step", "arm": "pq", "step": step, "kl": 0.5}, {"event": "alarm"}])
    completions = [{"by": "pq", "outcome": "wrong"}, {"by": "student", "outcome": "right"}]
    sinks(completions)
    sinks.close()
    axis = [call.define_metric("pq/kl", step_metric="steps/pq")] if kind == "wandb" else []
    logs = [[*axis, call.log({"pq/kl": 0.5, "steps/pq": step})] for step in (3, 4)]
    assert run.mock_calls == [*logs[0], *logs[1], call.log({"completions": completions}), call.finish()]
    assert not broken.finish.called
    assert [module.init.call_args.kwargs["name"] for module in modules.values()] == ["mine", "mine"]
    words = "failed and is left out from here on; metrics.jsonl has everything (OSError: disk full)"
    assert said == [f"log.sinks: {other} {words}"]


def test_no_secret_is_sent_or_shown(tmp_path, monkeypatch, capsys):
    wandb = Mock(__spec__=1, **{"init.side_effect": RuntimeError("refused opensesame")})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("MY_API_KEY", "opensesame")
    said: list[str] = []
    config = tiny_config("name=run-opensesame", "cluster.address=https://me:opensesame@host/v1", 'log.sinks=["wandb"]')
    Loggers(config, tmp_path, said.append)
    sent = wandb.init.call_args.kwargs
    assert (sent["name"], sent["config"]["cluster"]["address"]) == ("run-[hidden]", "https://[hidden]@host/v1")
    words = "failed and is left out from here on; metrics.jsonl has everything (RuntimeError: refused [hidden])"
    assert said == [f"log.sinks: wandb {words}"]
    monkeypatch.setattr(sinks_room.importlib.util, "find_spec", lambda name: None)
    assert main(["run", "--out", str(tmp_path / "run"), "--set", 'log.sinks=["wandb"]']) == 1
    assert "log.sinks names 'wandb', which is not installed: pip install 'soar-rl[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("steps", "tokens", "kept"), cases("loggers", "kept"))
def test_first_middle_and_last(monkeypatch, steps, tokens, kept):
    """Of the steps, or of the tokens where they end the training."""
    plan, env = Plan([[]] * steps, 0, tokens=tokens), SimpleNamespace(device="cpu", config=tiny_config().model)
    students = Training(env, [(plan, TrainState(0, skills([0.0])))], tiny_config().student)  # type: ignore[arg-type]
    monkeypatch.setattr("soar.loop.student.keep", lambda *given: [{}])
    (state,) = students.states_P
    while students.step < steps and state.tokens < (tokens or 1e9):
        students.step, state.tokens, state.metrics = students.step + 1, students.step + 1, [{"tokens": 1}]
        students.keep(None, None)  # type: ignore[arg-type]
    assert [row["rloo_step"] for row in state.kept] == kept


def test_what_came_of_an_attempt():
    texts, verdicts, ended, wanted = zip(*cases("rollouts", "attempt"), strict=True)
    outcomes = VerifierPool("math").outcomes(texts, list(map(Verdict, verdicts)), ended, ["7"] * len(texts))
    assert [outcome for outcome, _ in outcomes] == list(wanted)


def test_a_run_keeps_completions_of_every_kind_from_its_first_to_its_last_step(tiny_run):
    rows, config = read_jsonl(tiny_run / "rollouts.jsonl"), tiny_config()
    assert {row["kind"] for row in rows} == set(KINDS)
    assert {row["outcome"] for row in rows if row["kind"] != "teacher"} <= set(OUTCOMES)
    loop = [row for row in rows if row["by"] in ("student", "teacher")]
    assert {row["step"] for row in loop} == set(range(config.teacher.steps))
    steps = {row["rloo_step"] for row in loop if row["kind"] == "question"}
    assert {0, config.student.steps - 1} <= steps
    arms = {row["by"] for row in rows} - {"student", "teacher"}
    assert arms == set(config.arms.run) - {"base", "ps"}
    hard = {row["id"] for half in ("train", "test") for row in read_jsonl(tiny_run / "hard" / f"{half}.jsonl")}
    assert all((row["id"] in hard) == (row["kind"] == "hard") for row in rows if row["kind"] != "teacher")
    assert all(row["reward"] == float(row["outcome"] == "right") for row in rows if row["kind"] != "teacher")
    assert "rollouts.jsonl" in read_object(tiny_run / "hashes.json")[0]
    shown = [text for text, _ in view_lines(read_run(tiny_run))]
    assert any(text.startswith("completions kept last (pq, RLOO step ") for text in shown)


def test_the_cap_is_shared_out_and_nothing_secret_is_kept(tiny_run, tmp_path, monkeypatch):
    large, file = read_jsonl(tiny_run / "rollouts.jsonl"), tmp_path / "run" / "rollouts.jsonl"
    secret = next(row["question"] for row in large if "id" in row)
    monkeypatch.setenv("MY_API_KEY", secret)
    run_tiny(tmp_path / "run", "log.rollouts_mb=0.03")
    small = read_jsonl(file)
    assert file.stat().st_size <= 30_000 and len(small) < len(large) and secret not in file.read_text()
    assert {(row["by"], row.get("step")) for row in small} == {(row["by"], row.get("step")) for row in large}


def test_the_report_folds_them_by_outcome_and_runs_nothing_hostile(run):
    hostile = "<script>kept(1)</script>\u202e" + "x" * 5000
    rows = [
        {"kind": kind, "by": "student", "step": step, "outcome": outcome, "completion": hostile, "answer": "7"}
        for kind, outcome in (("hard", "no answer"), ("question", "right"), ("teacher", "two_problems"), (None, 3))
        for step in range(20)
    ]
    write_jsonl(run / "rollouts.jsonl", [*rows, {"completion": {}}])
    page = write_report(run).read_text(encoding="utf-8")
    assert "no answer (hard problems 20)" in page and "teacher: two_problems (teacher texts 20)" in page
    assert OUTCOMES["no answer"][1] in page and "student, outer step 19" not in page  # every third of them
    assert page.count("&lt;script&gt;kept(1)") == 4 * 7 and "<script>kept" not in page and "\u202e" not in page
