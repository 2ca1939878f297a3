"""fail@K screening: which problems does the base model never solve, and what would plain RL see on them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config, ConfigError
from soar.crew import Crew, Tick, spread
from soar.data import check_evidence
from soar.domains import domains_of
from soar.policy import Backbone
from soar.prompts import PromptFormat
from soar.record import RunFolder
from soar.rollout import Examiner
from soar.runs import read_jsonl, read_object
from soar.settings import ScreenConfig
from soar.types import Problem, Screening

SCREEN_FILE = "hard/screen.jsonl"
BLOCK = {"cpu": 8, "cuda": 16}  # problems attempted together
FIRST_WAVE, WAVE_GROWTH = 8, 4  # with early_stop: 8 attempts, 24 more, 96 more ...
FREE = ("seed", "model", "revision")  # may differ in a screening that is used again: the weights are compared by hash
# What a hard set shown with one configuration must have in common with a run that uses it. The seed and early stopping
# are left out: another seed is another sample of the same evidence, and early stopping leaves the hard set as it is.
DECISIVE = (
    "model_sha256", "dtype", "prompt", "verifier", "domain", "attempts", "temperature", "top_p", "max_tokens", "stop",
)  # fmt: skip


def evidence_key(config: Config, backbone: Backbone, fmt: PromptFormat, model_hash: str) -> dict[str, Any]:
    """What must be equal for evidence to be added to."""
    sampling, domains = config.student.sampling, domains_of(config)
    domain = next(iter(domains.values()))
    own = {"domain": domain.fingerprint()} if domain.own else {}
    if config.problems.sets:
        own = {"domain": " ".join(f"{name}:{part.label}:{part.fingerprint()}" for name, part in domains.items())}
    key = {
        "model": config.model.path,
        "revision": config.model.revision,
        "model_sha256": model_hash,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "prompt": fmt.fingerprint(),
        "verifier": "mixed" if config.problems.sets else domain.label,
        **own,
        "attempts": config.screen.attempts,
        "max_successes": config.screen.max_successes,
        "early_stop": config.screen.early_stop,
        "temperature": config.screen.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": config.seed,
    }
    # Only where there are any, so that evidence from before there were stop strings still counts.
    return key | ({"stop": list(sampling.stop)} if sampling.stop else {})


def waves(config: ScreenConfig) -> Iterator[tuple[int, int]]:
    """(first, last) attempt of each call: all at once, or with early_stop a few, and more where they are needed."""
    first, last = 0, FIRST_WAVE if config.early_stop else config.attempts
    while first < config.attempts:
        last = min(last, config.attempts)
        yield first, last
        first, last = last, last * WAVE_GROWTH


@dataclass
class _Tally:
    """Counts of one problem while its waves go on."""

    successes: int = 0
    attempts: int = 0
    truncated: int = 0


def attempt_block(examiner: Examiner, problems: list[Problem], config: Config) -> list[Screening]:
    """Attempts of the base model at each problem; with screen.early_stop until it has too many successes to be hard.

    Attempt n draws from (seed, problem id, n) alone, so the attempts of a problem that is never solved are the same
    with and without early stopping.
    """
    sampling = config.student.sampling.model_copy(update={"temperature": config.screen.temperature})
    seed = seeds.derive(config.seed, "screen")
    tallies = [_Tally() for _ in problems]
    for first, last in waves(config.screen):
        open_ = [i for i, tally in enumerate(tallies) if tally.successes <= config.screen.max_successes or not first]
        if not open_:
            break
        result = examiner.attempt(None, [[problems[i] for i in open_]], last - first, [seed], sampling, first=first)
        correct_Q = (result.solved_P_Q_N & result.valid_P_Q_N)[0].sum(-1).tolist()
        truncated_Q = (~result.rollouts.ended_B.view(len(open_), last - first)).sum(-1).tolist()
        for i, correct, truncated in zip(open_, correct_Q, truncated_Q, strict=True):
            tallies[i].successes += correct
            tallies[i].attempts = last
            tallies[i].truncated += truncated
    return [Screening(tally.successes, tally.attempts, tally.truncated) for tally in tallies]


def screen(
    examiner: Examiner,
    problems: list[Problem],
    config: Config,
    folder: RunFolder,
    evidence: dict[str, Any],
    workers: int,
    on_problems: Callable[[int], None],
    crew: Crew | None = None,
) -> dict[str, Screening]:
    """Attempts of the base model at every problem; evidence rows go to hard/screen.jsonl block by block.

    Problems that the file already holds are not attempted again, except beside one that it lacks: blocks are cut from
    the whole list, so that a resumed screening computes with the batches of an uninterrupted one. Rows of another run may
    have another seed, which the rest is then drawn with too; rows made in another way raise data.DataError. workers:
    threads, where no crew does the blocks. Returns problem id -> Screening.
    """
    found: dict[str, Screening] = {}
    rows = folder.rows(SCREEN_FILE, partial(_usable, config.screen.attempts))
    for row in rows:
        if "evidence" in row:
            wanted = {key: value for key, value in evidence.items() if key not in FREE}
            check_evidence(row["evidence"], wanted, f"{folder.path}/{SCREEN_FILE}")
            seed = row["evidence"].get("seed", config.seed)  # what is left is drawn like the rest
            config = config.model_copy(update={"seed": seed})
        else:
            found[row["id"]] = Screening(row["successes"], row["attempts"], row["truncated"])
    if not rows:
        folder.append(SCREEN_FILE, [{"evidence": evidence}])
    on_problems(len(found))
    size = BLOCK.get(examiner.backbone.device.type, BLOCK["cuda"])
    blocks = [problems[first : first + size] for first in range(0, len(problems), size)]
    blocks = [part for part in blocks if any(problem.id not in found for problem in part)]
    results = spread(crew, examiner, workers, screen_block, (config,), [(part,) for part in blocks])
    for part, screenings in zip(blocks, results, strict=True):
        fresh = [(p.id, s) for p, s in zip(part, screenings, strict=True) if p.id not in found]
        found.update(fresh)
        folder.append(
            SCREEN_FILE,
            [{"id": i, "successes": s.successes, "attempts": s.attempts, "truncated": s.truncated} for i, s in fresh],
        )
        on_problems(len(fresh))
    return {problem.id: found[problem.id] for problem in problems}


def _usable(attempts: int, number: int, row: dict[str, Any]) -> bool:
    """Whether a line of hard/screen.jsonl says how it was screened (the first), or what came of a problem."""
    if number == 1 or "evidence" in row:
        known = row.get("evidence")
        return number == 1 and isinstance(known, dict) and type(known.get("seed", 0)) is int
    counts: list[Any] = [row.get(key) for key in ("successes", "truncated", "attempts")]
    if not isinstance(row.get("id"), str) or any(type(count) is not int for count in counts):
        return False
    successes, truncated, made = counts
    return 0 <= successes <= made <= attempts and 0 <= truncated <= made


def reuse(folder: RunFolder, place: Path, same: Callable[[dict[str, Any]], bool]) -> None:
    """Copy the screening of another run folder, unless this one has begun its own; `screen` checks how it was made.

    same(manifest): whether the other run's problems are this one's; ids alone do not say that. Raises ConfigError when
    there is no screening, or one of other problems.
    """
    if (folder.path / SCREEN_FILE).is_file():
        return
    rows, notes = read_jsonl(place / SCREEN_FILE, SCREEN_FILE)
    if not rows:
        why = "; ".join(notes) or "it is empty"
        raise ConfigError(f"screen.from_run = {str(place)!r}: {why}; give a run folder that was screened")
    if not same(read_object(place / "manifest.json")[0]):
        raise ConfigError(
            f"screen.from_run = {str(place)!r}: it screened other problems (hashes.problems in its manifest.json is not "
            "this run's); give a run of the same problems, or leave the key out"
        )
    folder.append(SCREEN_FILE, rows)


def screen_block(examiner: Examiner, tick: Tick, config: Config, problems: list[Problem]) -> list[Screening]:
    """`attempt_block` as a piece of work."""
    return attempt_block(examiner, problems, config)
