"""Is there a signal in the teacher's reward? Verdicts against the likelihood of the gold answer, on the same attempts.

forced: the likelihood also where an attempt has not answered (`reward.mode`).

    python benchmarks/reward_signal.py RECIPE --out FILE [--datasets 8] [--repeats 4] [--questions 64] [--attempts 8]
    python benchmarks/reward_signal.py --from FILE

One outer step of the untrained teacher: G question sets, R students each, every student measured on the same hard problems.
F compares the variance of the sets' means with that of repeats (1: the reward says nothing about a set), ICC is the share of
a reward's variance that belongs to the set. The file holds solved attempts and mean likelihood of every student and problem.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from reward_noise import training_noise
from scipy import stats

from soar.config import Config, load
from soar.domains.candidates import candidates
from soar.loop.likelihood import likelihood
from soar.loop.teacher import OuterLoop, new_state
from soar.run.setup import open_env

BLOCK = 8  # problems measured at once


def measured(config: Config, count: int, attempts: int) -> dict[str, Any]:
    """Solved attempts and mean likelihood [P, H] of the students, and of the baseline with four times the attempts."""
    problems = candidates(config).problems
    order = np.random.default_rng(config.seed).permutation(len(problems))[:count]
    problems = [problems[i] for i in order]
    with open_env(config) as env:
        loop = OuterLoop(env, problems, config, new_state(env, config))
        question_sets = loop.write()
        population = loop.teach(question_sets)
        print(f"written: {question_sets.sampled} texts, rejected {dict(question_sets.rejected)}")
        first, last = (population.metrics[i]["pass_rate"] for i in (0, -1))
        print(f"own questions, first and last step: {first:.3f}, {last:.3f}")
        found: dict[str, Any] = {"problems": [p.id for p in problems], "datasets": config.teacher.datasets}
        for name, stack, n in (("students", population.stack, attempts), ("base", loop.state.baseline, 4 * attempts)):
            solved, dense, forced = [], [], []
            for first in range(0, len(problems), BLOCK):
                asked = [problems[first : first + BLOCK]] * stack.policies
                batch = env.rollout(
                    stack, asked, n, [100 + first] * stack.policies, config.student.sampling, threads=env.threads
                )
                solved.append(batch.solved_P_Q_N.sum(2).numpy())
                given = (env, stack, batch)
                dense.append(likelihood(*given).mean(2).numpy())
                forced.append(likelihood(*given, forced=True).mean(2).numpy())
            found[name] = {
                "attempts": n,
                "solved": np.concatenate(solved, 1).tolist(),
                "likelihood": np.concatenate(dense, 1).round(5).tolist(),
                "forced": np.concatenate(forced, 1).round(5).tolist(),
            }
    return found


def table(found: dict[str, Any], drop: set[str]) -> None:
    """Print both rewards side by side."""
    kept = [i for i, name in enumerate(found["problems"]) if name not in drop]
    G, rows = found["datasets"], found["students"]
    print(f"{len(kept)} problems, {len(rows['solved'])} students on {G} sets, {rows['attempts']} attempts a problem")
    print("reward        base      students   sd repeats  sd of sets' means      F      p    ICC  students for 0.7")
    for name in [name for name in ("solved", "likelihood", "forced") if name in rows]:
        value, base = (np.array(found[who][name], dtype=float)[:, kept] for who in ("students", "base"))
        if name == "solved":
            value, base = value / rows["attempts"], base / found["base"]["attempts"]
        rate_G_R = value.mean(1).reshape(G, -1)
        R = rate_G_R.shape[1]
        own, _, means = training_noise(rate_G_R)
        between, within = R * means**2, own**2
        F, icc = between / within, (between - within) / (between + (R - 1) * within)
        p = stats.f.sf(F, G - 1, G * (R - 1))
        row = f"{name:10s}  {base.mean():8.5f}  {value.mean():10.5f}  {own:10.5f}  {means:17.5f}"
        # Spearman-Brown: how many such students the mean of a set needs to agree with itself by a correlation of 0.7.
        need = 0.7 / 0.3 * (1 - icc) / icc if icc > 0 else float("inf")
        print(f"{row}  {F:5.2f}  {p:5.3f}  {icc:5.2f}  {need:5.0f}")
    solved, dense = (np.array(rows[name], dtype=float)[:, kept].mean(1) for name in ("solved", "likelihood"))
    print(f"correlation of the two over the students: {np.corrcoef(solved, dense)[0, 1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny-rare")
    parser.add_argument("--datasets", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="print the table of a file that --out wrote")
    parser.add_argument(
        "--drop", type=Path, help="a JSONL file: problems whose id stands there are left out of the table"
    )
    arguments = parser.parse_args()
    if arguments.source:
        found = json.loads(arguments.source.read_text())
    else:
        shape = [f"teacher.datasets={arguments.datasets}", f"student.repeats={arguments.repeats}"]
        found = measured(
            load(arguments.recipe, [*shape, *arguments.overrides]), arguments.questions, arguments.attempts
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(found) + "\n")
    drop = {json.loads(line)["id"] for line in arguments.drop.read_text().splitlines()} if arguments.drop else set()
    table(found, drop)


if __name__ == "__main__":
    main()
