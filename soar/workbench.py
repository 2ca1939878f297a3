"""What every command opens: base model, sampler, prompts and verifier of a config, and the problems it can use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from soar.config import Config
from soar.data import fits_budget
from soar.policy import Backbone, load_backbone
from soar.prompts import get_format
from soar.rollout import Examiner
from soar.sampler import NativeSampler
from soar.types import Problem, Verdict
from soar.verify import VerifierPool, columns_of
from soar.worlds import get_world

SMALL_MODEL = 5_000_000  # parameters under which worker threads beat threads inside one operation on a CPU
Usable = tuple[list[Problem], dict[str, int]]


def cores_of(threads: int) -> int:
    """`threads`, or the cores that this process may use."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(backbone: Backbone, threads: int) -> int:
    """CPU worker threads, and torch's own threads set to match.

    A small model is split among worker threads of one operation thread each; a large one, or a GPU, uses one worker.
    """
    cores = cores_of(threads)
    parameters = sum(p.numel() for p in backbone.model.parameters())
    if backbone.device.type != "cpu":
        return 1
    small = parameters < SMALL_MODEL
    torch.set_num_threads(1 if small else cores)
    return cores if small else 1


@contextmanager
def open_examiner(config: Config) -> Iterator[Examiner]:
    """Backbone, sampler, prompts and verifier pool of a config; the pool is closed at the end."""
    backbone = load_backbone(config.model)
    fmt = get_format(config.problems.format)
    with VerifierPool(
        config.problems.verifier,
        answer_style=fmt.answer_style,
        timeout_s=config.problems.verify_timeout_s,
        memory_mb=config.problems.verify_memory_mb,
        workers=config.problems.verify_workers,
    ) as verifier:
        yield Examiner(backbone, NativeSampler(backbone), fmt, verifier, config.student.reward)


def usable(examiner: Examiner, config: Config, problems: list[Problem], say: Callable[[str], None]) -> Usable:
    """Problems that fit in the context and whose gold answer can be graded; how many are left out, by reason.

    The first five of each reason are named through `say`.
    """
    tokens, context = config.student.sampling.max_tokens, examiner.backbone.context
    kept, dropped = fits_budget(problems, lambda problem: len(examiner.prompt(problem)), context, tokens)
    for row in dropped[:5]:
        say(f"left out: {row}")
    verdicts = examiner.verifier.check_golds([problem.answer for problem in kept], columns_of(kept))
    bad = [p for p, verdict in zip(kept, verdicts, strict=True) if verdict is Verdict.UNSCORABLE]
    for problem in bad[:5]:
        say(f"left out: the gold answer of {problem.id} cannot be graded: {problem.answer[:80]!r}")
    gone = {problem.id for problem in bad}
    return [p for p in kept if p.id not in gone], {"too_long": len(dropped), "ungradable": len(bad)}


def labelled(config: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with topic, well_posed and correct where the problem source has an exact oracle (for the record only)."""
    if not config.problems.source.startswith("world:"):
        return rows
    world = get_world(config.problems.source.removeprefix("world:"))
    return [
        {
            **row,
            "topic": world.topic(row["question"]),
            "well_posed": world.well_posed(row["question"]),
            "correct": world.solve(row["question"]) == row["answer"],
        }
        for row in rows
    ]
