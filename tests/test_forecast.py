"""The forecast: counts and seconds by hand, the table of rates, memory from real files, forecast against run. The scaling
study: its model against the measured rates, its bookkeeping, and the page that quotes it."""

import sys

import pytest
from helpers import ROOT
from loop_helpers import BRIEF, events, read_jsonl, run_tiny, tiny_config, write_problems

from soar.cli import main
from soar.config import load
from soar.plan import forecast
from soar.types import Problem

sys.path.insert(0, str(ROOT / "benchmarks"))
import scaling
import sizes

NUMBERS = {
    "candidates": 40.0, "hard_share": 0.5, "teacher_tokens": 20.0, "question_tokens": 15.0, "hard_tokens": 30.0,
}  # fmt: skip


def works(*changes: str, **values: float) -> dict[str, forecast.Work]:
    config = tiny_config("arms.curriculum_steps=0", *changes)
    return {w.name: w for w in forecast.workload(config, forecast.assumed(config, NUMBERS | values))}


def test_counts_by_hand():
    # 40 candidates x 4 attempts; 20 hard, 10 to train. 2 steps of 3 x 4 pairs and 6 students of 2 steps x 2 x 4 rollouts;
    # 4 reward questions x 2 for each, the baseline 3 at each of 8 questions asked; 4 arms x 10 held out x 4.
    measured, share = 12 * 4 * 2 + 3 * 8, 4 / 14  # of the steps of pq: 4 promotion questions beside 10 hard ones
    tokens = 48 * (share * 15 + (1 - share) * 30)
    counts = works("arms.steps=10", "arms.pq_steps=6")
    assert {name: (w.rollouts, w.sampled, w.trained) for name, w in counts.items()} == {
        "screening": (160, 160 * 30, 0),
        "teacher writes": (48, 48 * 20, 0),
        "students train": (192, 192 * 15, 192 * (forecast.PROMPT + 15)),
        "students measured": (measured, measured * 30, 0),
        "teacher learns": (0, 0, 24 * 270),
        "hard_only": (80, 80 * 30, 80 * (forecast.PROMPT + 30)),
        "pq": (48, pytest.approx(tokens), pytest.approx(tokens + 48 * forecast.PROMPT)),
        "evaluation": (160, 160 * 30, 0),
    }
    # Hard-Only spends what the loop's students did (192 + 120 rollouts), in whole steps of 8.
    assert works("arms.steps=0")["hard_only"].rollouts == 312
    assert works("teacher.reward=learnability", "intrinsic.attempts=5")["students measured"].rollouts == 120 + 24 * 5
    assert works("teacher.reward=none")["teacher learns"].trained == 0
    assert works("screen.attempts=0")["screening"].rollouts == 0
    assert works("problems.max_hard=4")["evaluation"].rollouts == 4 * 2 * 4
    empty = works("teacher.steps=0", 'arms.run=["base","base_t"]', "arms.steps=3")
    assert empty["students train"].rollouts == empty["students measured"].rollouts == 0
    assert empty["base_t"].rollouts == 24
    # A budget of tokens: all of it for hard_only, for pq what the loop left of it (48 x 20 + 192 x 15 + 120 x 30).
    budget = works("arms.tokens=9000", "arms.steps=0", "arms.pq_steps=0")
    assert (budget["hard_only"].rollouts, budget["pq"].sampled) == (300, 9000 - 960 - 2880 - 3600)


def test_seconds_by_hand():
    rows = [forecast.Work("loop", "a", 1.0, 500.0, 300.0), forecast.Work("arms", "b", 1.0, 100.0, 300.0, kl=True)]
    expected = forecast.Forecast(rows, {"x": 0.25}, forecast.Rates(1.0, 50.0, 30.0, "by hand"))
    assert expected.hours() == pytest.approx((20.0 + 2.0 + 10.0 * forecast.KL_FACTOR) / 3600)
    assert expected.total_line() == "  2 rollouts, 600 tokens sampled; 0.01 device-hours"
    assert "in all" in "\n".join(expected.lines()) and expected.lines()[-1].endswith("0.25")
    assert "size of the model is not known" in "\n".join(forecast.Forecast(rows, {}, None).lines())
    eight = forecast.table_rates(8.03e9)
    assert (eight.decode, eight.train) == pytest.approx((40_572 * 3.213 / 8.03, 32_966 * 3.213 / 8.03))
    assert "two CPU cores" in forecast.table_rates(168_000).source
    page = (ROOT / "docs" / "sizes.md").read_text(encoding="utf-8")
    assert all(line in page for line in sizes.table())


def test_what_is_known_beforehand(tmp_path):
    problems = write_problems(tmp_path / "p.jsonl", [Problem(str(i), f"{i} + 1?", str(i + 1)) for i in range(7)])
    config = tiny_config(f"problems.source={problems}", "problems.limit=0")
    counted = forecast.assumed(config)
    assert (counted["candidates"], counted["hard_share"]) == (7, 0.3)
    (tmp_path / "p.jsonl.evidence.json").write_text("{}")
    assert forecast.assumed(config)["hard_share"] == 1.0 and forecast.workload(config, counted)[0].rollouts == 0
    away = forecast.assumed(load("paper-math", ["problems.source=someone/somewhere", "problems.limit=77"]))
    assert (away["candidates"], away["question_tokens"]) == (77, 512)


def test_dry_run_prints_everything_and_refuses_what_cannot_work(tmp_path, capsys):
    problems = write_problems(tmp_path / "p.jsonl", [Problem(str(i), f"{i} + 1?", str(i + 1)) for i in range(8)])
    words = ["run", "--dry-run", "--model", "x/M-3B", "--problems"]
    assert main([*words, str(problems)]) == 0
    out = capsys.readouterr().out
    wanted = ("8 of 8 gold answers", "memory per device", "the size in the model's name")
    assert [text for text in (*wanted, "device-hours") if text not in out] == []
    assert '"steps":' in out and "question_tokens                 256\n" in out
    assert main([*words, "x.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "FAIL     problems    x.jsonl: cannot be read: no such file" in out
    assert main([*words, str(problems), "--verifier", "nothing"]) == 1
    assert "FAIL     golds       problems.verifier = 'nothing'" in capsys.readouterr().out


def test_a_forecast_says_what_a_run_then_spends(tmp_path):
    """Every question of the training half is a reward question and nothing is promoted: the same number, exactly."""
    learnability = ("teacher.reward=learnability", "intrinsic.attempts=5")
    changes = (*learnability, *BRIEF, "reward.questions=6", "promotion.tau=2", "arms.run=[]")
    run_tiny(tmp_path / "run", *changes)
    hard = sum(len(read_jsonl(tmp_path / "run" / "hard" / f"{half}.jsonl")) for half in ("train", "test"))
    counts = works(*changes, candidates=float(hard), hard_share=1.0)
    spent = events(tmp_path / "run", "outer_step")[-1]["student_rollouts"]
    assert counts[forecast.TRAIN].rollouts + counts[forecast.MEASURE].rollouts == spent


def test_the_model_gives_what_was_measured():
    assert scaling.measured_decode() == pytest.approx(forecast.TABLE[3].decode, rel=0.01)
    tokens = scaling.train_seconds(scaling.Setting("3B"), 1, forecast.TABLE[3].train)
    assert tokens == pytest.approx(scaling.KL_FACTOR, rel=1e-3)


@pytest.mark.parametrize(("gpus", "change"), [(8, {}), (48, {"split": True}), (48, {"per_node": True, "datasets": 8})])
def test_every_gpu_second_is_accounted_for(gpus, change):
    result = scaling.simulate(scaling.Setting(**{"model": "3B", "gpus": gpus, **change}))
    left = gpus * result.seconds - sum(result.spent.values())
    assert left == pytest.approx(0.0, abs=0.02 * gpus * result.seconds)
    assert all(value >= 0 for value in result.spent.values())


def test_the_page_quotes_the_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    scaling.main()
    printed = {line.rstrip() for line in capsys.readouterr().out.splitlines()}
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = [block.split("\n") for block in page.split("```")[1::2] if "speed-up" in block]
    quoted = [line.rstrip() for block in blocks for line in block[1:] if line.strip()]
    assert len(quoted) == 9
    assert [line for line in quoted if line not in printed] == []
