"""The figures of docs/results/maths.md and maths-first-runs.md from the counts beside them.

python benchmarks/maths.py [docs/results]                         prints them
python benchmarks/maths.py --hard POOL.jsonl FILE.jsonl           writes the hard problems of the study, with their texts
python benchmarks/maths.py --practice POOL.jsonl FILE.jsonl       the easier ones of the third kill test
python benchmarks/maths.py --add runs/maths/cells/soar-seed0 ...  adds cells of study maths to docs/results/maths-votes.jsonl
python benchmarks/maths.py --counts docs/results/maths-votes.jsonl    writes docs/results/maths.json

POOL.jsonl: problems of the MATH test split with the ids math-test/N, N their place in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import fisher_exact, norm, pearsonr, t, ttest_1samp

from soar.loop.evaluate import clopper_pearson, holm, over_seeds, paired_over_seeds, pass_at_k


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


HARD, CUT_OFF = "maths-hard-1.5b.jsonl", 0.3  # never solved in 128 attempts, and cut off in at most this share of them
# Cells of study maths -> what stands before the names of their arms.
VARIANTS = {"soar": "", "untrained": "select_only_", "cheaper": "", "written": "as_written_", "kl": "kl_",
            "variants": "", "alone": "", "rank4": "rank4_", "rank64": "rank64_", "rate1e4": "rate1e4_",
            "rate4e4": "rate4e4_", "short": "short_", "long": "long_", "small": "small_", "solvable": "", "agree": "agree_",
            "eight": "eight_", "eight128": "eight_", "eightmixed": "eight_", "eightlike": "eight_"}  # fmt: skip
COMPARED = [("pq", "hard_only"), ("ps", "hard_only"), ("pq", "select_only_pq"), ("ps", "select_only_ps"),
            ("select_only_pq", "hard_only"), ("hard_only", "base"), ("pq", "base_t"), ("base_t", "hard_only"),
            ("hard_only_128", "hard_only"), ("hinted", "hard_only"),
            ("kl_base_t", "base_t"), ("base_t", "as_written_base_t"),
            ("real", "hard_only"), ("real", "pq"), ("solvable", "hard_only"), ("solvable", "real"),
            ("agree_base_t", "base_t"), ("variants", "hard_only"), ("likelihood", "hard_only")]  # fmt: skip
PRIMARY = ("pq", "hard_only", "32")


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


def document(counts: Path) -> dict[str, Any]:
    """Arms over seeds and their comparisons, from every evaluation with its cell's seed and held-out problems."""
    held, evaluations = dict[str, list[str]](), dict[str, dict[str, dict[str, Any]]]()
    for row in rows(counts):
        variant, seed = row["cell"].split("-")[:2]
        if row["event"] == "cell":
            assert held.setdefault(seed, row["held_out"]) == row["held_out"]
        elif row["event"] == "evaluation":
            evaluations.setdefault(VARIANTS[variant] + row["arm"], {})[seed] = row

    def values(arm: str, k: int, other: str = "") -> list[dict[str, float]]:
        """Of the seeds that the other arm has too."""
        of = [(held[seed], row) for seed, row in sorted(evaluations[arm].items()) if seed in evaluations[other or arm]]
        return [{i: pass_at_k(32, c, k) for i, c in zip(ids, row["correct"], strict=True)} for ids, row in of]

    arms = {}
    for arm, of in evaluations.items():
        spread = {str(k): over_seeds(values(arm, k), 0, 2000) for k in (1, 8, 32)}
        arms[arm] = {
            "pass_at": {k: row["mean"] for k, row in spread.items()},
            "interval_95": {k: row["interval_95"] for k, row in spread.items()},
            "total_tokens": float(np.mean([row["total_tokens"] for row in of.values()])),
            "seeds": len(of),
            "cells": [row["cell"] for row in of.values()],
        }
    compared, family = [], []
    for a, b in COMPARED:
        if not evaluations.get(a, {}).keys() & evaluations.get(b, {}).keys():
            continue
        gaps = {str(k): paired_over_seeds(values(a, k, b), values(b, k, a), 0, 2000) for k in (1, 8, 32)}
        compared.append({"a": a, "b": b, "pass_at": gaps})
        family += [gap for k, gap in gaps.items() if (a, b, k) != PRIMARY]
    for gap, p in zip(family, holm([gap["p_seeds"] for gap in family]), strict=True):
        gap["p_adjusted"] = p
    return {"model": "Qwen2.5-Coder-1.5B-Instruct", "seeds": len(held), "arms": arms, "comparisons": compared}


def add(cells: list[Path], out: Path) -> None:
    """Append the events of cells, and which problems they hold out."""
    there = {row["cell"] for row in rows(out)}
    for cell in cells:
        if cell.name in there:
            raise SystemExit(f"{out} has the cell {cell.name}")
        held = [row["id"] for row in rows(cell / "hard" / "test.jsonl")]
        events = [{"event": "cell", "held_out": held}, *rows(cell / "metrics.jsonl")]
        lines = [json.dumps({"cell": cell.name, **row}) for row in events if row["event"] != "screen"]
        with open(out, "a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))


def main() -> None:
    default = Path("docs/results")
    match sys.argv[1:]:
        case ["--hard" | "--practice" as name, pool, out]:
            write_problems(name, default, Path(pool), Path(out))
        case ["--add", *cells]:
            add([Path(cell) for cell in cells], default / "maths-votes.jsonl")
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
    """SOAR with answers by vote at 4 million tokens; base and ps of seeds 0 and 1 are from runs that were cut off."""
    events = rows(folder / "maths-votes.jsonl")
    evaluations = [row for row in events if row["event"] == "evaluation"]
    solved, lengths = dict[str, dict[int, int]](), dict[str, dict[int, float]]()
    for row in evaluations:
        arm, seed = VARIANTS[row["cell"].split("-")[0]] + row["arm"], int(row["cell"].split("-")[1][-1])
        n = sum(count > 0 for count in row["correct"])
        solved.setdefault(arm, {})[seed] = n
        lengths.setdefault(arm, {})[seed] = row["evaluation_tokens"] / row["attempts"] / row["problems"]
        low, high = clopper_pearson(n, row["problems"])
        print(
            f"{arm}, seed {seed}: {row['total_tokens']:,} tokens ({row['tokens'].get('search', 0):,} search), {n} of "
            f"{row['problems']} [{low:.1%}, {high:.1%}], {sum(row['correct'])} hits, pass@1 {row['pass_at']['1']:.2%}, "
            f"{lengths[arm][seed]:.0f} tokens an attempt"
        )
    for arm, counts in solved.items():
        print(f"solved, by seed, {arm}: {[counts[seed] for seed in sorted(counts)]}")
    over = document(folder / "maths-votes.jsonl")
    for compared in over["comparisons"]:
        for k, gap in compared["pass_at"].items():
            t_95, bootstrap = ([round(100 * end, 2) for end in gap[key]] for key in ("interval_95", "bootstrap_95"))
            print(f"pass@{k}, {compared['a']} - {compared['b']}: {100 * gap['difference']:+.2f} points, t {t_95}, bootstrap "
                  f"{bootstrap}, sign flips p {gap['p_seeds']:.2f}, adjusted {gap.get('p_adjusted', 'primary')}")  # fmt: skip
    for arm, row in over["arms"].items():
        (low, high), at = row["interval_95"]["32"], row["pass_at"]
        print(
            f"{arm}: pass@32 {at['32']:.1%} [{low:.1%}, {high:.1%}], pass@1 {at['1']:.2%}, {row['total_tokens']:,.0f} tokens"
        )
    real = [row for row in rows(folder / "maths-kill-4.jsonl") if row["event"] == "curve" and row["arm"] == "real"]
    for variant in ("soar", "untrained"):
        pq = next(row for row in evaluations if row["cell"] == f"{variant}-seed0" and row["arm"] == "pq")
        for row in real:
            gap = ttest_1samp(np.subtract(row["correct"], pq["correct"]) / 32, 0)
            low, high = gap.confidence_interval()
            mean = np.subtract(row["correct"], pq["correct"]).mean() / 32
            said = f"{mean:+.2%} [{low:+.2%}, {high:+.2%}], p {gap.pvalue:.2f}"
            print(f"real after {row['step']} steps - pq of {variant}, seed 0: {said}")
    for k in ("1", "8", "32"):
        means = [over["arms"][arm]["pass_at"][k] for arm in ("pq", "select_only_pq", "hard_only")]
        print(f"pass@{k}: " + ", ".join(f"{mean:.2%}" for mean in means) + f", {means[0] / means[2]:.2f} times")
    practised = [(lengths[arm][s], solved[arm][s]) for arm in ("pq", "select_only_pq") for s in range(4)]
    apart = np.diff(np.array(practised).reshape(2, 4, 2), axis=0)[0]
    r, r_apart = (pearsonr(*np.transpose(pairs)).statistic for pairs in (practised, apart))
    print(
        f"tokens an attempt and problems solved, eight students: r {r:.2f}; differences within seeds: r {r_apart:.2f}"
    )
    alone = ("pq", "select_only_pq", "base_t", "as_written_base_t", "kl_base_t", "variants", "variants_as_written")
    still = ("base", "ps", "select_only_ps", "hard_only")
    for name, group in (("all students of questions alone", alone), ("base, plain RL and PS", still)):
        pairs = [(lengths[arm][s], n) for arm in group for s, n in solved.get(arm, {}).items()]
        print(f"  {name}, {len(pairs)} readings: r {pearsonr(*np.transpose(pairs)).statistic:.2f}")
    reward_twice(events)
    moved = {row["cell"]: round(row["teacher_kl"], 5) for row in events if row.get("teacher_kl") and row["step"]}
    print(f"nats a token between the teacher and the base model after one update: {moved}")
    small = next(row for row in events if row["cell"] == "small-seed0" and row["event"] == "outer_step")
    paid, own = small["reward_G"], [small[part]["pass_rate"] for part in ("student_first", "student_last")]
    cut = [small["rejected"]["truncated"] / small["sampled"], small["student_first"]["completions/clipped_ratio"]]
    made, tokens = f"{small['sampled']} texts for {small['accepted']} questions", sum(small["tokens"].values())
    print(
        f"a step of small-1gpu: {len(paid)} sets paid {min(paid):.2%} to {max(paid):.2%}, {made}, {cut[0]:.0%} of texts "
        f"and {cut[1]:.0%} of first attempts cut off, own questions {own[0]:.0%} to {own[1]:.0%} right, {tokens:,} tokens in "
        f"{small['seconds']:.0f} s"
    )
    profile = json.loads((folder / "../../benchmarks/results/h200-maths-profile.json").read_text())
    for cell in profile["cells"]:
        at, waits = cell["anywhere_on_the_stack"], cell["innermost_line"]["engine/graphs.py:finish:219"]
        shares = (at["engine/sampler.py:sample"], waits, at["engine/update.py:update"])
        shown = [f"{count / cell['samples']:.0%}" for count in shares]
        print(f"{cell['cell']}: {cell['samples'] * cell['every_s']:.0f} s; sampling, waiting in it, update: {shown}")
    right, posed, by_step = dict[str, int](), dict[str, int](), dict[tuple[str, int], int]()
    for row in rows(folder / "maths-votes-questions.jsonl"):
        if "right_by_hand" in row:
            right[row["cell"]] = right.get(row["cell"], 0) + row["right_by_hand"]
            posed[row["cell"]] = posed.get(row["cell"], 0) + row["well_posed"]
            place = (row["cell"].split("-")[0], row["step"])
            by_step[place] = by_step.get(place, 0) + row["right_by_hand"]
    shares = [right[f"{variant}-seed{s}"] for variant in ("soar", "untrained") for s in range(4)]
    sizes, counts = np.transpose(practised)
    test, other = pearsonr(shares, counts), pearsonr(shares, sizes)
    print(f"answers of promoted questions right by hand, of 32: {right}; well-posed: {posed}")
    print(
        f"  right ones and problems solved: r {test.statistic:.2f}, p {test.pvalue:.3f}; and tokens: r {other.statistic:.2f}"
    )
    later = [i for i in range(8) if i % 4]
    fewer = [
        pearsonr(*np.array(pair)[:, later]).statistic for pair in ((shares, counts), (sizes, counts), (shares, sizes))
    ]
    print(
        f"  without seed 0: r {fewer[0]:.2f}; tokens and problems solved {fewer[1]:.2f}, right ones and tokens {fewer[2]:.2f}"
    )
    print(f"  right by teacher and step, of 64: {by_step}")
    for name in dict.fromkeys(row["cell"] for row in events if row["event"] == "arm_step"):
        own = [row for row in events if row["cell"] == name and row["event"] == "arm_step"]
        for arm in dict.fromkeys(row["arm"] for row in own):
            steps = [row for row in own if row["arm"] == arm]
            print(f"{name}, {arm}: {len(steps)} steps")
            spans(steps, arm, ((0, 4), (len(steps) - 4, len(steps))))


def reward_twice(events: list[dict[str, Any]]) -> None:
    """Rewards of the sets of first steps, which every run of a seed writes alike and trains and measures anew."""
    first: dict[str, dict[str, list[float]]] = {}
    for row in events:
        if row["event"] == "outer_step":
            variant, seed, *rest = row["cell"].split("-")
            if not row["step"]:
                first.setdefault(seed, {})["-".join([variant, *rest])] = row["reward_G"]
    for runs in (("soar", "untrained"), ("soar", "soar-cut-off"), ("soar-cut-off", "untrained")):
        both = [[of[run] for run in runs] for of in first.values() if set(runs) <= set(of)]
        once, again = (np.concatenate([np.array(pair[i]) - np.mean(pair[i]) for pair in both]) for i in (0, 1))
        r = float(once @ again / np.sqrt((once @ once) * (again @ again)))
        free = len(once) - len(both) - 1  # a mean for each seed, and the slope
        p = 2 * t.sf(abs(r) * np.sqrt(free / (1 - r * r)), free)
        low, high = np.tanh(np.arctanh(r) + norm.ppf([0.025, 0.975]) / np.sqrt(free - 1))
        said = f"r {r:.2f} [{low:.2f}, {high:.2f}], p {p:.2f}"
        print(f"rewards of the same {len(once)} sets in runs {' and '.join(runs)}, within seeds: {said}")


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
    parts = {"hard_only": ((0, 8), (31, 39), (43, 51)), "real": ((0, 8), (32, 40), (40, 48), (52, 60))}
    readings(rows(folder / "maths-kill-3.jsonl"), pairs, parts)


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
    events: list[dict[str, Any]], pairs: Iterable[tuple[str, str]], parts: dict[str, tuple[tuple[int, int], ...]]
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
    for arm, of in parts.items():
        spans([row for row in events if row["event"] == "arm_step" and row["arm"] == arm], arm, of)


def spans(steps: list[dict[str, Any]], arm: str, parts: Iterable[tuple[int, int]]) -> None:
    for first, end in parts:
        keys = ("pass_rate", "completions/mean_length", "completions/clipped_ratio", "frac_mixed")
        right, length, cut, mixed = (np.mean([row[key] for row in steps[first:end]]) for key in keys)
        of = f"{right:.1%} right, {length:.0f} tokens, {cut:.0%} cut off, {mixed:.0%} mixed"
        print(f"  {arm}, steps {first} to {end - 1}: {of}")


if __name__ == "__main__":
    main()
