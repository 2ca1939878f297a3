"""The figures of docs/results/maths.md from the counts beside it: SOAR's runs, four kill tests, the questions.

python benchmarks/maths.py [docs/results]                         prints them
python benchmarks/maths.py --hard POOL.jsonl FILE.jsonl           writes the hard problems of the study, with their texts
python benchmarks/maths.py --practice POOL.jsonl FILE.jsonl       the easier ones of the third kill test
python benchmarks/maths.py --study runs/maths/study.json          writes docs/results/maths.json from a study
python benchmarks/maths.py --counts docs/results/maths-votes.jsonl    the same from counts of runs

POOL.jsonl: problems of the MATH test split with the ids math-test/N, N their place in it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import fisher_exact, pearsonr, t, ttest_1samp

from soar.loop.evaluate import clopper_pearson, over_seeds, paired_over_seeds, pass_at_k


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


HARD, CUT_OFF = "maths-hard-1.5b.jsonl", 0.3  # never solved in 128 attempts, and cut off in at most this share of them
VARIANTS = {"soar": "", "untrained": "select_only_", "written": "as_written_", "cheaper": ""}
KEPT = ("pass_at", "interval_95", "total_tokens", "seeds")


def write_problems(name: str, folder: Path, pool: Path, out: Path) -> None:
    """The problems of a name, by the counts of the screenings."""
    texts = {row["id"]: row for row in rows(pool)}
    if name == "--hard":
        chosen = [row for row in rows(folder / HARD) if not row["successes"] and cut_off(row) <= CUT_OFF]
    else:
        chosen = practice(folder)
    lines = [json.dumps({key: texts[row["id"]][key] for key in ("id", "question", "answer")}) for row in chosen]
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} problems in {out}")


def cut_off(row: dict[str, Any]) -> float:
    return float(row["truncated"] / row["attempts"])


def practice(folder: Path) -> list[dict[str, Any]]:
    """Screened problems at 10 to 70 % right of which at most 20 % of the attempts are cut off."""
    screened = [*rows(folder / "maths-screen-1.5b.jsonl"), *rows(folder / HARD)]
    return [row for row in screened if 0.1 <= row["successes"] / row["attempts"] < 0.7 and cut_off(row) <= 0.2]


def from_study(study: Path, out: Path) -> None:
    results = json.loads(study.read_text(encoding="utf-8"))
    arms = {}
    for row in results["arms"]:
        at = row["pass_at"].items()
        means, intervals = ({k: entry[key] for k, entry in at} for key in ("mean", "interval_95"))
        name = VARIANTS[row["variant"]] + row["arm"]
        arms[name] = dict(zip(KEPT, (means, intervals, row["total_tokens"], len(row["seeds"])), strict=True))
    document = {"model": "Qwen2.5-Coder-1.5B-Instruct", "seeds": len(results["seeds"]), "arms": arms}
    out.write_text(json.dumps({**document, "comparisons": results["comparisons"]}, indent=1) + "\n", encoding="utf-8")


def document(counts: Path) -> dict[str, Any]:
    """Arms over seeds, and pq minus hard_only: every evaluation with its cell's seed and held-out problems."""
    held, cells_of = dict[str, list[str]](), dict[str, list[str]]()
    solved: dict[str, dict[str, tuple[int, list[int]]]] = {}
    for row in rows(counts):
        seed = row["cell"].split("-")[1]
        if row["event"] == "cell":
            held[seed] = row["held_out"]
        elif row["event"] == "evaluation":
            solved.setdefault(row["arm"], {})[seed] = row["total_tokens"], row["correct"]
            cells_of.setdefault(row["arm"], []).append(row["cell"])

    def values(arm: str, k: int) -> list[dict[str, float]]:
        of = sorted(solved[arm].items())
        return [{i: pass_at_k(32, c, k) for i, c in zip(held[seed], given, strict=True)} for seed, (_, given) in of]

    arms = {}
    for arm, of in solved.items():
        spread = {str(k): over_seeds(values(arm, k), 0, 2000) for k in (1, 8, 32)}
        means, intervals = ({k: row[key] for k, row in spread.items()} for key in ("mean", "interval_95"))
        tokens = float(np.mean([tokens for tokens, _ in of.values()]))
        arms[arm] = dict(zip(KEPT, (means, intervals, tokens, len(of)), strict=True)) | {"cells": cells_of[arm]}
    gaps = {str(k): paired_over_seeds(values("pq", k), values("hard_only", k), 0, 2000) for k in (1, 8, 32)}
    compared = [{"a": "pq", "b": "hard_only", "pass_at": gaps}]
    return {"model": "Qwen2.5-Coder-1.5B-Instruct", "seeds": len(held), "arms": arms, "comparisons": compared}


def main() -> None:
    default = Path("docs/results")
    match sys.argv[1:]:
        case ["--hard" | "--practice" as name, pool, out]:
            write_problems(name, default, Path(pool), Path(out))
        case ["--study", study]:
            from_study(Path(study), default / "maths.json")
        case ["--counts", counts]:
            text = json.dumps(document(Path(counts)), indent=1)
            (default / "maths.json").write_text(f"{text}\n", encoding="utf-8")
        case arguments:
            with_votes(Path(*arguments) if arguments else default)
            first_run(Path(*arguments) if arguments else default)
            kill_test(Path(*arguments) if arguments else default)
            third_kill_test(Path(*arguments) if arguments else default)
            fourth_kill_test(Path(*arguments) if arguments else default)


def with_votes(folder: Path) -> None:
    """SOAR with answers by vote at 4 million tokens; base and ps are from runs of the same seeds that were cut off."""
    events, solved = rows(folder / "maths-votes.jsonl"), dict[str, list[int]]()
    pairs = [("pq", other) for other in ("hard_only", "base", "ps")]
    for seed in (0, 1):
        own = [row for row in events if row["cell"].startswith(f"soar-seed{seed}")]
        print(f"answers by vote, seed {seed}")
        readings(own, pairs, {"pq": ((0, 4), (14, 18)), "hard_only": ((0, 4), (20, 24))})
        for row in own:
            if row["event"] == "evaluation":
                solved.setdefault(row["arm"], []).append(sum(count > 0 for count in row["correct"]))
    print("solved, by seed: " + ", ".join(f"{arm} {counts}" for arm, counts in solved.items()))
    steps = Counter((row["cell"], row["arm"]) for row in events if row["event"] == "arm_step")
    print(f"steps: {dict(steps)}")
    rewards = [reward for row in events if row["event"] == "outer_step" for reward in row["reward_G"]]
    print(f"rewards of {len(rewards)} sets, of which the second half are of the finished cells: "
          f"{100 * min(rewards[12:]):+.1f} to {100 * max(rewards[12:]):+.1f} points")  # fmt: skip
    over = document(folder / "maths-votes.jsonl")
    for k, gap in over["comparisons"][0]["pass_at"].items():
        means = [over["arms"][arm]["pass_at"][k] for arm in ("pq", "hard_only")]
        t_95, bootstrap = ([round(100 * end, 1) for end in gap[key]] for key in ("interval_95", "bootstrap_95"))
        print(f"pass@{k} over seeds: pq {means[0]:.2%}, hard_only {means[1]:.2%}, {means[0] / means[1]:.1f} times, "
              f"difference {100 * gap['difference']:+.1f} points, t {t_95}, bootstrap {bootstrap}")  # fmt: skip
    held = [set(row["held_out"]) for row in events if row["event"] == "cell"]
    print(f"held out in both seeds: {len(held[0] & held[1])} of {len(held[0])}")
    for cell in json.loads((folder / "../../benchmarks/results/h200-maths-profile.json").read_text())["cells"]:
        at, waits = cell["anywhere_on_the_stack"], cell["innermost_line"]["engine/graphs.py:finish:219"]
        shares = (at["engine/sampler.py:sample"], waits, at["engine/update.py:update"])
        shown = [f"{count / cell['samples']:.0%}" for count in shares]
        print(f"{cell['cell']}: {cell['samples'] * cell['every_s']:.0f} s; sampling, waiting in it, update: {shown}")
    first = {
        row["cell"]: np.array(row["reward_G"]) for row in events if row["event"] == "outer_step" and not row["step"]
    }
    apart = [
        [first[f"soar-seed{s}{end}"] - first[f"soar-seed{s}{end}"].mean() for s in (0, 1)] for end in ("", "-cut-off")
    ]
    once, again = map(np.concatenate, apart)
    r = float(once @ again / np.sqrt((once @ once) * (again @ again)))
    free = len(once) - 3  # two means and the slope
    print(f"rewards of the same 6 sets in two runs, within seeds: correlation {r:.2f}, p "
          f"{2 * t.sf(abs(r) * np.sqrt(free / (1 - r * r)), free):.2f}")  # fmt: skip
    judged = [row for row in rows(folder / "maths-votes-questions.jsonl") if row.get("promoted")]
    print(
        f"answers of promoted questions right by hand: {sum(row['right_by_hand'] for row in judged)} of {len(judged)}"
    )


def first_run(folder: Path) -> None:
    cell, events = "", rows(folder / "maths-soar.jsonl")
    for row in events:
        if row["cell"] != cell:
            cell = row["cell"]
            print(cell)
        if row["event"] == "outer_step":
            rates, cut = (
                [row[part]["pass_rate"] for part in ("student_first", "student_last")],
                row["rejected"]["truncated"],
            )
            print(
                f"  step {row['step']}: reward {row['reward_mean']:+.3f}, own questions {rates[0]:.0%} to {rates[1]:.0%}, "
                f"{row['sampled']} texts for {row['accepted']} questions, {cut / row['sampled']:.0%} cut off, "
                f"{row['seconds']:.0f} s"
            )
        elif row["event"] == "validation":
            print(f"  training half after it: likelihood {row['pass_rate']:.3f}")
        elif row["event"] == "evaluation":
            hit, n = sum(count > 0 for count in row["correct"]), len(row["correct"])
            low, high = clopper_pearson(hit, n)
            at = row["pass_at"]["1"]
            print(
                f"  {row['arm']}: {row['total_tokens']:,} tokens, {hit} of {n} [{low:.1%}, {high:.1%}], pass@1 {at:.2%}"
            )
    twice = [
        next(row["reward_G"] for row in events if row["event"] == "outer_step" and row["cell"] == cell)
        for cell in ("soar-seed0-forced", "untrained-seed0-forced")
    ]
    sd, gap = 100 * np.std(twice, axis=1, ddof=1).mean(), 100 * np.std(np.subtract(*twice), ddof=1)
    print(f"rewards of the same 8 sets in two runs: correlation {pearsonr(*twice).statistic:.2f}")
    print(f"  sd of a set's reward {sd:.1f} points, of the difference of its two {gap:.1f}")


def kill_test(folder: Path) -> None:
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


def third_kill_test(folder: Path) -> None:
    print(f"{len(practice(folder))} problems to practise on")
    middle = "real after 31 steps"
    pairs = ((middle, "base"), (middle, "hard_only after 31 steps"), (middle, "hard_only"), ("hard_only", "base"),
             ("real", "base"), ("real", middle))  # fmt: skip
    spans = {"hard_only": ((0, 8), (31, 39), (43, 51)), "real": ((0, 8), (32, 40), (40, 48), (52, 60))}
    readings(rows(folder / "maths-kill-3.jsonl"), pairs, spans)


def fourth_kill_test(folder: Path) -> None:
    asked = [row for row in rows(folder / "maths-kill-4-questions.jsonl") if "right_by_hand" in row]
    print(f"voted answers right by hand: {sum(row['right_by_hand'] for row in asked)} of {len(asked)}")
    judged = [row for row in rows(folder / "maths-reward-questions.jsonl") if "voted_right" in row]
    for votes in ((3, 4), (5,), (6, 7)):
        right = [row["voted_right"] for row in judged if row["answers"][0][1] in votes]
        print(f"  with {' or '.join(map(str, votes))} of 8 votes: {sum(right)} of {len(right)}")
    arms, plain = ("real", "base_t", "pq"), "hard_only after 32 steps"
    pairs = [(f"{arm} after 32 steps", other) for other in ("base", plain, "hard_only") for arm in arms]
    pairs += [
        ("base_t after 32 steps", "pq after 32 steps"),
        ("base_t after 16 steps", "pq after 16 steps"),
        ("real after 32 steps", "base_t after 32 steps"),
        ("pq after 16 steps", "pq after 32 steps"),
        (plain, "base"),
    ]
    readings(rows(folder / "maths-kill-4.jsonl"), pairs, dict.fromkeys((*arms, "hard_only"), ((0, 8), (24, 32))))


def readings(
    events: list[dict[str, Any]], pairs: Iterable[tuple[str, str]], spans: dict[str, tuple[tuple[int, int], ...]]
) -> None:
    """Every reading of the held-out half, differences of their pass@1 (t interval over problems), and the steps."""
    rates = {}
    for row in events:
        if row["event"] in ("curve", "evaluation"):
            name = row["arm"] + (f" after {row['step']} steps" if row["event"] == "curve" else "")
            rates[name] = np.array(row["correct"]) / row["attempts"]
            hit, n = int((rates[name] > 0).sum()), len(rates[name])
            low, high = clopper_pearson(hit, n)
            of = f"{hit} of {n} [{low:.1%}, {high:.1%}], {sum(row['correct'])} hits"
            print(f"{name}: {row['total_tokens']:,} tokens, {of}, pass@1 {rates[name].mean():.2%}")
    for one, other in pairs:
        test = ttest_1samp(100 * (rates[one] - rates[other]), 0)
        (low, high), mean = test.confidence_interval(), 100 * (rates[one] - rates[other]).mean()
        print(f"  {one} - {other}: {mean:+.2f} [{low:+.2f}, {high:+.2f}] points, p {test.pvalue:.4f}")
    for arm, parts in spans.items():
        steps = [row for row in events if row["event"] == "arm_step" and row["arm"] == arm]
        for first, end in parts:
            part = steps[first:end]
            right, length, cut, mixed = (
                np.mean([row[key] for row in part])
                for key in ("pass_rate", "completions/mean_length", "completions/clipped_ratio", "frac_mixed")
            )
            print(
                f"  {arm}, steps {first} to {end - 1}: {right:.1%} right, {length:.0f} tokens, {cut:.0%} cut off, "
                f"{mixed:.0%} mixed"
            )


if __name__ == "__main__":
    main()
