"""What a run would do, counted before anything is loaded (`soar run --dry-run`)."""

from __future__ import annotations

from soar.config import Config


def plan_lines(config: Config) -> list[str]:
    """Rollouts of every stage, and the most tokens they can have, as text lines.

    Counts are exact for what the config fixes; the number of candidates and hard problems is known after loading and
    screening, promotions only after the run (they lengthen the inner loop: shown for none and for the longest).
    """
    teacher, student, reward = config.teacher, config.student, config.reward
    students = teacher.datasets * student.repeats
    per_student = student.prompts_per_step * student.attempts
    longest = min(student.max_steps, max(student.steps, student.max_steps))
    measured = students * reward.questions * reward.attempts
    low = students * student.steps * per_student + measured
    high = students * longest * per_student + measured
    steps = teacher.steps
    arms = [arm for arm in ("hard_only", "pq") if arm in config.arms.run]
    budget = config.arms.steps * per_student if config.arms.steps else low * steps
    pairs = teacher.datasets * teacher.questions
    lines = [
        "plan",
        f"  screening    {config.screen.attempts} attempts at each candidate"
        + (f" ({config.problems.limit} at most)" if config.problems.limit else ""),
        f"  outer loop   {steps} steps x ({pairs} pairs of the teacher -> {students} students x {student.steps} RLOO steps "
        f"x {student.prompts_per_step} prompts x {student.attempts} attempts, then {reward.questions} reward questions)",
        f"               {low:,} to {high:,} student rollouts a step, {low * steps:,} to {high * steps:,} in all, "
        f"at most {high * steps * student.sampling.max_tokens:,} tokens",
    ]
    for arm in arms:
        own = config.arms.pq_steps * per_student if arm == "pq" and config.arms.pq_steps else budget
        lines.append(f"  {arm:12s} {'about ' if not config.arms.steps else ''}{own:,} student rollouts")
    lines.append(f"  evaluation   {config.evaluate.attempts} attempts at each held-out problem for {len(config.arms.run)} arms")
    return lines
