"""fail@K screening: which problems does the base model never solve, and what would plain RL see on them?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config, ConfigError
from soar.data import check_evidence
from soar.evaluate import count_correct
from soar.policy import Backbone
from soar.prompts import PromptFormat
from soar.record import RunFolder
from soar.rollout import Examiner
from soar.runs import read_jsonl
from soar.types import Problem, Screening

SCREEN_FILE = "hard/screen.jsonl"
SHARES = ("pass_rate", "truncated_share", "frac_all_wrong", "frac_all_right", "frac_mixed")
BUCKETS = ((0.02, "<= 2 %"), (0.1, "2-10 %"), (0.5, "10-50 %"), (0.999999, "50-100 %"), (1.0, "all"))


def evidence_key(config: Config, backbone: Backbone, fmt: PromptFormat, model_hash: str) -> dict[str, Any]:
    """What must be equal for evidence to be used again."""
    sampling = config.student.sampling
    return {
        "model": config.model.path,
        "model_sha256": model_hash,
        "prompt": fmt.fingerprint(),
        "verifier": config.problems.verifier,
        "attempts": config.screen.attempts,
        "temperature": config.screen.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": config.seed,
    }


def screen(
    examiner: Examiner,
    problems: list[Problem],
    config: Config,
    folder: RunFolder,
    evidence: dict[str, Any],
    workers: int,
    on_problems: Callable[[int], None],
) -> dict[str, Screening]:
    """Attempts of the base model at every problem; evidence rows go to hard/screen.jsonl block by block.

    Problems that the file already holds are not attempted again; rows made in another way raise data.DataError.
    Returns problem id -> Screening.
    """
    found: dict[str, Screening] = {}
    for row in folder.rows(SCREEN_FILE):
        if "evidence" in row:
            check_evidence(row["evidence"], evidence, f"{folder.path}/{SCREEN_FILE}")
        else:
            found[row["id"]] = Screening(row["successes"], row["attempts"], row["truncated"])
    if not found:
        folder.append(SCREEN_FILE, [{"evidence": evidence}])
    on_problems(len(found))
    missing = [problem for problem in problems if problem.id not in found]
    attempts = config.screen.attempts
    sampling = config.student.sampling.model_copy(update={"temperature": config.screen.temperature})

    def keep(part: list[Problem], correct_P_H: Any, truncated_P_H: Any) -> None:
        rows = []
        for problem, correct, truncated in zip(part, correct_P_H[0].tolist(), truncated_P_H[0].tolist(), strict=True):
            found[problem.id] = Screening(correct, attempts, truncated)
            rows.append({"id": problem.id, "successes": correct, "attempts": attempts, "truncated": truncated})
        folder.append(SCREEN_FILE, rows)
        on_problems(len(part))

    if missing:
        seed = seeds.derive(config.seed, "screen")
        count_correct(examiner, None, missing, attempts, seed, sampling, workers=workers, block=8, on_block=keep)
    return {problem.id: found[problem.id] for problem in problems}


def reuse(folder: RunFolder, place: Path) -> None:
    """Copy the screening of another run folder, unless this one has begun its own; `screen` checks that it fits.

    Raises ConfigError when there is none.
    """
    if (folder.path / SCREEN_FILE).is_file():
        return
    rows, notes = read_jsonl(place / SCREEN_FILE, SCREEN_FILE)
    if not rows:
        why = "; ".join(notes) or "it is empty"
        raise ConfigError(f"screen.from_run = {str(place)!r}: {why}; give a run folder that was screened")
    folder.append(SCREEN_FILE, rows)


def screen_event(found: dict[str, Screening], config: Config) -> dict[str, Any]:
    """The `screen` event: counts, histogram of success rates, and what a plain RL group would see.

    Rates and shares are None where nothing was attempted (screen.attempts = 0).
    """
    rows = list(found.values())
    histogram: Counter[str] = Counter()
    for row in rows:
        if row.successes == 0:
            histogram["0"] += 1
        else:
            histogram[next(label for limit, label in BUCKETS if row.pass_rate <= limit)] += 1
    group = config.student.attempts
    attempts = sum(row.attempts for row in rows)
    shares: dict[str, float | None] = dict.fromkeys(SHARES)
    if attempts:
        wrong = sum((1 - row.pass_rate) ** group for row in rows) / len(rows)
        right = sum(row.pass_rate**group for row in rows) / len(rows)
        correct = sum(row.successes for row in rows) / attempts
        truncated = sum(row.truncated for row in rows) / attempts
        shares = dict(zip(SHARES, (correct, truncated, wrong, right, 1 - wrong - right), strict=True))
    else:
        histogram.clear()
    return {
        "event": "screen",
        "candidates": len(rows),
        "hard": sum(row.successes <= config.screen.max_successes for row in rows),
        "attempts": config.screen.attempts,
        "histogram": {label: histogram[label] for label in ["0", *(name for _, name in BUCKETS)]},
        **shares,
    }
