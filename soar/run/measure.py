"""Held-out attempts of a run's arms, kept block by block, and `soar eval`: adapters measured on a problem file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config
from soar.domains.candidates import candidates
from soar.engine.policy import AdapterStack, concat, load_adapter
from soar.files import Row
from soar.loop.arms import usable
from soar.loop.evaluate import count_correct, results_of
from soar.loop.parallel import HELD_OUT_BLOCK, Parallel
from soar.loop.rollout import RolloutEnv
from soar.run.folder import RunFolder
from soar.run.ray import check_cluster, open_parallel
from soar.run.setup import choose_threads, open_env
from soar.types import Problem, UserError

FILE = "state/evaluation.jsonl"
BLOCK = HELD_OUT_BLOCK  # problems from one save to the next


def count_held_out(
    env: RolloutEnv,
    policies: dict[str, AdapterStack],
    problems: list[Problem],
    config: Config,
    folder: RunFolder,
    seed: int,
    threads: int,
    on_problems: Callable[[int], None],
    parallel: Parallel | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Correct attempts [policies][problems] of every arm at the same problems and seeds, and the tokens [policies] they took.

    Problems that the file already holds are not attempted again; it is begun anew when it is about other adapters.
    """
    attempts = config.evaluate.attempts
    header = {"arms": {arm: stack.digest() for arm, stack in policies.items()}, "attempts": attempts}

    width = 0  # arms that the file is about

    def sound(number: int, row: Row) -> bool:
        nonlocal width
        if number == 1:
            width = len(row["arms"]) if isinstance(row.get("arms"), dict) else 0
            return width > 0
        limits = {"correct": attempts, "tokens": attempts * config.student.sampling.max_tokens}
        return isinstance(row.get("id"), str) and all(
            isinstance(counts := row.get(key), list)
            and len(counts) == width
            and all(type(n) is int and 0 <= n <= most for n in counts)
            for key, most in limits.items()
        )

    rows = folder.rows(FILE, sound)
    if rows[:1] != [header]:
        if rows:
            folder.cut(FILE)
        folder.append(FILE, [header])
        rows = []
    done = {row["id"]: row for row in rows[1:]}
    missing = [problem for problem in problems if problem.id not in done]
    on_problems(len(problems) - len(missing))

    def keep(part: list[Problem], counts: Any) -> None:
        keys = ("correct", "truncated", "tokens")
        rows = zip(part, counts.transpose(2, 0, 1).tolist(), strict=True)
        fresh = [{"id": problem.id, **dict(zip(keys, values, strict=True))} for problem, values in rows]
        folder.append(FILE, fresh)
        done.update({row["id"]: row for row in fresh})
        on_problems(len(part))

    if missing:
        sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
        stack = concat(list(policies.values()))
        count_correct(
            env, stack, missing, attempts, seed, sampling, threads, block=BLOCK, on_block=keep, parallel=parallel
        )
    correct_P_H, tokens_P_H = (
        [[done[problem.id][key][p] for problem in problems] for p in range(len(policies))]
        for key in ("correct", "tokens")
    )
    return correct_P_H, list(map(sum, tokens_P_H))


def measure(
    config: Config, adapters: dict[str, Path], say: Callable[[str], None], advance: Callable[[int, int], None]
) -> Row:
    """The base model and the named adapters on the problems of `config.problems`, at the same seeds.

    Returns problems (source, sha256, count, ids, left_out), attempts, temperature, seed, policies (name -> pass_at and
    interval_95 for k = 1..attempts, correct counts) and paired (`NAME - base` -> k -> difference with interval).
    advance(done, total): progress in problems. Raises UserError when no problem can be used.
    """
    loaded = candidates(config)
    for line in loaded.report.lines():
        say(line)
    attempts = config.evaluate.attempts
    sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
    done = 0
    check_cluster(config)
    with open_env(config) as env:
        threads = choose_threads(env.backbone, config.threads)
        stacks = {"base": env.backbone.new_stack(0)}
        stacks |= {name: load_adapter(env.backbone, folder) for name, folder in adapters.items()}
        problems, left_out = usable(env, config, loaded.problems, say)
        if not problems:
            raise UserError(
                f"problems.source = {config.problems.source!r}: no problem can be used ({left_out['too_long']} too long, "
                f"{left_out['ungradable']} with an answer that {env.verifier.name!r} cannot grade)"
            )

        def note(part: list[Any], counts: Any) -> None:
            nonlocal done
            done += len(part)
            advance(done, len(problems))

        stack, seed = concat(list(stacks.values())), seeds.derive(config.seed, "evaluate")
        with open_parallel(config, env, None, say) as parallel:
            correct_P_H, truncated_P_H, _ = count_correct(
                env, stack, problems, attempts, seed, sampling, threads, block=8, on_block=note, parallel=parallel
            )
    every_k = config.evaluate.model_copy(update={"ks": tuple(range(1, attempts + 1))})
    results = results_of(dict(zip(stacks, correct_P_H.tolist(), strict=True)), every_k, config.seed)
    for name, share in zip(stacks, truncated_P_H.mean(1) / attempts, strict=True):
        results["policies"][name]["truncated_share"] = float(share)
    about = {"source": config.problems.source, "sha256": loaded.digest, "count": len(problems)}
    return {"problems": {**about, "ids": [problem.id for problem in problems], "left_out": left_out}, **results}
