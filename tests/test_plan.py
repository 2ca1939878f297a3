"""What `--dry-run` promises, by hand and against what runs then spend."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from loop_helpers import events, run_tiny, tiny_config

from soar.plan.forecast import plan_lines


def numbers(line: str) -> list[int]:
    return [int(text.replace(",", "")) for text in re.findall(r"\d[\d,]*", line)]


def test_a_plan_says_what_the_run_then_spends(tiny_run: Path, tmp_path: Path) -> None:
    low, high, all_low, all_high, tokens = numbers(plan_lines(tiny_config())[3])
    steps = events(tiny_run, "outer_step")
    spent = np.diff([0, *[row["student_rollouts"] for row in steps]])
    assert all(low <= rollouts <= high for rollouts in spent)
    assert all_low <= steps[-1]["student_rollouts"] <= all_high
    assert tokens == all_high * tiny_config().student.sampling.max_tokens
    # Every question of the training half is a reward question and nothing is promoted: the lower end, exactly.
    changes = ("reward.questions=6", "promotion.tau=2", "arms.run=[]")
    run_tiny(tmp_path / "run", *changes)
    rollouts = events(tmp_path / "run", "outer_step")[-1]["student_rollouts"]
    assert rollouts == numbers(plan_lines(tiny_config(*changes))[3])[2]


def test_a_plan_by_hand() -> None:
    config = tiny_config(
        "teacher.steps=5",
        "student.steps=15",
        "student.max_steps=10",
        "reward.mode=greedy",
        "reward.attempts=1",
        "arms.steps=0",
        "arms.pq_steps=3",
    )
    lines = plan_lines(config)
    assert "6 students x 10 RLOO steps" in lines[2]
    step = 6 * 10 * 8 + 6 * 4
    assert numbers(lines[3])[:4] == [step, step + 4, 5 * step + 4, 5 * (step + 4)]
    assert lines[4].split() == ["hard_only", "at", "least", f"{5 * step + 4:,}", "student", "rollouts"]
    assert lines[5].split() == ["pq", "24", "student", "rollouts"]
    assert lines[1] == "  screening    4 attempts at each candidate (12 at most)"
    assert lines[-1] == "  evaluation   4 attempts at each held-out problem for 4 arms"


def test_promotions_lengthen_the_plan_only_as_far_as_the_window_allows() -> None:
    common = ("teacher.steps=7", "student.steps=10", "student.max_steps=20", "student.extra_steps_per_promotion=5")
    for window, longest in ((3, 20), (6, 15), (7, 10)):
        config = tiny_config(*common, f"promotion.window={window}")
        assert numbers(plan_lines(config)[3])[1] == 6 * longest * 8 + 6 * 4 * 2 + 4 * 3


def test_an_intrinsic_reward_is_in_the_plan(tmp_path: Path) -> None:
    changes = ("teacher.reward=band", "intrinsic.attempts=5", "reward.questions=6", "promotion.tau=2", "arms.run=[]")
    run_tiny(tmp_path / "run", *changes)
    rollouts = events(tmp_path / "run", "outer_step")[-1]["student_rollouts"]
    assert rollouts == numbers(plan_lines(tiny_config(*changes))[3])[2]
    plain = numbers(plan_lines(tiny_config(*changes, "teacher.reward=grounded"))[3])[2]
    assert rollouts - plain == 2 * 12 * 5


def test_a_plan_without_an_outer_loop() -> None:
    lines = plan_lines(tiny_config("teacher.steps=0", "arms.steps=3", 'arms.run=["base", "base_t", "real"]'))
    assert numbers(lines[3])[2:] == [0, 0, 0]
    assert [line.split()[:2] for line in lines[4:6]] == [["base_t", "24"], ["real", "24"]]
