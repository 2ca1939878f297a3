"""Held-out attempts of the arms, block by block, in a file from which an interrupted evaluation goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from soar.config import Config
from soar.crew import Crew
from soar.evaluate import count_correct
from soar.policy import AdapterStack, concat
from soar.record import RunFolder
from soar.rollout import Examiner
from soar.types import Problem
from soar.workload import HELD_OUT_BLOCK

FILE = "state/evaluation.jsonl"
BLOCK = HELD_OUT_BLOCK  # problems from one save to the next


def count_held_out(
    examiner: Examiner,
    policies: dict[str, AdapterStack],
    problems: list[Problem],
    config: Config,
    folder: RunFolder,
    seed: int,
    workers: int,
    on_problems: Callable[[int], None],
    crew: Crew | None = None,
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
            examiner,
            concat(list(policies.values())),
            missing,
            config.evaluate.attempts,
            seed,
            sampling,
            workers=workers,
            block=BLOCK,
            on_block=keep,
            crew=crew,
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
