"""Settings that make a run on the embedded world a matter of seconds: enough to see every stage, too few to learn."""

SMALL = {
    "threads": 1,
    "problems.limit": 16,
    "screen.attempts": 8,
    "screen.max_successes": 8,
    "teacher.steps": 2,
    "teacher.questions": 6,
    "student.steps": 2,
    "student.prompts_per_step": 4,
    "student.attempts": 4,
    "reward.questions": 8,
    "reward.attempts": 4,
    "reward.baseline_attempts": 4,
    "promotion.window": 1,
    "promotion.tau": -1.0,
    "arms.steps": 2,
    "arms.pq_steps": 2,
    "evaluate.attempts": 8,
    "evaluate.ks": [1, 8],
    "evaluate.bootstrap": 100,
}
