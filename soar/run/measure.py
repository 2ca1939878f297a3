"""Held-out attempts of the arms, block by block, in a file from which an interrupted evaluation goes on.

Measure adapters on a problem file: pass@k for every k, intervals, and differences from the base model.
"""

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
) -> list[list[int]]:
    """Correct attempts [policies][problems] of every arm at the same problems and seeds.

    Problems that the file already holds are not attempted again; it is begun anew when it is about other adapters.
    """
    header = {"arms": {arm: stack.digest() for arm, stack in policies.items()}, "attempts": config.evaluate.attempts}
    found = _known(folder, header)
    on_problems(sum(problem.id in found for problem in problems))
    missing = [problem for problem in problems if problem.id not in found]

    def keep(part: list[Problem], correct_P_H: Any, truncated_P_H: Any) -> None:
        rows = [
            {"id": problem.id, "correct": correct_P, "truncated": truncated_P}
            for problem, correct_P, truncated_P in zip(
                part, correct_P_H.T.tolist(), truncated_P_H.T.tolist(), strict=True
            )
        ]
        folder.append(FILE, rows)
        found.update({row["id"]: row["correct"] for row in rows})
        on_problems(len(part))

    if missing:
        sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
        count_correct(
            env,
            concat(list(policies.values())),
            missing,
            config.evaluate.attempts,
            seed,
            sampling,
            threads=threads,
            block=BLOCK,
            on_block=keep,
            parallel=parallel,
        )
    return [[found[problem.id][p] for problem in problems] for p in range(len(policies))]


def _known(folder: RunFolder, header: dict[str, Any]) -> dict[str, list[int]]:
    policies, attempts = len(header["arms"]), header["attempts"]

    def usable(number: int, row: dict[str, Any]) -> bool:
        if number == 1:
            return "arms" in row
        counts = row.get("correct")
        if not isinstance(counts, list) or len(counts) != policies or not isinstance(row.get("id"), str):
            return False
        return all(type(count) is int and 0 <= count <= attempts for count in counts)

    rows = folder.rows(FILE, usable)
    if rows and rows[0] == header:
        return {row["id"]: row["correct"] for row in rows[1:]}
    (folder.path / FILE).unlink(missing_ok=True)
    folder.append(FILE, [header])
    return {}


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
    every_k = config.evaluate.model_copy(update={"ks": tuple(range(1, attempts + 1))})
    sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})
    seed = seeds.derive(config.seed, "evaluate")
    done = 0
    check_cluster(config)
    with open_env(config) as env:
        backbone = env.backbone
        threads = choose_threads(backbone, config.threads)
        stacks = {"base": backbone.new_stack(0)}
        stacks |= {name: load_adapter(backbone, folder) for name, folder in adapters.items()}
        problems, left_out = usable(env, config, loaded.problems, say)
        if not problems:
            raise UserError(
                f"problems.source = {config.problems.source!r}: no problem can be used ({left_out['too_long']} too long, "
                f"{left_out['ungradable']} with an answer that {env.verifier.name!r} cannot grade)"
            )

        def note(part: list[Any], correct_P_H: Any, truncated_P_H: Any) -> None:
            nonlocal done
            done += len(part)
            advance(done, len(problems))

        stack = concat(list(stacks.values()))
        with open_parallel(config, env, None, say) as parallel:
            correct_P_H, truncated_P_H = count_correct(
                env, stack, problems, attempts, seed, sampling, threads, block=8, on_block=note, parallel=parallel
            )
    rows = zip(stacks, correct_P_H.tolist(), truncated_P_H.sum(1).tolist(), strict=True)
    counts: dict[str, list[int]] = {}
    truncated_share: dict[str, float] = {}
    for name, correct_H, truncated in rows:
        counts[name], truncated_share[name] = correct_H, truncated / (attempts * len(correct_H))
    found = results_of(counts, every_k, config.seed)
    for name, row in found["policies"].items():
        row["truncated_share"] = truncated_share[name]
    return {
        "problems": {
            "source": config.problems.source,
            "sha256": loaded.digest,
            "count": len(problems),
            "ids": [problem.id for problem in problems],
            "left_out": left_out,
        },
        **found,
    }
