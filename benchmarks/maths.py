"""Print the figures of docs/results/maths.md from the counts beside it: the second kill test, and the teacher's questions.

python benchmarks/maths.py [docs/results]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from scipy.stats import fisher_exact

from soar.loop.statistics import clopper_pearson, pass_at_k


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/results")
    first, events = {row["id"] for row in rows(folder / "maths-screen-1.5b.jsonl")}, rows(folder / "maths-kill-2.jsonl")
    ids = next(row["ids"] for row in events if row["event"] == "held_out")
    solved = {}
    for row in (row for row in events if row["event"] == "evaluation"):
        steps, n = [e for e in events if e["event"] == "arm_step" and e["arm"] == row["arm"]], row["attempts"]
        counts = [count for name, count in zip(ids, row["correct"], strict=True) if name not in first]
        easy = sum(row["correct"]) - sum(counts)
        hit = solved[row["arm"]] = sum(count > 0 for count in counts)
        low, high = clopper_pearson(hit, len(counts))
        means = ", ".join(f"pass@{k} {sum(pass_at_k(n, c, k) for c in counts) / len(counts):.2%}" for k in (1, 8, 32))
        of = f"{hit} of {len(counts)} [{low:.1%}, {high:.1%}]"
        print(f"{row['arm']}: {row['total_tokens']:,} tokens, {len(steps)} steps, {of}")
        print(
            f"  {sum(counts)} hits, {means}; {easy} hits in {n * (len(ids) - len(counts))} at those of the first screening"
        )
        if steps:
            ends = [(e["completions/mean_length"], e["completions/clipped_ratio"]) for e in (steps[0], steps[-1])]
            print(
                "  first and last step: " + ", ".join(f"{length:.0f} tokens, {cut:.0%} cut off" for length, cut in ends)
            )
    worst = min(solved, key=lambda arm: solved[arm])
    sides = [[solved[arm], len(counts) - solved[arm]] for arm in ("base", worst)]
    print(f"base against {worst}: p {fisher_exact(sides).pvalue:.2f}")
    asked = rows(folder / "maths-reward-questions.jsonl")
    agreed = [row for row in asked if row["answers"] and row["answers"][0][1] >= 4]
    right = sum(row["rate"] >= 0.5 for row in agreed)
    never, always = (sum(row["rate"] == rate for row in asked) for rate in (0, 1))
    print(
        f"{len(asked)} questions: written answer never {never}, always {always}; agreed on {len(agreed)}, as written {right}"
    )


if __name__ == "__main__":
    main()
