"""The forecast: counts and seconds by hand, the table of rates, memory from real files, forecast against run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import run_folders
from loop_helpers import events, read_jsonl, run_tiny, tiny_config

from soar.cli import main
from soar.config import ConfigError, load
from soar.plan.forecast import (
    KL_FACTOR,
    MEASURE,
    TABLE,
    TRAIN,
    Assumptions,
    Forecast,
    Rates,
    Work,
    assumed,
    forecast,
    table_rates,
    workload,
)

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {
    "candidates": 40.0, "hard_share": 0.5, "texts_per_pair": 2.0, "teacher_prompt_tokens": 10.0, "teacher_tokens": 20.0,
    "question_prompt_tokens": 5.0, "question_tokens": 15.0, "hard_prompt_tokens": 7.0, "hard_tokens": 30.0,
    "question_gradient_share": 0.5, "hard_gradient_share": 0.25, "promotions": 0.0,
}  # fmt: skip
GIVEN = Assumptions().with_values(NUMBERS, "given")
FIXED = ("student.extra_steps_per_promotion=0", "arms.steps=10", "arms.pq_steps=6", "arms.curriculum_steps=2")


def test_counts_by_hand() -> None:
    # 40 candidates x 4 attempts; 20 hard, 10 to train. 2 steps of 3 x 4 pairs and 6 students of 2 steps x 2 x 4 rollouts;
    # 4 reward questions x 2 for each, the baseline 3 at each of 8 questions asked; 4 arms x 10 held out x 4.
    config = tiny_config(*FIXED)
    works = {w.name: (w.rollouts, w.sampled, w.trained) for w in workload(config, GIVEN)}
    measured = 12 * 4 * 2 + 3 * 8
    assert works == {
        "screening": (160, 160 * 30, 0),
        "teacher writes": (48, 48 * 20, 0),
        "students train": (192, 192 * 15, 192 * 0.5 * 20),
        "students measured": (measured, measured * 30, 0),
        "teacher learns": (0, 0, 24 * 30),
        "hard_only": (80, 80 * 30, 80 * 0.25 * 37),
        "pq": (48, pytest.approx(16 * 15 + 32 * 30), pytest.approx(16 * 0.5 * 20 + 32 * 0.25 * 37)),
        "evaluation": (160, 160 * 30, 0),
    }


def test_counts_follow_the_config() -> None:
    def works(*changes: str, **values: float) -> dict[str, Work]:
        return {w.name: w for w in workload(tiny_config(*changes), GIVEN.with_values(values, "given"))}

    # Hard-Only spends what the loop's students did (192 + 120 rollouts), in whole steps of 8.
    assert works("student.extra_steps_per_promotion=0", "arms.steps=0")["hard_only"].rollouts == 312
    # A promotion after the first of two steps: 2, then 3 RLOO steps; the limit is 3.
    assert works(promotions=2.0)["students train"].rollouts == 6 * 8 * (2 + 3)
    assert works("teacher.reward=learnability", "intrinsic.attempts=5")["students measured"].rollouts == 120 + 24 * 5
    assert works("teacher.reward=none")["teacher learns"].trained == 0
    assert works("screen.attempts=0")["screening"].rollouts == 0
    assert works("problems.max_hard=4")["evaluation"].rollouts == 4 * 2 * 4
    # Mixed: 4 promotion questions beside 10 hard ones.
    assert works(*FIXED, "arms.curriculum_steps=0")["pq"].sampled == pytest.approx(48 * (15 * 4 + 30 * 10) / 14)
    empty = works("teacher.steps=0", 'arms.run=["base","base_t"]', "arms.steps=3")
    assert empty["students train"].rollouts == empty["students measured"].rollouts == 0
    assert empty["base_t"].rollouts == 24


def test_seconds_by_hand() -> None:
    works = (Work("loop", "a", 1.0, 500.0, 300.0), Work("arms", "b", 1.0, 100.0, 300.0, kl=True))
    expected = Forecast(works, GIVEN, Rates(1.0, 50.0, 30.0, "by hand"))
    assert expected.seconds() == [20.0, 2.0 + 10.0 * KL_FACTOR]
    assert expected.hours() == pytest.approx(37 / 3600)
    assert expected.total_line() == "  2 rollouts, 600 tokens sampled; 0.01 device-hours"
    text = "\n".join(expected.lines())
    assert "in all" in text and "37.0 s" in text and "hard_gradient_share            0.25  given" in text
    assert "no rate is known" in "\n".join(Forecast(works, GIVEN, None).lines())


def test_the_papers_setting_from_the_table() -> None:
    # 200 steps x 16 students x 10 x 8 x 32 rollouts at half of 1,024 tokens, all with a gradient because of the KL term.
    config = load("paper-math", ["problems.limit=1000", "problems.source=nowhere.jsonl"])
    assumptions = assumed(config)
    assert assumptions.origin["question_gradient_share"] == "by the KL term" and assumptions.question_tokens == 512
    expected = forecast(config, assumptions)
    by_name = dict(zip((w.name for w in expected.works), expected.seconds(), strict=True))
    rollouts = 200 * 16 * 10 * 8 * 32
    scale = 3.213e9 / 3e9
    seconds = rollouts * 512 / (40_572 * scale) + rollouts * (150 + 512) / (32_966 * scale / KL_FACTOR)
    assert by_name["students train"] == pytest.approx(seconds)
    assert (expected.works[0].name, expected.works[0].rollouts) == ("screening", 1000 * 128)


def test_the_table_is_what_was_measured_and_scales_with_size() -> None:
    results = ROOT / "benchmarks" / "results"
    decoding = json.loads((results / "h200-default.json").read_text(encoding="utf-8"))["rows"]
    training = json.loads((results / "h200-attention.json").read_text(encoding="utf-8"))["without"]["train"]["rows"]

    def rate(rows: list[dict[str, Any]], section: str) -> float:
        return next(
            float(r["tokens_per_second"]) for r in rows if r["section"] == section and "16 adapters" in r["what"]
        )

    for measured, name in zip(TABLE, ("135m", "3b"), strict=True):
        assert measured.decode == pytest.approx(rate(decoding, f"decode-{name}"), abs=1)
        assert measured.train == pytest.approx(rate(training, f"train-{name}"), abs=1)
        assert name in measured.source
    eight = table_rates(8.03e9)
    assert eight is not None
    assert (eight.decode, eight.train) == pytest.approx((40_572 * 3.213 / 8.03, 32_966 * 3.213 / 8.03))
    assert table_rates(168_000) is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("question_tokenz", 1.0, "known: candidates"),
        ("hard_share", 1.5, "from 0 to 1"),
        ("candidates", float("nan"), ">= 0"),
    ],
)
def test_assumptions_are_checked(name: str, value: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Assumptions().with_values({name: value}, "given")


def test_what_is_known_beforehand(tmp_path: Path) -> None:
    problems = tmp_path / "p.jsonl"
    problems.write_text("".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(7)))
    config = tiny_config(f"problems.source={problems}", "problems.limit=0", "student.optimizer.kl=0")
    counted = assumed(config)
    assert (counted.candidates, counted.origin["candidates"]) == (7, "counted") and "hard_share" not in counted.origin
    (tmp_path / "p.jsonl.evidence.json").write_text("{}")
    assert assumed(config).hard_share == 1.0 and workload(config, GIVEN)[0].rollouts == 0
    away = assumed(tiny_config("problems.source=someone/somewhere", "problems.limit=77"))
    assert (away.candidates, away.origin["candidates"]) == (77, "problems.limit")


def test_dry_run_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--dry-run", "--model", "x/M-3B", "--problems", "x.jsonl"]
    assert main([*words, "--assume", "question_tokens=100", "--set", "model.sampler=vllm"]) == 0
    out = capsys.readouterr().out
    assert "memory per device" in out and "the size in the model's name" in out and "device-hours" in out
    assert "by model.vllm_memory: its own 5.59 GiB" in out and '"steps":' in out
    assert out.count("evaluation ") == 1, "every stage is counted once"
    assert "question_tokens                 100  given" in out
    for wrong in ("question_tokens", "question_tokens=many", "nonsense=3"):
        assert main(["run", "--dry-run", "--assume", wrong]) == 1


def test_a_forecast_says_what_a_run_then_spends(tiny_run: Path, tmp_path: Path) -> None:
    """Every question of the training half is a reward question and nothing is promoted: the same number, exactly."""
    changes = (
        "teacher.reward=learnability",
        "intrinsic.attempts=5",
        "reward.questions=6",
        "promotion.tau=2",
        "arms.run=[]",
    )
    run_tiny(tmp_path / "run", *changes)
    hard = sum(len(read_jsonl(tmp_path / "run" / "hard" / f"{half}.jsonl")) for half in ("train", "test"))
    config = tiny_config(*changes)
    values = GIVEN.with_values({"candidates": float(hard), "hard_share": 1.0}, "given")
    expected = sum(work.rollouts for work in workload(config, values) if work.name in (TRAIN, MEASURE))
    assert expected == events(tmp_path / "run", "outer_step")[-1]["student_rollouts"]


@pytest.mark.parametrize("path", ["builtin:tiny", "x/M-3B"])
def test_the_first_outer_steps_replace_the_table(tmp_path: Path, path: str) -> None:
    """Rates by which the loop would have taken what its steps took: 40 s for each of two."""
    config = tiny_config(f'model.path="{path}"')
    run_folders.write_jsonl(tmp_path / "metrics.jsonl", [{"event": "outer_step", "step": 0, "seconds": 40.0}])
    expected = forecast(config, GIVEN, tmp_path)
    assert expected.rates is not None and expected.rates.source == "this run's own first 1 outer steps"
    loop = [s for work, s in zip(expected.works, expected.seconds(), strict=True) if work.stage == "loop"]
    assert sum(s for s in loop if s is not None) == pytest.approx(80.0)
    assert forecast(config, GIVEN, tmp_path / "nowhere").rates == forecast(config, GIVEN).rates
