"""What the cells of a study of sums say beside its tables: learning curves, successes by length, right promotion questions.

    python benchmarks/cells.py studies/smollm2 [--steps 16 32 48 64] [--mean 8] [--problems hard.jsonl]

Reads the run folders in FOLDER/cells (unfinished ones too) and prints three Markdown tables. Pass rates of training: mean of
the attempts in the `--mean` steps that end with the step named, in percent; first hit: first step behind those on questions
alone in which an attempt was right. Held out: right attempts at the problems with so many numbers. Questions: promotion
questions, how many of them have the right answer (for `problems.format = "totals"` every running total). With the file of the
candidates also: attempts of the base model in the screening of all cells, and how many were right, by the number of numbers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from ladder import answer_of, terms_of

from soar.config import HARD_ARMS
from soar.files import read_jsonl, read_object
from soar.problems.load import load_problems


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that are whole, [] without it."""
    return read_jsonl(path)[0]


def config_of(run: Path) -> dict[str, Any]:
    """The config of a run folder."""
    return dict(read_object(run / "manifest.json")[0]["config"])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def curves(run: Path, steps: list[int], mean: int) -> list[list[str]]:
    """Per trained arm of a run: name, pass rate in percent before each of `steps` (-: not trained so far), first hit."""
    config = config_of(run)
    rates: dict[str, list[float]] = {}
    for row in rows_of(run / "metrics.jsonl"):
        if row.get("event") == "arm_step":
            rates.setdefault(row["arm"], []).append(row["pass_rate"] or 0.0)
    found = []
    for arm, rate_S in rates.items():
        windows = [rate_S[max(0, step - mean) : step] if step <= len(rate_S) else [] for step in steps]
        behind = 0 if arm in HARD_ARMS else config["arms"]["curriculum_steps"]
        hit = next((s + 1 for s in range(behind, len(rate_S)) if rate_S[s] > 0), None)
        cells = [f"{100 * sum(window) / len(window):.2f}" if window else "–" for window in windows]
        found.append([arm, *cells, str(hit or "–")])
    return found


def by_length(run: Path) -> list[list[str]]:
    """Per number of terms of the held-out problems of a run: that number, problems, right attempts of each arm."""
    terms = {row["id"]: terms_of(row["question"]) for row in rows_of(run / "hard" / "test.jsonl")}
    head, *rows = rows_of(run / "state" / "evaluation.jsonl") or [{"arms": {}}]
    problems, right = Counter[int](), Counter[tuple[int, str]]()
    for row in rows:
        problems[terms[row["id"]]] += 1
        for arm, correct in zip(head["arms"], row["correct"], strict=True):
            right[terms[row["id"]], arm] += correct
    return [
        [str(n), str(problems[n]), " ".join(f"{arm} {right[n, arm]}" for arm in head["arms"])] for n in sorted(problems)
    ]


def questions(run: Path) -> list[str]:
    """Promotion questions of a run, and how many have the right answer."""
    totals = config_of(run)["problems"]["format"] == "totals"
    rows = rows_of(run / "pq.jsonl")
    return [str(len(rows)), str(sum(answer_of(row["question"], totals) == row["answer"] for row in rows))]


def screened(runs: list[Path], problems: Path) -> list[list[str]]:
    """Per number of terms: attempts of the base model in the screening of the runs, and how many were right."""
    terms = {problem.id: terms_of(problem.question) for problem in load_problems(str(problems))[0]}
    attempts, right = Counter[int](), Counter[int]()
    rows = {(run, row["id"]): row for run in runs for row in rows_of(run / "hard" / "screen.jsonl") if "id" in row}
    for row in rows.values():  # the last line of an id counts
        attempts[terms[row["id"]]] += row["attempts"]
        right[terms[row["id"]]] += row["successes"]
    return [[str(n), f"{attempts[n]:,}", str(right[n])] for n in sorted(attempts)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32, 48, 64])
    parser.add_argument("--mean", type=int, default=8)
    parser.add_argument("--problems", type=Path, help="file of the candidates")
    arguments = parser.parse_args()
    runs = sorted(path for path in (arguments.folder / "cells").iterdir() if (path / "manifest.json").is_file())
    rows = [[run.name, *row] for run in runs for row in curves(run, arguments.steps, arguments.mean)]
    print(table(["cell", "arm", *(f"step {step}, %" for step in arguments.steps), "first hit"], rows) + "\n")
    rows = [[run.name, *row] for run in runs for row in by_length(run)]
    print(table(["cell", "numbers", "problems", "right attempts"], rows) + "\n")
    print(table(["cell", "promotion questions", "right answer"], [[run.name, *questions(run)] for run in runs]))
    if arguments.problems:
        print("\n" + table(["numbers", "attempts in screening", "right"], screened(runs, arguments.problems)))


if __name__ == "__main__":
    main()
