"""The hard set of a config: candidates, screened now or shown to be hard before; the same for every command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar.candidates import candidates
from soar.config import Config
from soar.crew import Crew
from soar.data import DataError, check_evidence, evidence_path, read_hard, split_source, write_hard
from soar.files import write_atomic, write_json
from soar.progress import Progress
from soar.ray_crew import open_crew
from soar.record import RunFolder
from soar.rollout import Examiner
from soar.screen_table import table_lines
from soar.screening import DECISIVE, evidence_key, screen, screen_event
from soar.screening import reuse as copy_screening
from soar.types import Problem, Screening
from soar.workbench import choose_workers, open_examiner, usable


@dataclass(frozen=True)
class HardSet:
    """problems: the hard ones, in the order of the source. found: problem id -> Screening, for every usable candidate.

    evidence: how it was shown. event: the `screen` event, with what was left out before.
    """

    problems: list[Problem]
    found: dict[str, Screening]
    evidence: dict[str, Any]
    event: dict[str, Any]

    def screenings(self, problems: list[Problem]) -> list[Screening]:
        """The counts of the named problems."""
        return [self.found[problem.id] for problem in problems]

    def too_few(self, config: Config) -> str:
        """Why a run cannot begin with this hard set, and what to do."""
        event = self.event
        return (
            f"{len(self.problems)} of {len(self.found)} problems are hard (at most {config.screen.max_successes} of "
            f"{config.screen.attempts} attempts correct); {event['too_long']} more do not fit in the model's context, "
            f"and the gold answers of {event['ungradable']} cannot be graded by problems.verifier = "
            f"{config.problems.verifier!r}. A run needs at least 4: give harder problems, raise "
            "screen.max_successes, or choose another verifier. If most problems are solved sometimes, plain RL "
            "already has a signal."
        )


def find_hard(
    examiner: Examiner,
    config: Config,
    folder: RunFolder,
    workers: int,
    progress: Progress,
    safe_point: Callable[[], None] | None = None,
    reuse: bool = True,
    crew: Crew | None = None,
) -> HardSet:
    """Load, leave out what cannot be used, screen, select.

    safe_point: called after every saved block of screening; it may raise to stop there.
    reuse: a problem file with its evidence beside it is not screened again. With screen.attempts = 0 nothing is.
    Raises ConfigError, DataError, and RunFolderError when model, problems or prompts changed since the folder was begun.
    """
    loaded = candidates(config, folder.manifest["hashes"].get("dataset_revision"))
    model_hash = examiner.backbone.base_digest()
    folder.note_hashes(**loaded.hashes, model=model_hash, prompts=examiner.fmt.fingerprint())
    for line in loaded.report.lines():
        progress.say(line)
    problems, left_out = usable(examiner, config, loaded.problems, progress.say)
    evidence = evidence_key(config, examiner.backbone, examiner.fmt, model_hash)
    known = known_hard(config) if reuse and config.screen.attempts else None
    if known is not None:
        evidence = use_evidence(known, evidence)
        found = {problem.id: known.found[problem.id] for problem in problems}
        progress.say(f"{known.where}: shown to be hard with {evidence['attempts']} attempts; not screened again")
    elif config.screen.attempts:
        if config.screen.from_run:
            copy_screening(folder, Path(config.screen.from_run))
        with progress.task("screening", len(problems)) as advance:

            def note(count: int) -> None:
                advance(count)
                if safe_point is not None:
                    safe_point()

            found = screen(examiner, problems, config, folder, evidence, workers, note, crew)
    else:
        found = {problem.id: Screening(0, 0) for problem in problems}
    hard = [problem for problem in problems if found[problem.id].successes <= config.screen.max_successes]
    if config.problems.max_hard:
        hard = hard[: config.problems.max_hard]
    return HardSet(hard, found, evidence, {**screen_event(found, config), **left_out})


@dataclass(frozen=True)
class KnownHard:
    """A problem file that was screened before. where: its evidence file."""

    found: dict[str, Screening]
    evidence: dict[str, Any]
    where: Path


def known_hard(config: Config) -> KnownHard | None:
    """The screening that lies beside the problem file, or None. Raises DataError for a damaged one."""
    kind, name = split_source(config.problems.source)
    where = evidence_path(Path(name).expanduser())
    if kind != "file" or not where.is_file():
        return None
    problems, screenings, evidence = read_hard(Path(name).expanduser())
    return KnownHard({p.id: s for p, s in zip(problems, screenings, strict=True)}, evidence, where)


def use_evidence(known: KnownHard, wanted: dict[str, Any]) -> dict[str, Any]:
    """The evidence of a known hard set. Raises DataError naming what differs from how this run would screen."""
    try:
        check_evidence(known.evidence, {key: wanted[key] for key in DECISIVE if key in wanted}, str(known.where))
    except DataError as error:
        raise DataError(
            f"{error} with `soar screen`, or set this run's keys to the values of the evidence; "
            "without the evidence file the run screens by itself"
        ) from None
    return known.evidence


def screen_folder(config: Config, out: Path, resume: bool, command: list[str], progress: Progress) -> list[str]:
    """Screen the candidates of a config in the folder `out`; returns the table as lines.

    Writes hard/screen.jsonl block by block, and at the end hard.jsonl with its evidence (none without hard problems),
    screen.json (the `screen` event) and table.txt. Raises ConfigError, DataError and RunFolderError.
    """
    with RunFolder(out, config, command, resume) as folder, open_examiner(config) as examiner:
        workers = choose_workers(examiner.backbone, config.threads)
        with open_crew(config, examiner, folder, progress.say) as crew:
            hard = find_hard(examiner, config, folder, workers, progress, reuse=False, crew=crew)
    if hard.problems:
        write_hard(out / "hard.jsonl", hard.problems, hard.screenings(hard.problems), hard.evidence, columns=True)
    write_json(out / "screen.json", hard.event)
    lines = table_lines(list(hard.found.values()), hard.event, config)
    write_atomic(out / "table.txt", ("\n".join(lines) + "\n").encode())
    return lines
