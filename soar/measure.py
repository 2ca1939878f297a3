"""Measure adapters on a problem file: pass@k for every k, intervals, and differences from the base model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from soar import seeds
from soar.candidates import candidates
from soar.config import Config
from soar.evaluate import count_correct, results_of
from soar.policy import concat, load_adapter
from soar.ray_cluster import check_cluster
from soar.ray_crew import open_crew
from soar.runs import Row
from soar.types import UserError
from soar.workbench import choose_workers, open_examiner, usable


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
    with open_examiner(config) as examiner:
        backbone = examiner.backbone
        workers = choose_workers(backbone, config.threads)
        stacks = {"base": backbone.new_stack(0)}
        stacks |= {name: load_adapter(backbone, folder) for name, folder in adapters.items()}
        problems, left_out = usable(examiner, config, loaded.problems, say)
        if not problems:
            raise UserError(
                f"problems.source = {config.problems.source!r}: no problem can be used ({left_out['too_long']} too long, "
                f"{left_out['ungradable']} with an answer that {examiner.verifier.name!r} cannot grade)"
            )

        def note(part: list[Any], correct_P_H: Any, truncated_P_H: Any) -> None:
            nonlocal done
            done += len(part)
            advance(done, len(problems))

        stack = concat(list(stacks.values()))
        with open_crew(config, examiner, None, say) as crew:
            correct_P_H, truncated_P_H = count_correct(
                examiner, stack, problems, attempts, seed, sampling, workers, block=8, on_block=note, crew=crew
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
