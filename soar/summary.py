"""summary.json from the events of a run and its config. Pure, needs no torch.

Nothing but the wall times comes from anywhere else, so that every number can be recomputed from metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soar import seeds
from soar.config import Config
from soar.evaluate import paired_difference

Row = dict[str, Any]


def summary_of(rows: Sequence[Row], config: Config, wall_seconds: dict[str, float]) -> Row:
    """The summary of a run with the events `rows`. docs/metrics.md has its fields."""
    steps = [row for row in rows if row["event"] == "outer_step"]
    evaluations = {row["arm"]: row for row in rows if row["event"] == "evaluation"}
    arms = {
        arm: {k: v for k, v in row.items() if k not in ("event", "arm", "correct")} for arm, row in evaluations.items()
    }
    promotions = sum(row["event"] == "promotion" for row in rows)
    expected = next((row["stage_seconds"] for row in rows if row["event"] == "forecast"), None)
    for arm, entry in arms.items():
        own_questions = arm.startswith("pq") and not config.arms.pq_from
        own_teacher = arm == "teacher_t" and not config.arms.teacher_from
        if own_questions or own_teacher or arm == "ps_hard":
            entry["search_rollouts"] = steps[-1]["student_rollouts"] if steps else 0
    return {
        "arms": arms,
        "paired": _paired(evaluations, config),
        "promotions": promotions,
        "outer_steps": len(steps),
        "loop_end": loop_end(config, len(steps), promotions),
        "seed": config.seed,
        "teacher_rollouts": sum(row["sampled"] for row in steps),
        "wall_seconds": {name: round(seconds, 1) for name, seconds in wall_seconds.items()},
        **({} if expected is None else {"forecast": expected}),
    }


def _paired(evaluations: dict[str, Row], config: Config) -> Row:
    others = [arm for arm in evaluations if arm not in ("base", "hard_only")]
    pairs = [(arm, "hard_only") for arm in others if "hard_only" in evaluations]
    seed, settings = seeds.derive(config.seed, "paired"), config.evaluate
    return {
        f"{a} - {b}": {
            str(k): paired_difference(
                evaluations[a]["correct"], evaluations[b]["correct"], settings.attempts, k, seed, settings.bootstrap
            )
            for k in settings.ks
        }
        for a, b in pairs
    }


def loop_end(config: Config, steps: int, promotions: int) -> str | None:
    """Which key ends the outer loop after so many steps and promotions; None while it goes on."""
    limit = config.limits.max_promotions
    if limit and promotions >= limit:
        return f"limits.max_promotions = {limit}"
    return f"teacher.steps = {config.teacher.steps}" if steps >= config.teacher.steps else None
