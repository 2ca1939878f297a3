"""Run folders for tests: seeded, as realistic as a short run of the embedded world, and small."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

HOSTILE = (
    "<script>document.title='owned'</script>",
    "{{7*7}} {% raw %} ${7*7}",
    "safe \u202egnp.exe\u202c end",
    "\x1b[31mred\x1b[0m bell\x07",
    "zero\x00byte",
    '"><img src=x onerror=alert(1)>',
    "</td></table></style></script><!--",
    "lone \ud800 surrogate",
    "z\u0300\u0301\u0302\u0303algo \u200bzero-width \ufeffmark",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
)
TOPICS = ("counter", "reverse", "sort", "max", "times", "ill-posed")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arm(pass_1: float, spread: float, rollouts: int, ks: tuple[int, ...] = (1, 4, 8, 16, 32)) -> dict[str, Any]:
    """An arm whose pass@k grows with k; intervals are relative to pass@k, kept within [0, 1]."""
    pass_at = {str(k): round(1 - (1 - pass_1) ** (k**0.75), 4) for k in ks}
    interval = {k: [round(max(0, v * (1 - spread)), 4), round(min(1, v * (1 + spread)), 4)] for k, v in pass_at.items()}
    return {
        "pass_at": pass_at,
        "interval_95": interval,
        "problems": 96,
        "attempts": 32,
        "student_rollouts": rollouts,
    }


def paired_entry(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Differences of pass@k with an interval of 4 percentage points to either side."""
    entry = {}
    for k, share in one["pass_at"].items():
        difference = round(share - other["pass_at"][k], 4)
        entry[k] = {"difference": difference, "interval_95": [round(difference - 0.04, 4), round(difference + 0.04, 4)]}
    return entry


def question(rng: random.Random, topic: str) -> tuple[str, str]:
    start, length = rng.randrange(100), rng.randrange(1, 4)
    addends = [rng.randrange(1, 10) for _ in range(length)]
    if topic != "counter":
        word = "".join(rng.choice("abcdefgh") for _ in range(5))
        return f"{topic} {word}", word[::-1]
    steps = " ".join(f"{label}+{a}" for label, a in zip("abcdef", addends, strict=False))
    return f"{start:02d} {steps}", f"{(start + sum(addends)) % 100:02d}"


def outer_step(rng: random.Random, step: int, datasets: int, moved: int) -> dict[str, Any]:
    centre = 0.012 + 0.03 * math.sin(step / 3) + (0.01 if step > 5 else 0)
    rewards = [round(centre + rng.gauss(0, 0.02), 4) for _ in range(datasets)]
    baseline = min(0.45, 0.002 + 0.09 * moved)
    return {
        "event": "outer_step",
        "step": step,
        "reward_G": rewards,
        "reward_mean": sum(rewards) / datasets,
        "reward_se_G": [round(abs(rng.gauss(0.008, 0.002)), 4) for _ in range(datasets)],
        "baseline_pass_rate": baseline,
        "best_pass_rate": baseline + max(rewards),
        "window_mean": None if step < 3 else round(centre, 4),
        "promoted": step in (5, 9, 14),
        "reason": "window mean above tau" if step in (5, 9, 14) else "window mean not above tau",
        "accepted": 16 * datasets,
        "sampled": 16 * datasets + rng.randrange(40),
        "rejected": {"no_answer": rng.randrange(12), "truncated": rng.randrange(6), "duplicate": rng.randrange(3)},
        "distinct_share": round(0.97 - 0.004 * step, 3),
        "vendi": round(31.25 - 0.5 * step, 3),
        "teacher_kl": round(0.002 * step, 4),
        "failed_students": 1 if step == 7 else 0,
        "student_rollouts": step * datasets * 15 * 128,
        "seconds": round(9 + rng.random() * 4, 2),
    }


def questions_of(rng: random.Random, step: int, dataset: int, reward: float, n: int) -> list[dict[str, Any]]:
    rows = []
    for _ in range(n):
        counter = rng.random() < 0.3 + 0.015 * step
        topic = "counter" if counter else rng.choice(TOPICS[1:])
        text, answer = question(rng, topic)
        rows.append(
            {
                "step": step,
                "dataset": dataset,
                "question": text,
                "answer": answer,
                "reward": reward,
                "topic": topic,
                "well_posed": topic != "ill-posed",
                "correct": topic != "ill-posed" and rng.random() < 0.75,
            }
        )
    return rows


def hard_rows(rng: random.Random, n: int, prefix: str) -> list[dict[str, Any]]:
    rows = []
    for i in range(n):
        text, answer = question(rng, "counter")
        rows.append(
            {
                "id": f"{prefix}{i}",
                "question": text,
                "answer": answer,
                "successes": 0,
                "attempts": 128,
                "truncated": i % 3,
            }
        )
    return rows


def arm_steps(name: str, mixed: float, steps: int, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        share = min(0.9, max(0.0, mixed * step / steps + rng.gauss(0, 0.02)))
        right = share / 3
        row = {"event": "arm_step", "arm": name, "step": step, "frac_mixed": share, "frac_all_right": right}
        rows.append(row | {"frac_all_wrong": max(0.0, 1 - share - right), "reward_mean": share / 2})
    return rows


def write_run(
    folder: Path,
    seed: int = 0,
    steps: int = 18,
    datasets: int = 4,
    per_dataset: int = 16,
    hostile: bool = True,
    paired: bool = True,
) -> Path:
    """A finished run folder with all four arms. The first questions of the first datasets are hostile text."""
    rng = random.Random(seed)
    config = {"name": "tiny", "seed": seed, "model": {"path": "builtin:tiny"}, "promotion": {"tau": 0.01, "window": 3}}
    manifest = {
        "name": "tiny",
        "command": ["soar", "run", "--out", "runs/demo", "--set", "name=my demo"],
        "config": config,
        "versions": {"soar": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "hashes": {"model": "9f2c61d0", "prompts": "77ab01ce"},
        "seed": seed,
        "started_at": "2026-01-31T09:30:00+00:00",
    }
    write_json(folder / "manifest.json", manifest)
    histogram = {"0": 192, "<= 2 %": 153, "2-10 %": 150, "10-50 %": 100, "50-100 %": 30, "all": 20}
    candidates = sum(histogram.values())
    screen = {"event": "screen", "candidates": candidates, "hard": 192, "attempts": 128, "histogram": histogram}
    metrics: list[dict[str, Any]] = [screen]
    questions: list[dict[str, Any]] = []
    pq: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        event = outer_step(rng, step, datasets, sum(s < step for s in (5, 9, 14)))
        rewards = event["reward_G"]
        best = rewards.index(max(rewards))
        by_dataset = [questions_of(rng, step, k, rewards[k], per_dataset) for k in range(datasets)]
        questions += [row for rows in by_dataset for row in rows]
        metrics.append(event)
        if event["promoted"]:
            chosen = {"step": step, "dataset": best, "repeat": 0, "reward": rewards[best], "questions": per_dataset}
            metrics.append({"event": "promotion", "pass_rate": event["best_pass_rate"], **chosen})
            pq += by_dataset[best]
    if hostile:
        for row, text in zip(questions[::per_dataset], HOSTILE, strict=False):
            row["question"], row["answer"] = text, text
    message = "student (7, 2, 0) diverged: loss is NaN; its trial is left out"
    metrics.append({"event": "alarm", "kind": "failed_student", "message": message, "step": 7})
    metrics += arm_steps("hard_only", 0.03, 240, rng) + arm_steps("pq", 0.6, 240, rng)
    budget = steps * datasets * 15 * 128
    arms = {
        "base": arm(0.0006, 0.9, 0),
        "hard_only": arm(0.021, 0.4, budget),
        "ps": arm(0.123, 0.26, budget),
        "pq": {**arm(0.197, 0.22, budget), "search_rollouts": budget},
    }
    metrics += [{"event": "evaluation", "arm": name, **value} for name, value in arms.items()]
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "pq.jsonl", pq)
    write_jsonl(folder / "hard" / "train.jsonl", hard_rows(rng, 96, "train-"))
    write_jsonl(folder / "hard" / "test.jsonl", hard_rows(rng, 96, "test-"))
    wall = {"screen": 41.2, "loop": 196.4, "hard_only": 61.0, "pq": 58.3, "evaluate": 33.9}
    summary = {"arms": arms, "promotions": 3, "outer_steps": steps, "seed": seed, "wall_seconds": wall}
    if paired:
        summary["paired"] = {
            f"{name} - hard_only": paired_entry(arms[name], arms["hard_only"]) for name in ("ps", "pq")
        }
    write_json(folder / "summary.json", summary)
    return folder
