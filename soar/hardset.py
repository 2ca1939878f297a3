"""The hard set of a config: candidates, screened now or shown to be hard before; the same for every command."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from soar.candidates import candidates
from soar.config import Config, by_set
from soar.crew import Crew
from soar.data import DataError, check_evidence, evidence_path, read_hard, split, split_source, write_hard
from soar.domains import domains_of
from soar.files import write_atomic, write_json
from soar.progress import Progress
from soar.ray_cluster import check_cluster
from soar.ray_crew import open_crew
from soar.record import RunFolder
from soar.rollout import Examiner
from soar.screen_table import screen_event, table_lines
from soar.screening import DECISIVE, SCREEN_FILE, evidence_key, screen
from soar.screening import reuse as copy_screening
from soar.scrub import scrub
from soar.stopping import Stopped, StopRequest
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
        event, graders = self.event, ", ".join(domain.label for domain in domains_of(config).values())
        longer = "lower student.sampling.max_tokens, give a model with a longer context, " if event["too_long"] else ""
        return (
            f"{len(self.problems)} of {len(self.found)} problems are hard (at most {config.screen.max_successes} of "
            f"{config.screen.attempts} attempts correct); {event['too_long']} more do not fit in the model's context, "
            f"and the gold answers of {event['ungradable']} cannot be graded by "
            f"{graders!r}. A run needs at least 4: {longer}give harder problems, raise "
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
    dtype = str(examiner.backbone.dtype).removeprefix("torch.")  # before the model's: it tells why that one changed
    domains = domains_of(config)
    prints = [name + domain.fingerprint() for name, domain in domains.items() if domain.own or name]
    own = {"domain": hashlib.sha256(" ".join(prints).encode()).hexdigest()} if prints else {}
    folder.note_hashes(**loaded.hashes, dtype=dtype, model=model_hash, prompts=examiner.fmt.fingerprint(), **own)
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
            copy_screening(folder, Path(config.screen.from_run), partial(_same_problems, config, loaded.digest))
        with progress.task("screening", len(problems)) as advance:

            def note(count: int) -> None:
                advance(count)
                if safe_point is not None:
                    safe_point()

            found = screen(examiner, problems, config, folder, evidence, workers, note, crew)
        if rows := folder.rows(SCREEN_FILE):  # of another run, where its screening is used again
            evidence = rows[0]["evidence"]
    else:
        found = {problem.id: Screening(0, 0) for problem in problems}
    hard = [problem for problem in problems if found[problem.id].successes <= config.screen.max_successes]
    if config.problems.max_hard:
        hard = [p for name in by_set(config) for p in _first(hard, name, config.problems.max_hard)]
    event = {**screen_event(found, config), **left_out}
    if config.problems.sets:
        event["sets"] = {name: _counts(name, problems, hard) for name in config.problems.sets}
    return HardSet(hard, found, evidence, event)


def _same_problems(config: Config, digest: str, manifest: dict[str, Any]) -> bool:
    """Whether the run of a manifest had the candidates of this config, or more or fewer of the same by problems.limit."""
    try:
        known, limit = manifest["hashes"]["problems"], manifest["config"]["problems"]["limit"]
    except (KeyError, TypeError):
        return False
    if known == digest or type(limit) is not int or limit == config.problems.limit:
        return bool(known == digest)
    as_many = config.problems.model_copy(update={"limit": limit})
    return bool(candidates(config.model_copy(update={"problems": as_many})).digest == known)


def _counts(name: str, problems: list[Problem], hard: list[Problem]) -> dict[str, int]:
    """Candidates and hard problems of one set."""
    return {"candidates": sum(p.set == name for p in problems), "hard": sum(p.set == name for p in hard)}


def split_sets(hard: list[Problem], config: Config) -> tuple[list[Problem], list[Problem]]:
    """Training and test half; of a mixed run the halves of every set, so that each is in both.

    Raises DataError naming a set with fewer than two hard problems.
    """
    halves = []
    for name in by_set(config):
        own = [problem for problem in hard if not name or problem.set == name]
        if name and len(own) < 2:
            raise DataError(
                f"problems.sets.{name} has {len(own)} hard problems, and every set needs 2 or more; give it harder problems, "
                "or leave it out"
            )
        halves.append(split(own, config.seed, config.problems.test_share))
    return [p for train, _ in halves for p in train], [p for _, test in halves for p in test]


def _first(hard: list[Problem], name: str, count: int) -> list[Problem]:
    return [problem for problem in hard if not name or problem.set == name][:count]


@dataclass(frozen=True)
class KnownHard:
    """A problem file that was screened before. where: its evidence file."""

    found: dict[str, Screening]
    evidence: dict[str, Any]
    where: Path


def known_hard(config: Config) -> KnownHard | None:
    """The screening that lies beside the problem file, or None. Raises DataError for a damaged one."""
    if config.problems.sets:
        return None
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


def screen_folder(
    config: Config, out: Path, resume: bool, command: list[str], progress: Progress, stop: StopRequest | None = None
) -> list[str]:
    """Screen the candidates of a config in the folder `out`; returns the table as lines.

    Writes hard/screen.jsonl block by block, and at the end hard.jsonl with its evidence (none without hard problems),
    screen.json (the `screen` event) and table.txt. Raises ConfigError, DataError and RunFolderError; Stopped after a block
    of problems when `stop` asks for it.
    """

    def safe_point() -> None:
        if stop is not None and stop.reason is not None:
            again = shlex.join([*command, *([] if resume else ["--resume"])])
            raise Stopped(stop.reason, f"Continue with: {scrub(again)}", stop.exit_code)

    check_cluster(config)
    with RunFolder(out, config, command, resume) as folder, open_examiner(config) as examiner:
        workers = choose_workers(examiner.backbone, config.threads)
        with open_crew(config, examiner, folder, progress.say) as crew:
            hard = find_hard(examiner, config, folder, workers, progress, safe_point, reuse=False, crew=crew)
    if hard.problems:
        write_hard(out / "hard.jsonl", hard.problems, hard.screenings(hard.problems), hard.evidence, columns=True)
    write_json(out / "screen.json", hard.event)
    lines = table_lines(list(hard.found.values()), hard.event, config)
    write_atomic(out / "table.txt", ("\n".join(lines) + "\n").encode())
    return lines
