"""What the teachers of a study, or of one run, on an embedded world asked, step by step.

    python benchmarks/teacher_drift.py studies/teachers [--steps 0 4 9 14 19]
    python benchmarks/teacher_drift.py runs/demo --steps 0 3 7

For every variant, over its seeds: the share of useful questions (the hard set's topic, with its rare skill), how many of
those have the right answer, the share of ill-posed texts, and the share of different questions. Read from the cells'
questions.jsonl and judged by the world's oracle. Below each row the commonest first words of the last step, and what one
more question of a kind added to the reward of its dataset (least squares within steps, beside a well-posed question that is
not useful; standard error); of one run also the questions that its arms trained on.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from world import carrying_steps

from soar.domains.world import World, get_world
from soar.files import read_jsonl

KINDS = ("useful and right", "useful and wrong", "ill-posed")


def kind(row: dict[str, Any], world: World) -> int:
    """Place in KINDS of a question; 3: none of them."""
    right = world.solve(row["question"])
    if carrying_steps(row["question"]):
        return int(right != row["answer"])
    return 2 if right is None else 3


def counted(rows: list[dict[str, Any]], world: World) -> tuple[int, int, int]:
    """How many questions are useful, how many of these have the right answer, and how many are ill-posed."""
    counts = Counter(kind(row, world) for row in rows)
    return counts[0] + counts[1], counts[0], counts[2]


def shares(rows: list[dict[str, Any]], world: World) -> tuple[float, float, float, float]:
    """(useful, right of useful, ill-posed, distinct) of the questions of one step."""
    (useful, right, ill_posed), all_of = counted(rows, world), len(rows)
    return useful / all_of, right / max(1, useful), ill_posed / all_of, len({row["question"] for row in rows}) / all_of


def worth(rows: list[dict[str, Any]], world: World) -> str:
    """What one question of each kind adds to the reward of its dataset, in words."""
    sets = dict[tuple[Any, ...], list[float]]()
    for row in rows:
        if row["reward"] is not None:
            of = sets.setdefault((row["run"], row["step"], row["dataset"]), [0.0, 0.0, 0.0, 0.0, row["reward"]])
            of[kind(row, world)] += 1
    places = np.unique([f"{run} {step}" for run, step, _ in sets], return_inverse=True)[1]
    table = np.array(list(sets.values()))
    for step in range(places.max() + 1):
        table[places == step] -= table[places == step].mean(0)
    counts, reward = table[:, :3], table[:, 4]
    effect = np.linalg.lstsq(counts, reward, rcond=None)[0]
    noise = ((reward - counts @ effect) ** 2).sum() / (len(reward) - 3 - places.max() - 1)
    error = np.sqrt(noise * np.diag(np.linalg.pinv(counts.T @ counts)))
    return ", ".join(f"{name} {e:+.4f} ± {s:.4f}" for name, e, s in zip(KINDS, effect, error, strict=True))


def cells_of(folder: Path) -> dict[str, list[Path]]:
    """Variant -> its cells that have written questions; of a run folder itself."""
    found = {folder.name: [folder]} if (folder / "questions.jsonl").is_file() else dict[str, list[Path]]()
    for path in sorted(folder.glob("cells/*-seed*/questions.jsonl")):
        found.setdefault(path.parent.name.rpartition("-seed")[0], []).append(path.parent)
    return found


def main() -> None:
    """Print the table of every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 4, 9, 14, 19])
    arguments = parser.parse_args()
    print("useful / right of useful / ill-posed / distinct, in %")
    print(f"{'variant':14s}" + "".join(f"{f'step {step}':>20s}" for step in arguments.steps))
    for variant, folders in cells_of(arguments.folder).items():
        source = json.loads((folders[0] / "manifest.json").read_text(encoding="utf-8"))["config"]["problems"]["source"]
        world = get_world(source.removeprefix("world:"))
        rows = [{"run": f.name, **row} for f in folders for row in read_jsonl(f / "questions.jsonl")[0]]
        last = [row["question"] for row in rows if row["step"] == max(arguments.steps)]
        words = Counter("number" if text[:1].isdigit() else text.split(" ")[0] for text in last).most_common(3)
        line = f"{variant:14s}"
        for step in arguments.steps:
            here = [row for row in rows if row["step"] == step]
            line += (
                f"{' / '.join(f'{100 * share:.0f}' for share in shares(here, world)):>20s}" if here else f"{'-':>20s}"
            )
        print(line)
        print(f"{'':14s}" + ", ".join(f"{word} {100 * count / len(last):.0f} %" for word, count in words), flush=True)
        print(f"{'':14s}one question adds to its reward: {worth(rows, world)}", flush=True)
        for path in sorted(arguments.folder.glob("arms/*/questions.jsonl")):
            useful, right, _ = counted(read_jsonl(path)[0], world)
            print(f"{path.parent.name}: {useful} useful, {right} of them with a right answer")


if __name__ == "__main__":
    main()
