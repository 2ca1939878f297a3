"""Run folders for tests: seeded, with everything that a short run of the embedded world writes, and small."""

import json
import random
from pathlib import Path
from typing import Any

from tables import cases

HOSTILE = [text for (text,) in cases("run_folders", "hostile")]
TOPICS = ("counter", "reverse", "ill-posed")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def change(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


def arm(pass_1: float, spread: float, rollouts: int) -> dict[str, Any]:
    """An arm whose pass@k grows with k; intervals are relative to pass@k, kept within [0, 1]."""
    pass_at = {str(k): round(1 - (1 - pass_1) ** (k**0.75), 4) for k in (1, 4, 8, 16, 32)}
    interval = {k: [round(max(0, v * (1 - spread)), 4), round(min(1, v * (1 + spread)), 4)] for k, v in pass_at.items()}
    return {"pass_at": pass_at, "interval_95": interval, "problems": 96, "attempts": 32, "student_rollouts": rollouts}


def outer_step(rng: random.Random, step: int, datasets: int) -> dict[str, Any]:
    rewards = [round(rng.gauss(0.02, 0.02), 4) for _ in range(datasets)]
    promoted = step in (5, 9, 14)
    return {
        "event": "outer_step", "step": step, "reward_G": rewards, "reward_mean": sum(rewards) / datasets,
        "reward_se_G": [0.008] * datasets, "baseline_pass_rate": 0.09, "best_pass_rate": 0.09 + max(rewards),
        "window_mean": None if step < 3 else 0.0125, "promoted": promoted,
        "reason": "window mean above tau" if promoted else "window mean not above tau", "accepted": 16 * datasets,
        "sampled": 16 * datasets + step, "rejected": {"no_answer": step, "truncated": 0}, "distinct_share": 0.97,
        "vendi": 31.25 - 0.5 * step, "teacher_kl": 0.002 * step, "failed_students": 0,
        "student_rollouts": step * datasets * 1920, "seconds": 10.5,
    }  # fmt: skip


def question(rng: random.Random, step: int, dataset: int, reward: float) -> dict[str, Any]:
    topic, start = rng.choice(TOPICS), rng.randrange(100)
    row: dict[str, Any] = {"question": f"{topic} {start:02d} a+7", "answer": f"{(start + 7) % 100:02d}"}
    posed = topic != "ill-posed"
    row |= {"topic": topic, "well_posed": posed, "correct": posed and rng.random() < 0.75}
    return {"step": step, "dataset": dataset, "reward": reward, **row}


def write_run(folder: Path, steps: int = 18, datasets: int = 4, per_dataset: int = 16, hostile: bool = True) -> Path:
    """A finished run folder with four arms. The first questions of the first datasets are hostile text."""
    rng = random.Random(0)
    config = {"name": "tiny", "model": {"path": "builtin:tiny"}, "promotion": {"tau": 0.01, "window": 3}}
    manifest = {"name": "tiny", "config": config, "seed": 0, "started_at": "2026-01-31T09:30:00+00:00"}
    manifest["command"] = ["soar", "run", "--out", "runs/demo", "--set", "name=my demo"]
    manifest |= {"versions": {"torch": "2.13.0"}, "hashes": {"prompts": "77ab01ce"}}
    write_json(folder / "manifest.json", manifest)
    histogram = {"0": 192, "<= 2 %": 303, "2-10 %": 100, "10-50 %": 50}
    metrics = [{"event": "screen", "candidates": 645, "hard": 192, "attempts": 128, "histogram": histogram}]
    questions: list[dict[str, Any]] = []
    pq: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        metrics.append(event := outer_step(rng, step, datasets))
        rewards = event["reward_G"]
        written = [[question(rng, step, k, rewards[k]) for _ in range(per_dataset)] for k in range(datasets)]
        questions += [row for rows in written for row in rows]
        if event["promoted"]:
            best = rewards.index(max(rewards))
            metrics.append({"event": "promotion", "step": step, "dataset": best, "pass_rate": event["best_pass_rate"]})
            pq += written[best]
    for row, text in zip(questions[::per_dataset] if hostile else (), HOSTILE, strict=False):
        row["question"], row["answer"] = text, text
    metrics.append({"event": "alarm", "kind": "failed_student", "message": "student (7, 2, 0) diverged", "step": 7})
    for name, mixed in (("hard_only", 0.03), ("pq", 0.6)):
        rates = {"frac_mixed": mixed, "frac_all_right": 0.01, "frac_all_wrong": 0.99 - mixed}
        metrics += [{"event": "arm_step", "arm": name, "step": i, **rates} for i in range(1, 61)]
    budget = steps * datasets * 1920
    arms = {"base": arm(0.0006, 0.9, 0), "hard_only": arm(0.021, 0.4, budget), "ps": arm(0.123, 0.26, budget)}
    arms["pq"] = {**arm(0.197, 0.22, budget), "search_rollouts": budget}
    metrics += [{"event": "evaluation", "arm": name, **value} for name, value in arms.items()]
    write_jsonl(folder / "metrics.jsonl", metrics)
    write_jsonl(folder / "questions.jsonl", questions)
    write_jsonl(folder / "pq.jsonl", pq)
    for half in ("train", "test"):
        hard = [{"question": f"hard {half} {i}", "answer": f"{i:02d}", "truncated": i % 3} for i in range(96)]
        rows = [{"id": f"{half}-{i}", **row, "successes": 0, "attempts": 128} for i, row in enumerate(hard)]
        write_jsonl(folder / "hard" / f"{half}.jsonl", rows)
    wall = {"screen": 41.2, "loop": 196.4, "hard_only": 61.0, "pq": 58.3, "evaluate": 33.9}
    summary = {"arms": arms, "promotions": 3, "outer_steps": steps, "seed": 0, "wall_seconds": wall}
    write_json(folder / "summary.json", summary)
    return folder
