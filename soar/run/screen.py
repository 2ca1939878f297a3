"""What a screening found, on one page: success rates, the hard set, and whether plain RL would have a signal.

fail@K screening: which problems does the base model never solve, and what would plain RL see on them?

The hard set of a config: candidates, screened now or shown to be hard before; the same for every command.
"""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config, ConfigError, ScreenConfig
from soar.domains.candidates import candidates
from soar.engine.policy import Backbone
from soar.files import read_jsonl, read_object, scrub, write_atomic, write_json
from soar.loop.arms import usable
from soar.loop.parallel import Parallel, Tick, spread
from soar.loop.rollout import Prompts, RolloutEnv
from soar.problems.domain import domain_of
from soar.problems.load import DataError, check_evidence, evidence_path, read_hard, split_source, write_hard
from soar.run.folder import RunFolder
from soar.run.interrupts import Stopped, StopRequest
from soar.run.progress import Progress
from soar.run.ray import check_cluster, open_parallel
from soar.run.setup import choose_threads, open_env
from soar.types import Problem, Screening

SHARES = ("pass_rate", "truncated_share", "frac_all_wrong", "frac_all_right", "frac_mixed")
BUCKETS = ((0.02, "<= 2 %"), (0.1, "2-10 %"), (0.5, "10-50 %"), (0.999999, "50-100 %"), (1.0, "all"))
FEW_MIXED = 0.02  # share of groups with a signal under which plain RL is as good as without one


def screen_event(found: Mapping[str, Screening], config: Config) -> dict[str, Any]:
    """The `screen` event: counts, histogram of success rates, and what a plain RL group would see.

    Rates and shares are None where nothing was attempted (screen.attempts = 0), and where attempts ended early: success
    rates of problems that were left at their first success are too high.
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
        shares["truncated_share"] = sum(row.truncated for row in rows) / attempts
    if attempts and not any(row.attempts < config.screen.attempts for row in rows):
        wrong = sum((1 - row.pass_rate) ** group for row in rows) / len(rows)
        right = sum(row.pass_rate**group for row in rows) / len(rows)
        correct = sum(row.successes for row in rows) / attempts
        shares |= {"pass_rate": correct, "frac_all_wrong": wrong, "frac_all_right": right}
        shares["frac_mixed"] = 1 - wrong - right
    if not attempts:
        histogram.clear()
    return {
        "event": "screen",
        "candidates": len(rows),
        "hard": sum(row.successes <= config.screen.max_successes for row in rows),
        "attempts": config.screen.attempts,
        "histogram": {label: histogram[label] for label in ["0", *(name for _, name in BUCKETS)]},
        **shares,
    }


def table_lines(screenings: Sequence[Screening], event: dict[str, Any], config: Config) -> list[str]:
    """The page as text lines. event: of `screen_event`, with what was left out before."""
    attempts, most = config.screen.attempts, config.screen.max_successes
    early = config.screen.early_stop
    lines = [
        f"{len(screenings)} problems, {'up to ' if early else ''}{attempts} attempts each "
        f"(temperature {config.screen.temperature}, at most {config.student.sampling.max_tokens} tokens)",
        "",
        "  correct attempts           problems    share",
    ]
    for label, count in _rows(screenings, attempts, early, most):
        lines.append(f"  {label:26s} {count:8,d}  {count / max(1, len(screenings)):6.1%}")
    allowed = f"at most {most} of {attempts} attempts correct" if most else f"none of {attempts} attempts correct"
    lines += ["", f"hard: {event['hard']} problems ({allowed})"]
    if event["pass_rate"] is not None:
        lines.append(f"correct attempts of all: {event['pass_rate']:.2%}")
    if event["truncated_share"] is not None:
        lines.append(f"attempts that hit the token budget: {event['truncated_share']:.1%}")
    left_out = [f"{event[key]} {text}" for key, text in LEFT_OUT.items() if event.get(key)]
    lines += [f"left out before: {', '.join(left_out)}"] if left_out else []
    return [*lines, "", *signal_lines(event, config)]


LEFT_OUT = {"too_long": "too long for the context", "ungradable": "whose gold answer cannot be graded"}


def _rows(screenings: Sequence[Screening], attempts: int, early: bool, most: int) -> list[tuple[str, int]]:
    """(label, problems) of each line of the histogram."""
    counts = [row.successes for row in screenings]
    if early:
        solved = sum(count > most for count in counts)
        rows = [("0", counts.count(0)), (f"1 to {most}", sum(0 < count <= most for count in counts))]
        return [*(rows if most else rows[:1]), (f"{most + 1} or more (then stopped)", solved)]
    tenth, half = attempts * 0.1, attempts * 0.5
    return [
        ("0", counts.count(0)),
        ("1", sum(count == 1 < attempts for count in counts)),
        ("2 or more, up to 10 %", sum(2 <= count <= tenth for count in counts)),
        ("10 to 50 %", sum(max(2, tenth) <= count <= half and count > tenth for count in counts)),
        ("50 % to all but one", sum(max(1, half) < count < attempts for count in counts)),
        ("all", counts.count(attempts)),
    ]


def signal_lines(event: dict[str, Any], config: Config) -> list[str]:
    """What a plain RLVR run with groups of student.attempts would see, in words, and what to do next."""
    group, hard, total = config.student.attempts, event["hard"], event["candidates"]
    lines = []
    if event["frac_mixed"] is not None:
        lines = [
            f"Plain RL with groups of {group} attempts at these problems would see",
            f"  all wrong (all rewards are zero)  {event['frac_all_wrong']:6.1%}",
            f"  all right (all rewards are equal) {event['frac_all_right']:6.1%}",
            f"  mixed (a learning signal)         {event['frac_mixed']:6.1%}",
        ]
    if total and event["histogram"]["0"] == total:
        lines += [
            "no learning signal: all rewards are zero. No attempt at any problem was correct, so every advantage is zero "
            "and plain RL stalls."
        ]
    elif event["frac_mixed"] is not None and event["frac_mixed"] < FEW_MIXED:
        wrong = event["frac_all_wrong"] >= event["frac_all_right"]
        what = "all rewards are zero" if wrong else "all rewards are equal, the problems are solved"
        lines += [f"no learning signal: {what} in nearly every group. Plain RL stalls."]
    elif event["frac_mixed"] is not None:
        lines += [f"Plain RL has a learning signal in {event['frac_mixed']:.0%} of these groups, none on the hard set."]
    return [*lines, *_advice(event, config, hard)]


def _advice(event: dict[str, Any], config: Config, hard: int) -> list[str]:
    lines = []
    truncated = event["truncated_share"] or 0.0
    if truncated > 0.5:
        lines.append(
            f"{truncated:.0%} of the attempts hit the token budget: a problem may be hard only because the answer comes too "
            f"late. Raise student.sampling.max_tokens (now {config.student.sampling.max_tokens}) and screen again."
        )
    if hard >= 4:
        return lines
    return [
        *lines,
        f"{hard} hard problems are too few for a run (at least 4): give harder problems, or count problems as hard that "
        f"are solved now and then (--set screen.max_successes={config.screen.max_successes + 1}).",
    ]


SCREEN_FILE = "hard/screen.jsonl"
BLOCK = {"cpu": 8, "cuda": 16}  # problems attempted together
FIRST_WAVE, WAVE_GROWTH = 8, 4  # with early_stop: 8 attempts, 24 more, 96 more ...
FREE = ("seed", "model", "revision")  # may differ in a screening that is used again: the weights are compared by hash
# What a hard set shown with one configuration must have in common with a run that uses it. The seed and early stopping
# are left out: another seed is another sample of the same evidence, and early stopping leaves the hard set as it is.
DECISIVE = (
    "model_sha256", "dtype", "prompt", "verifier", "domain", "attempts", "temperature", "top_p", "max_tokens", "stop",
)  # fmt: skip


def evidence_key(config: Config, backbone: Backbone, fmt: Prompts, model_hash: str) -> dict[str, Any]:
    """What must be equal for evidence to be added to."""
    sampling, domain = config.student.sampling, domain_of(config.problems)
    own = {"domain": domain.fingerprint()} if domain.own else {}
    key = {
        "model": config.model.path,
        "revision": config.model.revision,
        "model_sha256": model_hash,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "prompt": fmt.fingerprint(),
        "verifier": domain.label,
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


def screen_block(env: RolloutEnv, tick: Tick, config: Config, problems: list[Problem]) -> list[Screening]:
    """Attempts of the base model at each problem; with screen.early_stop until it has too many successes to be hard.

    A piece of work, see `loop.parallel`.

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
        result = env.rollout(None, [[problems[i] for i in open_]], last - first, [seed], sampling, first=first)
        correct_Q = (result.solved_P_Q_N & result.valid_P_Q_N)[0].sum(-1).tolist()
        truncated_Q = (~result.rollouts.ended_B.view(len(open_), last - first)).sum(-1).tolist()
        for i, correct, truncated in zip(open_, correct_Q, truncated_Q, strict=True):
            tallies[i].successes += correct
            tallies[i].attempts = last
            tallies[i].truncated += truncated
    return [Screening(tally.successes, tally.attempts, tally.truncated) for tally in tallies]


def screen(
    env: RolloutEnv,
    problems: list[Problem],
    config: Config,
    folder: RunFolder,
    evidence: dict[str, Any],
    threads: int,
    on_problems: Callable[[int], None],
    parallel: Parallel | None = None,
) -> dict[str, Screening]:
    """RolloutBatch of the base model at every problem; evidence rows go to hard/screen.jsonl block by block.

    Problems that the file already holds are not attempted again, except beside one that it lacks: blocks are cut from
    the whole list, so that a resumed screening computes with the batches of an uninterrupted one. Rows of another run may
    have another seed, which the rest is then drawn with too; rows made in another way raise data.DataError. threads:
    threads, where no parallel does the blocks. Returns problem id -> Screening.
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
    size = BLOCK.get(env.backbone.device.type, BLOCK["cuda"])
    blocks = [problems[first : first + size] for first in range(0, len(problems), size)]
    blocks = [part for part in blocks if any(problem.id not in found for problem in part)]
    results = spread(parallel, env, threads, screen_block, (config,), [(part,) for part in blocks])
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


def copy_screening(folder: RunFolder, place: Path, same: Callable[[dict[str, Any]], bool]) -> None:
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


@dataclass(frozen=True)
class HardSet:
    """problems: the hard ones, in the order of the source. found: problem id -> Screening, for every usable candidate.

    evidence: how it was shown. event: the `screen` event, with what was left out before. screened: every usable candidate.
    """

    problems: list[Problem]
    found: dict[str, Screening]
    evidence: dict[str, Any]
    event: dict[str, Any]
    screened: list[tuple[Problem, Screening]] = field(default_factory=list)

    def screenings(self, problems: list[Problem]) -> list[Screening]:
        """The counts of the named problems."""
        return [self.found[problem.id] for problem in problems]

    def too_few(self, config: Config) -> str:
        """Why a run cannot begin with this hard set, and what to do."""
        event, grader = self.event, domain_of(config.problems).label
        longer = "lower student.sampling.max_tokens, give a model with a longer context, " if event["too_long"] else ""
        return (
            f"{len(self.problems)} of {len(self.found)} problems are hard (at most {config.screen.max_successes} of "
            f"{config.screen.attempts} attempts correct); {event['too_long']} more do not fit in the model's context, "
            f"and the gold answers of {event['ungradable']} cannot be graded by "
            f"{grader!r}. A run needs at least 4: {longer}give harder problems, raise "
            "screen.max_successes, or choose another verifier. If most problems are solved sometimes, plain RL "
            "already has a signal."
        )


def find_hard(
    env: RolloutEnv,
    config: Config,
    folder: RunFolder,
    threads: int,
    progress: Progress,
    safe_point: Callable[[], None] | None = None,
    reuse: bool = True,
    parallel: Parallel | None = None,
) -> HardSet:
    """Load, leave out what cannot be used, screen, select.

    safe_point: called after every saved block of screening; it may raise to stop there.
    reuse: a problem file with its evidence beside it is not screened again. With screen.attempts = 0 nothing is.
    Raises ConfigError, DataError, and RunFolderError when model, problems or prompts changed since the folder was begun.
    """
    loaded = candidates(config, folder.manifest["hashes"].get("dataset_revision"))
    model_hash = env.backbone.base_digest()
    dtype = str(env.backbone.dtype).removeprefix("torch.")  # before the model's: it tells why that one changed
    domain = domain_of(config.problems)
    own = {"domain": hashlib.sha256(domain.fingerprint().encode()).hexdigest()} if domain.own else {}
    folder.note_hashes(**loaded.hashes, dtype=dtype, model=model_hash, prompts=env.fmt.fingerprint(), **own)
    for line in loaded.report.lines():
        progress.say(line)
    problems, left_out = usable(env, config, loaded.problems, progress.say)
    evidence = evidence_key(config, env.backbone, env.fmt, model_hash)
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

            found = screen(env, problems, config, folder, evidence, threads, note, parallel)
        if rows := folder.rows(SCREEN_FILE):  # of another run, where its screening is used again
            evidence = rows[0]["evidence"]
    else:
        found = {problem.id: Screening(0, 0) for problem in problems}
    hard = [problem for problem in problems if found[problem.id].successes <= config.screen.max_successes]
    if config.problems.max_hard:
        hard = hard[: config.problems.max_hard]
    event = {**screen_event(found, config), **left_out}
    return HardSet(hard, found, evidence, event, [(problem, found[problem.id]) for problem in problems])


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
    with RunFolder(out, config, command, resume) as folder, open_env(config) as env:
        threads = choose_threads(env.backbone, config.threads)
        with open_parallel(config, env, folder, progress.say) as parallel:
            hard = find_hard(env, config, folder, threads, progress, safe_point, reuse=False, parallel=parallel)
    if hard.problems:
        write_hard(out / "hard.jsonl", hard.problems, hard.screenings(hard.problems), hard.evidence, columns=True)
    write_json(out / "screen.json", hard.event)
    lines = table_lines(list(hard.found.values()), hard.event, config)
    write_atomic(out / "table.txt", ("\n".join(lines) + "\n").encode())
    return lines
