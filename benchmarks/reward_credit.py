"""Do credit by question and racing pay? The signal to noise of the teacher's reward, at equal numbers of tokens.

    python benchmarks/reward_credit.py tiny-rare --seed 0 --out FILE [--set KEY=VALUE ...]
    python benchmarks/reward_credit.py --from FILE [FILE ...]
    python benchmarks/reward_credit.py --components docs/results/maths-reward.json --drop docs/results/maths-screen-1.5b.jsonl

Students of one outer step of the untrained teacher, equally many (G * R) in three designs: `sets`, G sets of n questions with
R students each, a set has the mean of its students as reward; `pool`, the same G * n questions, each student on n of them,
each question in R students (credit by question: a ridge regression of the rewards on who saw what); `many`, G * R sets with
one student each. Every student is measured after half of its steps and at the end, there twice with other attempts, on the
same hard problems, once by verdicts and once by the likelihood of the gold answer. In an embedded world an oracle says
which questions are useful and rightly answered: the truth that credits are compared with. r: correlation of a question's
credit with that; N r^2 over the N questions is what a step of the teacher has to learn from. --components simulates the same
from the variances of a record of reward_signal.py, where a set is worth the mean of its questions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from world import carrying_steps

from soar import seeds
from soar.config import Config, load
from soar.domains.candidates import candidates
from soar.domains.world import get_world
from soar.engine.policy import concat
from soar.loop.likelihood import likelihood
from soar.loop.parallel import no_tick
from soar.loop.population import chunks, train_chunk
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Plan, TrainState, shuffled_passes
from soar.loop.teacher import OuterLoop, new_state
from soar.run.setup import open_env
from soar.types import Problem

REWARDS = ("solved", "likelihood")
CHUNK = 8


def designs(G: int, R: int, n: int, seed: int) -> dict[str, list[list[int]]]:
    """Which of the G * R * n written questions each student sees."""
    pool = np.arange(G * n)
    mixed = [seeds.generator(seed, "pool", r).permutation(pool).reshape(G, n) for r in range(R)]
    return {
        "sets": [pool[k * n : (k + 1) * n].tolist() for k in range(G) for _ in range(R)],
        "pool": np.concatenate(mixed).tolist(),
        "many": np.arange(G * R * n).reshape(G * R, n).tolist(),
    }


def rates(env: RolloutEnv, stack: Any, problems: list[Problem], config: Config, n: int, seed: int, threads: int) -> Any:
    """{reward: means [P][2] over both halves of the problems}, and the tokens."""
    asked = [problems] * stack.policies
    stack = stack.to(env.backbone.device)
    batch = env.rollout(stack, asked, n, [seed] * stack.policies, config.student.sampling, threads=threads)
    dense = likelihood(env, stack, batch).mean(2)
    solved = batch.solved_P_Q_N.float().mean(2)
    halves = [values.view(stack.policies, 2, -1).mean(2) for values in (solved, dense)]
    return {name: half.numpy().round(6).tolist() for name, half in zip(REWARDS, halves, strict=True)}, batch.tokens


def measured(config: Config, G: int, R: int, count: int, attempts: int) -> dict[str, Any]:
    """Everything that the tables need."""
    problems = candidates(config).problems
    order = np.random.default_rng(config.seed).permutation(len(problems))[:count]
    problems, world = [problems[i] for i in order], get_world(config.problems.source.partition(":")[2])
    with open_env(config) as env:
        threads = env.threads
        loop = OuterLoop(env, problems, config, new_state(env, config))
        question_sets = loop.write()
        written = [problem for problems in question_sets.problems_G_Q for problem in problems]
        base, _ = rates(env, loop.state.baseline, problems, config, 4 * attempts, 99, threads)
        value = [int(carrying_steps(p.question) > 0 and world.solve(p.question) == p.answer) for p in written]
        spent = loop.state.spent["teacher"]
        found = {"G": G, "R": R, "value": value, "base": base, "teacher_tokens": spent, "designs": {}}
        student, half = config.student, config.student.steps // 2
        for name, seen in designs(G, R, config.teacher.questions, config.seed).items():
            rows: list[dict[str, Any]] = []
            for members in chunks(len(seen), CHUNK):
                plans, states = [], []
                for p in members:
                    seed = seeds.derive(config.seed, name, p)
                    batches = shuffled_passes(
                        [written[i] for i in seen[p]], seed, student.steps, student.prompts_per_step
                    )
                    plans.append(Plan(batches, seed))
                    states.append(TrainState(0, loop.state.baseline))
                chunk: dict[str, Any] = {}
                for stage in ("half", "end"):
                    states = train_chunk(
                        env,
                        no_tick,
                        student,
                        threads,
                        lambda step: step in (half, student.steps),
                        list(zip(plans, states, strict=True)),
                    )
                    chunk[f"{stage}_tokens"] = sum(state.tokens for state in states)
                    stack = concat([state.stack for state in states])
                    for again in (0, 1) if stage == "end" else (0,):
                        chunk[f"{stage}{again}"], chunk["measured_tokens"] = rates(
                            env, stack, problems, config, attempts, 7 + again, threads
                        )
                rows.append(chunk)
                print(name, members[-1] + 1, flush=True)
            tokens = {key: sum(row[key] for row in rows) for key in ("half_tokens", "end_tokens", "measured_tokens")}
            stages = {
                f"{stage}/{reward}": [x for row in rows for x in row[stage][reward]]
                for stage in ("half0", "end0", "end1")
                for reward in REWARDS
            }
            found["designs"][name] = {"seen": seen, **tokens, **stages}
    return found


def centred(rows: np.ndarray) -> np.ndarray:
    return rows - rows.mean(-1, keepdims=True)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Over all trials, each around its own mean; 0 where nothing varies."""
    a, b = centred(a), centred(b)
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale else 0.0


def share_t(reward_S: np.ndarray, share_S: np.ndarray) -> float:
    """t of the slope of rewards on the share of valuable questions."""
    r = correlation(reward_S, share_S)
    return r * np.sqrt((len(reward_S) - 2) / (1 - r * r))


def ridge(reward_S: np.ndarray, seen: list[list[int]], questions: int, penalty: float) -> np.ndarray:
    """Credit [questions]: coefficients of the rewards on who saw what (a large penalty: the mean of who saw it)."""
    X = np.zeros((len(seen), questions))
    for s, row in enumerate(seen):
        X[s, row] = 1 / len(row)
    X = X - X.mean(0)
    return X.T @ np.linalg.solve(X @ X.T + penalty * np.eye(len(seen)), centred(reward_S))


def better_half(rows: np.ndarray) -> np.ndarray:
    return rows >= np.sort(rows, -1)[..., [rows.shape[-1] // 2]]


def table(records: list[dict[str, Any]]) -> None:
    """What was measured: every line the means over the records."""
    for reward in REWARDS:
        lines: dict[str, list[list[float]]] = {}
        for record in records:
            G, R, value, base = record["G"], record["R"], np.array(record["value"], float), record["base"][reward]
            n = len(value) // (G * R)
            for name, design in record["designs"].items():
                half, end, again = (np.array(design[f"{stage}/{reward}"]) for stage in ("half0", "end0", "end1"))
                share = np.array([value[row].mean() for row in design["seen"]])
                if name == "sets":
                    share = share.reshape(G, R)[:, 0]
                    y = end.mean(1).reshape(G, R)
                    within, between = y.var(1, ddof=1).mean(), R * y.mean(1).var(ddof=1)
                    icc = (between - within) / (between + (R - 1) * within)
                    lines.setdefault("sets: F, ICC", []).append([between / within, icc])
                    half, end, again = (values.reshape(G, R, 2).mean(1) for values in (half, end, again))
                y, first = end.mean(1) - np.mean(base), half.mean(1) - np.mean(base)
                credits = {name: np.repeat(y, n)}
                if name == "pool":
                    credits = {f"pool, ridge {x}": ridge(y, design["seen"], G * n, x) for x in (0.01, 0.1, 1.0)}
                    credits["pool, mean of a question's students"] = ridge(y, design["seen"], G * n, 1e6)
                texts = record["teacher_tokens"] * (1 if name == "many" else 1 / R)
                train, train_half, asked = (design[f"{k}_tokens"] for k in ("end", "half", "measured"))
                for label, credit in credits.items():
                    r = correlation(credit, value[: len(credit)])
                    tokens = (train + asked + texts) / 1e6
                    row = [share_t(y, share), r, len(credit) * r * r, tokens, len(credit) * r * r / tokens]
                    lines.setdefault(f"{label}: t, r, N r^2, M tokens, N r^2 / M tokens", []).append(row)
                if name == "pool":
                    continue
                one, cost = end[:, 0] - np.mean(base), train + asked
                for label, earned, spent in (
                    ("all to the end", y, cost),
                    ("half of the steps, all", first, train_half + asked),
                    ("students raced", np.where(better_half(first), y, first), (train_half + train + 3 * asked) / 2),
                    ("half of the problems, all", one, train + asked / 2),
                    ("measurement raced", np.where(better_half(one), y, one), train + 0.75 * asked),
                ):
                    r = correlation(earned, share)
                    truth = 100 * (again.mean(1)[earned.argmax()] - np.mean(base))
                    row = [share_t(earned, share), r * r, spent / cost, r * r * cost / spent, truth]
                    lines.setdefault(f"{name}, {label}: t, r^2, cost, r^2 / cost, value of the best", []).append(row)
        print(f"\nreward: {reward}")
        for label, rows in lines.items():
            print(f"{label}:  {'  '.join(f'{x:.3f}' for x in np.mean(rows, axis=0))}")


def components(found: dict[str, Any], drop: set[str], reward: str) -> tuple[float, float, float, int]:
    """Variances between sets, of training and of measuring a student in a record of reward_signal.py; rollouts to measure."""
    kept = [i for i, name in enumerate(found["problems"]) if name not in drop]
    y = np.array(found["students"][reward], float)[:, kept] / (
        found["students"]["attempts"] if reward == "solved" else 1
    )
    y = y.reshape(found["datasets"], -1, len(kept))
    G, R, H = y.shape
    rate, rest = y.mean(2), centred(y - y.mean((0, 1)))
    within, measuring = rate.var(1, ddof=1).mean(), (rest**2).sum() / ((G * R - 1) * (H - 1)) / H
    between = max(rate.mean(1).var(ddof=1) - within / R, 0.0)
    return between, max(within - measuring, 0.0), measuring, H * found["students"]["attempts"]


def predicted(
    between: float, training: float, measuring: float, T: int, M: int, n: int, G: int = 8, R: int = 4
) -> None:
    """What each design would give where a set is worth the mean of its questions. T, M: rollouts to train, to measure."""
    rng = np.random.default_rng(0)
    trials, sd, noise = 400, np.sqrt(n * between), np.sqrt(training + measuring)
    value = rng.normal(0, sd, (trials, G * R * n))
    pool = value[:, : G * n]
    some = pool.reshape(trials, G, n).mean(2) + rng.normal(0, noise / np.sqrt(R), (trials, G))
    many = value.reshape(trials, G * R, n).mean(2) + rng.normal(0, noise, (trials, G * R))
    ridged = np.empty_like(pool)
    for trial in range(trials):
        seen = designs(G, R, n, trial)["pool"]
        y = pool[trial][seen].mean(1) + rng.normal(0, noise, G * R)
        ridged[trial] = ridge(y, seen, G * n, (training + measuring) / (n * between))
    for name, credit, truth in (
        ("sets", np.repeat(some, n, 1), pool),
        ("pool, ridge", ridged, pool),
        ("many", np.repeat(many, n, 1), value),
    ):
        r = correlation(credit, truth)
        print(f"  {name:28s} r {r:.3f}  N r^2 {credit.shape[1] * r * r:.2f}")
    trials, cost = 20_000, T + M
    worth = rng.normal(0, np.sqrt(between), (trials, G))
    student = worth[..., None] + rng.normal(0, np.sqrt(training), (trials, G, R))
    halves = rng.normal(0, np.sqrt(2 * measuring), (trials, G, R, 2))
    each = student + halves.mean(3)
    every, one, two = each.mean(2), (student + halves[..., 0]).mean(2), each[:, :, : R // 2].mean(2)
    fewer = (student + halves.mean(3) * np.sqrt(4 / 3)).mean(2)
    for name, earned, spent in (
        ("all", every, cost),
        ("three quarters of the problems", fewer, T + 0.75 * M),
        ("measurement raced", np.where(better_half(one), every, one), T + 0.75 * M),
        ("three quarters of the students", each[:, :, : R * 3 // 4].mean(2), 0.75 * cost),
        ("students raced", np.where(better_half(two), every, two), 0.75 * cost),
    ):
        r = correlation(earned, worth)
        best = np.take_along_axis(worth, earned.argmax(1)[:, None], 1).mean() / np.sqrt(between)
        print(
            f"  {name:30s} cost {spent / cost:.2f}  r^2 {r * r:.3f}  r^2/cost {r * r * cost / spent:.3f}  best {best:.2f} sd"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny-rare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--datasets", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--from", dest="sources", type=Path, nargs="*", default=[])
    parser.add_argument(
        "--components", type=Path, metavar="FILE", help="of reward_signal.py --out: what each design would give"
    )
    parser.add_argument("--drop", type=Path, help="with --components: a JSONL file of problems to leave out")
    parser.add_argument("--trained", type=int, default=512, help="with --components: rollouts that train a student")
    parser.add_argument("--questions", type=int, default=16, help="with --components: questions in a set")
    arguments = parser.parse_args()
    if arguments.components:
        found = json.loads(arguments.components.read_text())
        drop = {json.loads(line)["id"] for line in arguments.drop.read_text().splitlines()} if arguments.drop else set()
        for reward in REWARDS:
            *variances, M = components(found, drop, reward)
            print(
                f"{reward}: variances: sets {variances[0]:.2e}, training {variances[1]:.2e}, measuring {variances[2]:.2e}"
            )
            if variances[0]:
                predicted(*variances, arguments.trained, M, arguments.questions)
        return
    records = [json.loads(path.read_text()) for path in arguments.sources]
    if not records:
        shape = [f"teacher.datasets={arguments.datasets * arguments.repeats}", f"seed={arguments.seed}"]
        config = load(arguments.recipe, [*shape, *arguments.overrides])
        records = [measured(config, arguments.datasets, arguments.repeats, arguments.problems, arguments.attempts)]
        if arguments.out:
            arguments.out.write_text(json.dumps(records[0]) + "\n")
    table(records)


if __name__ == "__main__":
    main()
