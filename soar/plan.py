"""What a run would do, counted before anything is loaded (`soar run --dry-run`)."""

from __future__ import annotations

import re
from typing import get_args

from soar.config import Config
from soar.settings import TrainedArm

SIZE = re.compile(r"(?<![\w.])(\d{1,4}(?:\.\d{1,3})?)([bBmM])(?![a-zA-Z0-9])")
RATE_PARAMETERS = 3.2e9
DECODE_RATE = 23_700.0  # tokens a second
TRAIN_RATE = 19_000.0
RATE_SOURCE = "one H200, shape of Llama-3.2-3B, 1,024 rows of 16 adapters, bfloat16"
ADAPTER_PER_RANK = 1.52e6  # parameters of a rank-1 adapter on every linear layer of Llama-3.2-3B


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
    return lines + forecast_lines(config, all_high)


def intrinsic_attempts(config: Config) -> int:
    """Attempts of the baseline student at the written questions of one outer step, for an intrinsic teacher reward."""
    if config.teacher.reward not in ("learnability", "uncertainty", "band"):
        return 0
    return config.teacher.datasets * config.teacher.questions * config.intrinsic.attempts


def forecast_lines(config: Config, loop_rollouts: int) -> list[str]:
    """Memory and GPU-hours of a model whose name tells its size (`-3B`, `135M`), none otherwise.

    An upper bound: every completion is taken to use its whole budget. Hours = (tokens decoded / DECODE_RATE + tokens
    trained / TRAIN_RATE) x parameters / RATE_PARAMETERS / 3600, rates as measured on the GPU that RATE_SOURCE names.
    Bytes: weights in bfloat16; an adapter's float32 weights, gradients and two AdamW moments, its size in proportion to
    parameters^(2/3), as layers times width. The key-value cache and activations come on top: the sampler fills what is left.
    """
    parameters = named_size(config.model.path)
    if parameters is None:
        return []
    student, teacher = config.student, config.teacher
    arms = [arm for arm in config.arms.run if arm not in ("base", "ps")]
    per_arm = (config.arms.steps * student.prompts_per_step * student.attempts) or loop_rollouts
    pairs = teacher.steps * teacher.datasets * teacher.questions
    trained = (loop_rollouts + len(arms) * per_arm) * student.sampling.max_tokens + pairs * teacher.sampling.max_tokens
    seconds = trained * (1 / DECODE_RATE + 1 / TRAIN_RATE) * parameters / RATE_PARAMETERS
    policies = teacher.datasets * student.repeats + 2
    lora = ADAPTER_PER_RANK * config.model.lora_rank * (parameters / RATE_PARAMETERS) ** (2 / 3)
    weights, adapters = parameters * 2 / 2**30, policies * lora * 16 / 2**30
    return [
        f"  memory       {weights:.1f} GiB of weights ({parameters / 1e9:.3g}B parameters, by the name of the model), "
        f"{adapters:.1f} GiB of {policies} adapters with optimizer, more for the sampler",
        f"  GPU-hours    at most {seconds / 3600:,.0f} for loop and arms, without screening and evaluation, if every "
        f"completion uses its whole budget; rates: {RATE_SOURCE}",
    ]


def named_size(path: str) -> float | None:
    """Parameters by the size in a model's name: `Llama-3.2-3B-Instruct` -> 3e9; None where there is none."""
    match = SIZE.search(path.rstrip("/").rpartition("/")[2])
    return None if match is None else float(match[1]) * {"b": 1e9, "m": 1e6}[match[2].lower()]
