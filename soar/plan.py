"""What a run would do, counted before anything is loaded (`soar run --dry-run`)."""

from __future__ import annotations

from typing import get_args

from soar.config import Config
from soar.settings import TrainedArm
from soar.workload import INTRINSIC


def plan_lines(config: Config) -> list[str]:
    """Rollouts of every stage, and the most tokens they can have, as text lines.

    The number of candidates and hard problems is known after loading and screening, and promotions only after the run,
    so the outer loop is shown as a range: from no promotion, with the baseline measured once on each reward question,
    to a promotion whenever the window allows one. A training half smaller than reward.questions makes it cheaper.
    """
    teacher, student, reward = config.teacher, config.student, config.reward
    steps, students = teacher.steps, teacher.datasets * student.repeats
    per_student = student.prompts_per_step * student.attempts
    shortest = min(student.max_steps, student.steps)
    promotions = max(0, steps - 1) // config.promotion.window
    longest = min(student.max_steps, student.steps + student.extra_steps_per_promotion * promotions)
    measured = students * reward.questions * reward.attempts
    baseline = reward.questions * (1 if reward.mode == "greedy" else reward.baseline_attempts)
    low = students * shortest * per_student + measured
    high = students * longest * per_student + measured + baseline
    low += intrinsic_attempts(config)
    high += intrinsic_attempts(config)
    all_low, all_high = (low * steps + baseline, high * steps) if steps else (0, 0)
    arms = [arm for arm in get_args(TrainedArm) if arm in config.arms.run]
    budget = config.arms.steps * per_student if config.arms.steps else all_low
    pairs = teacher.datasets * teacher.questions
    lines = [
        "plan",
        f"  screening    {config.screen.attempts} attempts at each candidate"
        + (f" ({config.problems.limit} at most)" if config.problems.limit else ""),
        f"  outer loop   {steps} steps x ({pairs} pairs of the teacher -> {students} students x {shortest} RLOO steps "
        f"x {student.prompts_per_step} prompts x {student.attempts} attempts, then {reward.questions} reward questions)",
        f"               {low:,} to {high:,} student rollouts a step, {all_low:,} to {all_high:,} in all, "
        f"at most {all_high * student.sampling.max_tokens:,} tokens",
    ]
    for arm in arms:
        fixed = config.arms.pq_steps if arm != "hard_only" and config.arms.pq_steps else config.arms.steps
        own = f"{fixed * per_student:,}" if fixed else f"at least {budget:,}"
        lines.append(f"  {arm:12s} {own} student rollouts")
    lines.append(
        f"  evaluation   {config.evaluate.attempts} attempts at each held-out problem for {len(config.arms.run)} arms"
    )
    return lines


def intrinsic_attempts(config: Config) -> int:
    """Attempts of the baseline student at the written questions of one outer step, for an intrinsic teacher reward."""
    if config.teacher.reward not in INTRINSIC:
        return 0
    return config.teacher.datasets * config.teacher.questions * config.intrinsic.attempts
