"""fail@K screening: which problems does the base model never solve, and what would plain RL see on them?

Attempts are made in waves over all problems: a few at each, then more. Attempt n at a problem draws from (seed, problem
id, n) alone, so the attempts of a problem that is never solved are the same with and without early stopping. A stop is
heard in the middle of a wave; the calls that were done are kept.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from soar import seeds
from soar.config import FEWEST_HARD, Config, ConfigError
from soar.domains.candidates import candidates
from soar.files import Row, read_jsonl, read_object, write_atomic, write_json
from soar.loop.arms import usable
from soar.loop.evaluate import rate_of_unsolved
from soar.loop.parallel import Tick, map_tasks, no_tick
from soar.loop.rollout import RolloutEnv
from soar.problems.load import check_evidence, evidence_path, hard_file, read_hard, write_hard
from soar.problems.verify import gold_kind
from soar.report.runs import mapping
from soar.report.text import fill
from soar.run.folder import EVIDENCE, RunFolder
from soar.run.progress import Progress
from soar.run.ray import check_cluster, open_parallel
from soar.run.setup import open_env
from soar.types import Problem, Screening

SHARES = ("pass_rate", "truncated_share", "frac_all_wrong", "frac_all_right", "frac_mixed")
LEFT_OUT = {
    "too_long": "too long for the context",
    "ungradable": "whose gold answer cannot be graded",
    "text_golds": "whose gold answer can only be compared as text (screen.text_golds = true keeps them)",
}
BUCKETS = ((0.0, "0"), (0.02, "<= 2 %"), (0.1, "2-10 %"), (0.5, "10-50 %"), (0.999999, "50-100 %"), (1.0, "all"))
FEW_SOLVABLE = 32  # candidates solved now and then, at most every second time, under which they are no training set
FEW_MIXED = 0.02  # share of groups with a signal under which plain RL is as good as without one


def screen_event(found: Mapping[str, Screening], config: Config) -> Row:
    """The `screen` event: counts, histogram of success rates, and what a plain RL group would see; None: not known."""
    rows = list(found.values())
    histogram = dict.fromkeys(dict(BUCKETS).values(), 0)
    group, attempts = config.student.attempts, sum(row.attempts for row in rows)
    most, tries = config.screen.max_successes, config.screen.attempts
    shares: dict[str, float | None] = dict.fromkeys(SHARES)
    if attempts:
        shares["truncated_share"] = sum(row.truncated for row in rows) / attempts
        for row in rows:
            histogram[next(name for limit, name in BUCKETS if row.pass_rate <= limit)] += 1
    if attempts and not any(row.attempts < tries for row in rows):  # left at a first success its rate is too high
        wrong = sum((1 - row.pass_rate) ** group for row in rows) / len(rows)
        right = sum(row.pass_rate**group for row in rows) / len(rows)
        correct = sum(row.successes for row in rows) / attempts
        shares |= {"pass_rate": correct, "frac_all_wrong": wrong, "frac_all_right": right}
        shares["frac_mixed"] = 1 - wrong - right
    hard = sum(row.successes <= most for row in rows)
    about = {"event": "screen", "candidates": len(rows), "hard": hard, "attempts": tries}
    rate, planned = None, planned_rollouts(config)
    if tries > most:  # else nothing says how often an attempt at a hard problem succeeds
        before = list(waves(tries))[-1][0] if config.screen.early_stop else 0
        rate = rate_of_unsolved([row.successes for row in rows if row.attempts == tries], tries, most, before)
    expected = None if rate is None else rate * planned
    plan = {"hard_rate": rate, "planned_rollouts": planned, "expected_successes": expected}
    return {**about, "histogram": histogram, **plan, **shares}


def planned_rollouts(config: Config) -> int:
    """Student rollouts planned for Hard-Only: arms.tokens in completions of half their room, arms.steps, or as the loop."""
    teacher, student = config.teacher, config.student
    if config.arms.tokens:
        return round(config.arms.tokens / (student.sampling.max_tokens / 2))
    loop = teacher.steps * teacher.datasets * student.repeats * student.steps * student.prompts_per_step
    return (config.arms.steps * config.arm_prompts or loop) * student.attempts


def what_fits(config: Config, rate: float, tried: int, easier: int | None = None) -> str:
    """What to train first, and where that was measured, as lines. rate: share of attempts at the training problems that the
    base model solves, 0 for none of `tried`. easier: candidates that it solves now and then; None where nobody looked.
    """
    planned, step = planned_rollouts(config), config.arm_prompts * config.student.attempts
    most = rate or min(1.0, 3 / tried)  # none of n: the rate is under 3 / n with 95 %
    found: Row = {"rate": rate, "tried": tried, "easier": easier, "few": FEW_SOLVABLE}
    return fill("fits.txt", planned=planned, expected=most * planned, step=most * step, **found)


def left_out_before(event: Row) -> str:
    """How many candidates were left out before screening, and why; "" for none."""
    return ", ".join(f"{event[key]} {text}" for key, text in LEFT_OUT.items() if event.get(key))


def table_lines(event: Row, config: Config) -> list[str]:
    """The `screen` event for a person: counts, what plain RL with groups of student.attempts would see, what to do next."""
    easier = event["candidates"] - event["hard"] - event["histogram"]["50-100 %"] - event["histogram"]["all"]
    tried = event["hard"] * event["attempts"] * (event["attempts"] > config.screen.max_successes)
    fits = what_fits(config, event["hard_rate"] or 0.0, tried, easier) if tried else ""
    words = {"left_out": left_out_before(event), "fits": fits, "few_mixed": FEW_MIXED, "fewest": FEWEST_HARD}
    return fill("screen.txt", event=event, config=config, **words).split("\n")


FIRST_WAVE, GROWTH, MOST_WAVE = 8, 4, 32  # attempts at each problem: 8, 24 more, then 32 at a time
ROWS_CPU = (8, 512)  # rows of a call on a CPU, fewest and most: what a stop in the middle of it can lose ...
CALL_FLOP = 1e13  # ... is one or two minutes of work, by the size of the model
ROWS_GPU = 4096  # rows of a call of a sampler that does not say how many it takes at once
FREE = ("seed", "model", "revision")  # may differ in a screening that is used again: the weights are compared by hash
# And in a hard set that was shown by another screening: early stopping leaves the hard set as it is.
FREE_OF_HARD = (*FREE, "max_successes", "early_stop")


def evidence_key(config: Config, env: RolloutEnv) -> Row:
    """What must be equal for evidence to be added to."""
    model, screen, sampling, domain = config.model, config.screen, config.student.sampling, env.verifier.domain
    weights = {"model": model.path, "revision": model.revision, "model_sha256": env.backbone.base_digest()}
    texts = {"prompt": env.fmt.fingerprint(), "verifier": domain.label}
    if domain.own:
        texts["domain"] = domain.fingerprint()
    elif domain.source_sha256:
        texts["verifier_sha256"] = domain.source_sha256
    rule = {"attempts": screen.attempts, "max_successes": screen.max_successes, "early_stop": screen.early_stop}
    drawn = {"temperature": screen.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
    more: Row = {"seed": config.seed, **({"stop": list(sampling.stop)} if sampling.stop else {})}
    more |= {"template_options": model.template_options} if model.template_options else {}
    return {**weights, "dtype": str(env.backbone.dtype).removeprefix("torch."), **texts, **rule, **drawn, **more}


def waves(attempts: int) -> Iterator[tuple[int, int]]:
    """(first, last) attempt of each wave."""
    first, last = 0, min(FIRST_WAVE, attempts)
    while first < attempts:
        yield first, last
        first, last = last, min(last * GROWTH, last + MOST_WAVE, attempts)


def screen_call(
    env: RolloutEnv, tick: Tick, config: Config, problems: list[Problem], first: int, last: int
) -> list[Screening]:
    """Counts of the attempts first .. last - 1 of the base model at each problem. A piece of work, see `loop.parallel`."""
    env.sampler.on_tokens = tick
    sampling = config.student.sampling.model_copy(update={"temperature": config.screen.temperature})
    result = env.rollout(None, [problems], last - first, [seeds.derive(config.seed, "screen")], sampling, first=first)
    correct_Q = result.solved_P_Q_N[0].sum(-1).tolist()
    truncated_Q = (~result.rollouts.ended_B.view(len(problems), last - first)).sum(-1).tolist()
    return [Screening(right, last - first, cut) for right, cut in zip(correct_Q, truncated_Q, strict=True)]


def rows_at_once(env: RolloutEnv, config: Config, problems: Sequence[Problem]) -> int:
    """Rows of one call: on a GPU the sampler's own capacity; on a CPU by the size of the model alone."""
    tokens = config.student.sampling.max_tokens
    if env.backbone.device.type == "cpu":
        parameters = sum(tensor.numel() for tensor in env.backbone.model.parameters())
        return int(min(ROWS_CPU[1], max(ROWS_CPU[0], CALL_FLOP / (2 * parameters * tokens))))
    capacity = getattr(env.sampler, "rows_per_call", lambda positions: ROWS_GPU)
    return int(capacity(tokens + max(len(env.prompt(problem)) for problem in problems)))


def screen(
    env: RolloutEnv, problems: list[Problem], config: Config, folder: RunFolder, evidence: Row, on_attempts: Tick
) -> dict[str, Screening]:
    """Screen every problem; the counts so far go to hard/screen.jsonl call by call, where the last line of an id counts.
    Calls are cut from the whole list, so a resumed screening computes with the batches of an uninterrupted one. Rows of
    another run may have another seed, which the rest is then drawn with too; rows made in another way raise DataError.
    on_attempts(done, total): within calls too, from any thread; it may raise. Returns problem id -> Screening.
    """
    if not (kept := folder.rows(EVIDENCE, partial(_sound, config.screen.attempts))):
        folder.append(EVIDENCE, kept := [{"evidence": evidence}])
    recorded, wanted = kept[0]["evidence"], {key: value for key, value in evidence.items() if key not in FREE}
    check_evidence(recorded, wanted, f"{folder.path}/{EVIDENCE}")
    config = config.model_copy(update={"seed": recorded.get("seed", config.seed)})
    counts: dict[str, Screening] = defaultdict(lambda: Screening(0, 0))
    counts |= {row["id"]: Screening(row["successes"], row["attempts"], row["truncated"]) for row in kept[1:]}
    attempts, done, total, drawn = config.screen.attempts, 0, 0, 0
    most = config.screen.max_successes if config.screen.early_stop else attempts

    def heard(tokens: int = 0) -> None:
        nonlocal drawn
        drawn += tokens
        on_attempts(min(total, done + drawn // config.student.sampling.max_tokens), total)

    capacity = rows_at_once(env, config, problems) if problems else 1
    try:
        for first, last in waves(attempts):
            # A problem that has more attempts than `first` took part in this wave, whatever came of it.
            left = [p for p in problems if counts[p.id].attempts > first or counts[p.id].successes <= most]
            done = sum(counts[problem.id].attempts for problem in problems)
            total = done + sum(attempts - counts[problem.id].attempts for problem in left)
            calls = [(part, first, last) for part in _cut(left, capacity // (last - first), env)]
            calls = [call for call in calls if any(counts[problem.id].attempts < last for problem in call[0])]
            heard()
            results = map_tasks(env, screen_call, (config,), calls, heard)
            for (part, *_), result in zip(calls, results, strict=True):
                fresh = [(p, new) for p, new in zip(part, result, strict=True) if counts[p.id].attempts == first]
                for p, new in fresh:
                    old = counts[p.id]
                    counts[p.id] = Screening(old.successes + new.successes, last, old.truncated + new.truncated)
                folder.append(EVIDENCE, [{"id": p.id, **asdict(counts[p.id])} for p, _ in fresh])
                done, drawn = done + len(fresh) * (last - first), 0
                heard()
    finally:
        env.sampler.on_tokens = no_tick
    return {problem.id: counts[problem.id] for problem in problems}


def _cut(problems: list[Problem], each: int, env: RolloutEnv) -> list[list[Problem]]:
    """Parts of at most `each` problems and of like size; on GPUs at least one for each worker."""
    calls = -(-len(problems) // max(1, each))
    if env.parallel is not None and env.backbone.device.type != "cpu":
        calls = max(calls, min(len(problems), env.parallel.size))
    size = max(1, -(-len(problems) // max(1, calls)))
    return [problems[i : i + size] for i in range(0, len(problems), size)]


def _sound(attempts: int, row: Row, number: int) -> bool:
    """Whether a line says how it was screened (the first), or what came of a problem."""
    if number == 1:
        return isinstance(row.get("evidence"), dict) and type(row["evidence"].get("seed", 0)) is int
    successes, truncated, made = counts = [row.get(key, "") for key in ("successes", "truncated", "attempts")]
    whole = isinstance(row.get("id"), str) and all(type(count) is int for count in counts)
    return whole and 0 <= successes <= made <= attempts and 0 <= truncated <= made


def copy_screening(folder: RunFolder, place: Path, digest: str) -> None:
    """Copy the screening of another run folder, unless this one has begun its own. Raises ConfigError for other problems."""
    if folder.rows(EVIDENCE):  # where a kill left half of the first line, it is copied again
        return
    rows, notes = read_jsonl(place / EVIDENCE, EVIDENCE)
    if not rows:
        why = "; ".join(notes) or "it is empty"
        raise ConfigError(f"screen.from_run = {str(place)!r}: {why}; give a run folder that was screened")
    if mapping(read_object(place / "manifest.json")[0].get("hashes")).get("problems") != digest:
        why = "it screened other problems (hashes.problems in its manifest.json is not this run's)"
        advice = "give a run of the same problems and problems.limit, or leave the key out"
        raise ConfigError(f"screen.from_run = {str(place)!r}: {why}; {advice}")
    folder.append(EVIDENCE, rows)


class HardSet(NamedTuple):
    """problems: the hard ones. screened: every usable candidate. event: of `screen`, with what was left out before."""

    problems: list[Problem]
    screened: list[tuple[Problem, Screening]]
    evidence: Row
    event: Row

    def write(self, path: Path, problems: list[Problem]) -> None:
        """Some of the problems as a file, with their counts and its evidence."""
        counts = {problem.id: screening for problem, screening in self.screened}
        write_hard(path, problems, [counts[problem.id] for problem in problems], self.evidence)


def find_hard(
    env: RolloutEnv, config: Config, folder: RunFolder, progress: Progress, safe_point: Tick, reuse: bool = True
) -> HardSet:
    """Load, leave out what cannot be used, screen (nothing with screen.attempts = 0), select. safe_point: may raise. reuse:
    a problem file with its evidence beside it is not screened again. Raises ConfigError, DataError, and RunFolderError when
    model, problems or prompts changed since the folder was begun.
    """
    loaded = candidates(config, folder.manifest["hashes"].get("dataset_revision"))
    domain, evidence = env.verifier.domain, evidence_key(config, env)
    env.share(loaded.problems)
    hashes = {"problems": loaded.digest, **({"dataset_revision": r} if (r := loaded.report.revision) else {})}
    # dtype before the model's hash: it tells why that one changed
    hashes |= {"dtype": evidence["dtype"], "model": evidence["model_sha256"], "prompts": evidence["prompt"]}
    folder.note_hashes(**hashes, **domain.hashes)
    for line in loaded.report.lines():
        progress.say(line)
    problems, left_out = usable(env, config, loaded.problems, progress.say)
    texts = [problem for problem in problems if gold_kind(problem.answer, domain.label) == "text"]
    for problem in texts[:5]:
        progress.say(f"the gold answer of {problem.id} can only be compared as text: {problem.answer[:80]!r}")
    gone = set() if config.screen.text_golds else {problem.id for problem in texts}
    problems, left_out["text_golds"] = [problem for problem in problems if problem.id not in gone], len(gone)
    if reuse and config.screen.attempts and (before := known_hard(config, evidence)) is not None:
        shown_hard, evidence, where = before
        found = {problem.id: shown_hard[problem.id] for problem in problems}
        progress.say(f"{where}: shown to be hard with {evidence['attempts']} attempts; not screened again")
    elif config.screen.attempts and (problems or not reuse):  # without any the run is refused, and leaves no evidence
        if config.screen.from_run:
            copy_screening(folder, Path(config.screen.from_run), loaded.digest)
        with progress.task("screening", len(problems) * config.screen.attempts) as advance:

            def note(done: int, total: int) -> None:
                advance(completed=done, total=total)
                safe_point()

            found = screen(env, problems, config, folder, evidence, note)
        if rows := folder.rows(EVIDENCE):  # of another run, where its screening is used again
            evidence = rows[0]["evidence"]
    else:
        found = {problem.id: Screening(0, 0) for problem in problems}
    screened = [(problem, found[problem.id]) for problem in problems]
    hard = [problem for problem, counts in screened if counts.successes <= config.screen.max_successes]
    event = {**screen_event(found, config), **left_out}
    return HardSet(hard[: config.problems.max_hard or None], screened, evidence, event)


def known_hard(config: Config, wanted: Row) -> tuple[dict[str, Screening], Row, Path] | None:
    """(counts by id, evidence, its file) of a screening beside the problem file, or None. Raises DataError if it differs."""
    if (file := hard_file(config.problems.source)) is None:
        return None
    where, (problems, screenings, evidence) = evidence_path(file), read_hard(file)
    advice = "set this run's keys to the values of the evidence; without the evidence file the run screens by itself"
    asked = {key: wanted[key] for key in wanted if key not in FREE_OF_HARD}
    check_evidence(evidence, asked, str(where), f" with `soar screen`, or {advice}")
    return {p.id: s for p, s in zip(problems, screenings, strict=True)}, evidence, where


def screen_folder(
    folder: RunFolder, config: Config, progress: Progress, safe_point: Tick = no_tick
) -> tuple[list[str], list[tuple[Problem, Screening]]]:
    """Screen a config in an open folder: (table as lines, counts). Raises ConfigError, DataError, RunFolderError."""
    if config.screen.attempts == 0:
        raise ConfigError("screen.attempts = 0: a screening needs at least one attempt at each problem; 128 is usual")
    check_cluster(config)
    with open_env(config) as env, open_parallel(config, env, progress.say) as env.parallel:
        hard = find_hard(env, config, folder, progress, safe_point, reuse=False)
    if hard.problems:
        hard.write(folder.path / "hard.jsonl", hard.problems)
    write_json(folder.path / "screen.json", hard.event)
    lines = table_lines(hard.event, config)
    write_atomic(folder.path / "table.txt", ("\n".join(lines) + "\n").encode())
    return lines, hard.screened
