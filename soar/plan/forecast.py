"""What a run computes, how long that takes, and whether it can work: before it begins.

The forecast (`soar run --dry-run`) is made before anything is loaded. Counts of rollouts and tokens follow from the config
and from what is assumed (printed). Time is counts over measured rates in one process (`TABLE`). Left out: loading, writing
files, what promotions add, measurements on the way (`evaluate.every`).

The findings (`soar check`; those without the model also `soar run --dry-run`) say whether a run can work. Making them
raises nothing that a user can mend, and trains nothing: the teacher's samples are those of the untrained model, so its
first outer step will look like them. Torch is imported only for the model."""

import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

from soar import seeds
from soar.config import HARD_ARMS, HINT_TRIES, VARIANT_ATTEMPTS, WRITTEN_BY_TEACHER, Config, TrainedArm
from soar.domains.candidates import HIDDEN, candidates
from soar.files import Row, asset, clipped, scrub, visible
from soar.loop.parallel import texts_at_once
from soar.problems.domain import domain_of
from soar.problems.load import evidence_path
from soar.problems.pool import open_pool
from soar.problems.sources import split_source
from soar.problems.verify import gold_kind
from soar.report.page import OUTCOMES
from soar.report.text import fill
from soar.run.progress import Progress
from soar.run.sizes import memory_of, size_of
from soar.types import Problem, Rejection, UserError, Verdict, columns_of

if TYPE_CHECKING:
    from soar.loop.rollout import RolloutEnv

T = TypeVar("T")
TRAIN, MEASURE = "students train", "students measured"
TEXTS_PER_PAIR, TEACHER_PROMPT, PROMPT = 1.5, 250, 150  # texts for an accepted pair; tokens of prompts
PAIRS_PER_VOTED = 2.0  # pairs that are voted on for one that is kept
KL_FACTOR = 1.5  # a reference pass forward on top of one pass forward and one backward, base weights frozen

TASKS = {"screen": "screening", "loop": "outer loop", "arms": "arms", "evaluate": "evaluation"}  # stage -> its bar

GOLDS = 2000  # gold answers that are checked at most, spread over the file ...
GOLD_SECONDS, GOLD_BATCH = 25.0, 20  # ... and for how long, so that a check of a large file stays under a minute
TEACHER_SECONDS, STUDENT_SECONDS = 30.0, 40.0
ASKED, ATTEMPTS, SHOWN = 24, 4, 5  # problems that the student is asked, how often, attempts that are shown
LISTED = 10
FEWEST = 4  # hard problems that a run needs
LOW_RATE, ENOUGH = 0.1, 16  # share of accepted teacher texts that is little; texts without a problem that count as a no

HINTS = asset("hints")
"""Why a teacher text is no problem -> what to do."""


def assumed(config: Config, given: Mapping[str, float] | None = None) -> dict[str, float]:
    """What the config does not say, or what is given: half of every token budget is used, 30 % of the candidates are hard.
    Tokens are means a row; every row is trained on (where all attempts fail and there is no KL term, it is cheaper)."""
    values = {
        "candidates": float(config.problems.limit or 1000),
        "hard_share": 1.0 if screened_before(config) else 0.3,
        "teacher_tokens": config.teacher.sampling.max_tokens / 2,
        "question_tokens": config.student.sampling.max_tokens / 2,
        "hard_tokens": config.student.sampling.max_tokens / 2,
    }
    with suppress(UserError, ImportError):  # the finding about the problems says what is wrong with them
        values |= counted(config) if "candidates" not in (given or {}) else {}
    return values | dict(given or {})


def counted(config: Config) -> dict[str, float]:
    """The number of candidates; not of a dataset of the hub, which takes a network. Raises UserError, ImportError."""
    local = split_source(config.problems.source)[0] != "hub"
    return {"candidates": float(len(candidates(config).problems))} if local else {}


def screened_before(config: Config) -> bool:
    """Whether a run would not screen: there is evidence beside the problem file, or screening is off."""
    return not config.screen.attempts or evidence_path(Path(config.problems.source).expanduser()).is_file()


class Work(NamedTuple):
    """One line of a forecast. stage: as in `wall_seconds` of summary.json. sampled, trained: tokens. kl: has a KL term."""

    stage: str
    name: str
    rollouts: float
    sampled: float
    trained: float = 0.0
    kl: bool = False


def workload(config: Config, a: Mapping[str, float]) -> list[Work]:
    """Every part of a run, in order, by what is assumed."""
    teacher, student, reward = config.teacher, config.student, config.reward
    screening = 0.0 if screened_before(config) or config.screen.from_run else a["candidates"] * config.screen.attempts
    hard = min(a["candidates"] * a["hard_share"], config.problems.max_hard or math.inf)
    held_out = hard * config.problems.test_share
    wanted, students = teacher.datasets * teacher.questions, teacher.datasets * student.repeats
    pairs = teacher.steps * wanted
    written = _written(pairs, teacher.votes, a, teacher.steps * texts_at_once(wanted, wanted))
    inner = teacher.steps * min(student.max_steps, student.steps)
    sampled = float(students * inner * student.prompts_per_step * student.attempts)
    asked, greedy = min(reward.questions, hard - held_out), reward.mode == "greedy"
    each, once = (1, 1) if greedy else (reward.attempts, reward.baseline_attempts)
    measured = teacher.steps * students * asked * each
    measured += once * min(hard - held_out, asked * teacher.steps)  # the baseline is asked each question once
    intrinsic = float(pairs * config.intrinsic.attempts) if teacher.reward == "learnability" else 0.0
    trained = sampled * (PROMPT + a["question_tokens"])
    learned = pairs * (TEACHER_PROMPT + a["teacher_tokens"]) * (teacher.reward != "none")
    tokens = measured * a["hard_tokens"] + intrinsic * a["question_tokens"]
    loop = [
        Work("loop", "teacher writes", *written),
        Work("loop", TRAIN, sampled, sampled * a["question_tokens"], trained, student.optimizer.kl > 0),
        Work("loop", MEASURE, measured + intrinsic, tokens),
        Work("loop", "teacher learns", 0.0, 0.0, learned, teacher.optimizer.kl > 0),
    ]
    arms = [_arm(arm, config, a, hard - held_out, loop) for arm in get_args(TrainedArm) if arm in config.arms.run]
    attempts = held_out * config.evaluate.attempts * len(config.arms.run)
    first = Work("screen", "screening", screening, screening * a["hard_tokens"])
    return [first, *loop, *arms, Work("evaluate", "evaluation", attempts, attempts * a["hard_tokens"])]


def _written(pairs: float, votes: int, a: Mapping[str, float], least: float = 0.0) -> tuple[float, float]:
    """Rollouts and their tokens for so many accepted pairs, of at least so many texts; votes: attempts at each pair."""
    voted = pairs * PAIRS_PER_VOTED if votes else pairs
    texts, attempts = max(voted * TEXTS_PER_PAIR, least), voted * votes
    return texts + attempts, texts * a["teacher_tokens"] + attempts * a["question_tokens"]


def _arm(arm: str, config: Config, a: Mapping[str, float], hard_train: float, loop: list[Work]) -> Work:
    """An arm on hard problems and, unless it has those alone, on questions, mixed by number; with what it prepares."""
    student, arms, kl = config.student, config.arms, config.student.optimizer.kl > 0
    spent = sum(work.rollouts for work in loop if work.name in (TRAIN, MEASURE))
    promoted = config.teacher.questions if arm.startswith("pq") else arms.questions
    questions = 0 if arm in HARD_ARMS else promoted
    share = questions / max(1.0, questions + hard_train)
    each = share * a["question_tokens"] + (1 - share) * a["hard_tokens"]
    prepared = hard_train * HINT_TRIES * arms.hint_tokens / 2 if arm == "hinted" else 0.0
    if arm in WRITTEN_BY_TEACHER:
        tries = config.teacher.votes or (VARIANT_ATTEMPTS if arm == "variants" else 0)
        prepared = _written(arms.questions, tries, a)[1]
    rollouts = float(config.arm_steps(arm, spent) * config.arm_prompts * student.attempts)
    if arms.tokens:  # in all: the arms that use what the outer loop found pay for it
        left = max(0.0, arms.tokens - config.uses_search(arm) * sum(work.sampled for work in loop))
        prepared = min(prepared, left / 2)
        rollouts = (left - prepared) / each
    return Work("arms", arm, rollouts, rollouts * each + prepared, rollouts * (PROMPT + each), kl)


class Rates(NamedTuple):
    """Tokens a second of a model of so many parameters, 16 adapters, no KL term; source: where they were measured. arms:
    pace of the arms by these rates; on a CPU they train one after another."""

    parameters: float
    decode: float
    train: float
    source: str
    arms: float = 1.0

    def seconds(self, work: Work) -> float:
        seconds = work.sampled / self.decode + work.trained * (KL_FACTOR if work.kl else 1.0) / self.train
        return seconds / (self.arms if work.stage == "arms" else 1.0)


TABLE = tuple(Rates(**row) for row in asset("rates")["rates"])


def table_rates(parameters: float) -> Rates:
    """Rates of the known shape nearest in size, scaled by parameters."""
    near = min(TABLE, key=lambda known: abs(math.log(known.parameters / parameters)))
    scale = near.parameters / parameters
    note = "" if 0.9 < scale < 1.1 else f", scaled by {scale:.3g} for its size"
    return near._replace(decode=near.decode * scale, train=near.train * scale, source=near.source + note)


class Forecast(NamedTuple):
    """The works of a run and the rates that they are done at; None where the size of the model is not known."""

    works: list[Work]
    assumptions: dict[str, float]
    rates: Rates | None

    def hours(self) -> float | None:
        """Of all works."""
        return None if self.rates is None else sum(map(self.rates.seconds, self.works)) / 3600

    def lines(self) -> list[str]:
        """The forecast as a table, with what it rests on."""
        return fill("forecast.txt", forecast=self, total=self.total_line().strip()).split("\n")

    def total_line(self) -> str:
        """The forecast in one line, for a list of runs."""
        tokens, hours = sum(work.sampled for work in self.works), self.hours()
        time = "the size of the model is not known" if hours is None else f"{hours:,.2f} device-hours"
        bare = ", ".join(work.name for work in self.works if work.stage == "arms" and not work.rollouts)
        time += f"; such lengths leave nothing for {bare}: raise arms.tokens, or lower teacher.steps" if bare else ""
        return f"  {sum(work.rollouts for work in self.works):,.0f} rollouts, {tokens:,.0f} tokens sampled; {time}"


def forecast(config: Config, given: Mapping[str, float] | None = None) -> Forecast:
    """What a run takes, by the table's rates for the size of its model. given: in place of what is assumed."""
    assumptions, size = assumed(config, given), size_of(config.model)
    return Forecast(workload(config, assumptions), assumptions, table_rates(size.parameters) if size else None)


def announce(progress: Progress, config: Config) -> None:
    """Say what a run does first, what comes, how long that may take and what it costs: before torch is loaded."""
    progress.now(f"{config.name}: looking at {config.problems.source}")
    expected = forecast(config, counted(config))  # a file that cannot be read is refused here
    rates = expected.rates or Rates(0.0, 1.0, 2.0, "")  # in proportion alone
    seconds = dict.fromkeys(TASKS.values(), 0.0)
    for work in expected.works:
        seconds[TASKS[work.stage]] += rates.seconds(work)
    progress.plan, known = seconds, expected.rates is not None
    stages = [f"{name}{f' ({timedelta(seconds=round(s))})' if known else ''}" for name, s in seconds.items() if s]
    time = f"rates: {rates.source}" if known else "how long is told once there is a pace to go by"
    progress.say(f"what comes: {', '.join(stages)}, report")
    progress.say(f"in all:{expected.total_line()[1:]} ({time})")
    progress.now(f"loading torch and {config.model.path}")


def memory_lines(config: Config) -> list[str]:
    """Memory on the device with its arithmetic; a word for a model whose size cannot be told."""
    if (size := size_of(config.model)) is None:
        return ["memory: unknown, the model is not in the local cache and its name tells no size"]
    arithmetic = memory_of(config, size, PROMPT)[1]
    return ["memory per device", *arithmetic, "  adapters, their moments and activations on top"]


class Finding(NamedTuple):
    """One line of the report, and what to do. status: ok; warning: it works, but worse or dearer; unknown: no time; FAIL."""

    name: str
    status: str
    message: str
    advice: str = ""
    details: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}  # of attempts, by what came of them

    def lines(self) -> list[str]:
        """As text for a terminal, with no secret in it and nothing that could move the cursor."""
        more = [f"{'':21s}{line}" for text in self.details for line in text.split("\n")]
        more += [f"{'':21s}-> {line}" for line in self.advice.split("\n") if line]
        return [visible(scrub(line)) for line in [f"{self.status:8s} {self.name:11s} {self.message}", *more]]


def status_of(fails: object, warns: object = False) -> str:
    """FAIL, warning or ok."""
    return "FAIL" if fails else "warning" if warns else "ok"


def can_work(findings: Sequence[Finding]) -> bool | None:
    """Whether nothing failed; None where that was not found out."""
    statuses = {finding.status for finding in findings}
    return False if "FAIL" in statuses else None if "unknown" in statuses else True


def summary(findings: Sequence[Finding]) -> str:
    """The last line: yes, no or unknown, and how much there is to mend."""
    names = {status: [f.name for f in findings if f.status == status] for status in ("FAIL", "warning", "unknown")}
    noted = f" (warnings: {', '.join(names['warning'])})" if names["warning"] else ""
    if names["FAIL"]:
        return f"no: mend {', '.join(names['FAIL'])} before a run can work{noted}"
    if names["unknown"]:
        return f"unknown: too little was seen of {' and '.join(names['unknown'])} to say whether a run can work{noted}"
    return f"yes: a run can work{noted}"


def failed(name: str, error: Exception) -> Finding:
    """The finding for an error that a user can mend; its message says how."""
    first, *rest = str(error).split("\n")
    return Finding(name, "FAIL", first, details=tuple(rest))


def check_all(config: Config, samples: int, say: Callable[[str], None], no_model: bool = False) -> Iterator[Finding]:
    """Findings about the data, and of the model unless they fail or no_model; say: told before what takes time."""
    problems = yield from check_data(config)
    if problems and not no_model:
        yield from check_model(config, problems, max(1, samples), say)


def check_data(config: Config) -> Generator[Finding, None, list[Problem]]:
    """Findings about problems, plan, domain and gold answers; returns the problems, none where a finding fails."""
    finding, problems = check_problems(config)
    findings, steps, window = [finding], config.teacher.steps, config.promotion.window
    if 0 < steps < window:
        message = f"promotion.window = {window} is more than teacher.steps = {steps}: no student can ever be promoted"
        findings.append(Finding("plan", "FAIL", message, "raise teacher.steps, or lower promotion.window"))
    yield from findings
    if problems and can_work(findings):
        yield (golds := check_golds(config, problems))
        findings.append(golds)
    return problems if can_work(findings) else []


def check_problems(config: Config) -> tuple[Finding, list[Problem]]:
    """Load the candidates: what was read, which columns, and every row that is left out with file and line."""
    try:
        loaded = candidates(config)
    except UserError as error:
        return failed("problems", error), []
    count, asked = len(loaded.problems), config.reward.questions
    first, *details = loaded.report.lines()
    advice = "mend the rows that are left out, or go on without them" if loaded.report.dropped else ""
    if HIDDEN in loaded.report.notes:
        advice = "let a domain put them in, as examples/multiple_choice.py:DOMAIN does (docs/domains.md)"
    if count < FEWEST:
        advice = f"a run needs at least {FEWEST} hard problems: give more"
    elif count < 2 * asked and not advice:
        coarser = f"the training half is smaller than reward.questions = {asked}, so rewards are coarser"
        advice = f"{coarser}: give {2 * asked} hard problems or more, or lower reward.questions"
    return Finding("problems", status_of(count < FEWEST, advice), first, advice, tuple(details)), loaded.problems


def check_golds(config: Config, problems: Sequence[Problem]) -> Finding:
    """Grade every gold answer against itself: the verifier must find it correct, or no attempt ever will be."""
    asked = problems[:: -(-len(problems) // GOLDS)]
    limit, verdicts = time.monotonic() + GOLD_SECONDS, list[Verdict]()
    try:
        domain = domain_of(config.problems)
        with open_pool(domain, config.problems) as pool:
            for first in range(0, len(asked), GOLD_BATCH):
                if first and time.monotonic() > limit:
                    break
                batch = asked[first : first + GOLD_BATCH]
                verdicts += pool.check_golds([problem.answer for problem in batch], columns_of(batch))
            asked = asked[: len(verdicts)]
            bad = [(problem, verdict) for problem, verdict in zip(asked, verdicts, strict=True) if not verdict.solved]
            faults = pool.faults([problem for problem, _ in bad[:LISTED]])
    except UserError as error:
        return failed("golds", error)
    checked, good = len(asked), len(asked) - len(bad)
    texts = [problem for problem in asked if gold_kind(problem.answer, domain.label) == "text"]
    found: Row = {"good": good, "checked": checked, "bad": bad, "texts": texts, "config": config}
    found |= {"listed": list(zip(bad, faults, strict=False)), "most": LISTED, "domain": domain, "pool": pool}
    message, *details = fill("check/golds.txt", **found).split("\n")
    good -= 0 if config.screen.text_golds else len(texts)
    every = checked == len(problems)
    fails = good * len(problems) < FEWEST * checked  # as many of all as of those that were checked
    advice = [] if every else ["`soar verify FILE --golds` checks all"]
    if fails:
        advice = ["choose another problems.verifier (number, exact, choice, your own) or domain, or mend the answers"]
    elif bad:
        advice = ["unscorable ones are left out, the others can never be solved: mend them or change the verifier"]
    if bad and not pool.compares:
        advice += ["a function gets them boxed or behind `Answer:`; other marks need a domain (docs/bring.md)"]
        advice += ["where a lower score is right, lower problems.success_at"] if Verdict.WRONG in verdicts else []
    return Finding("golds", status_of(fails, advice), message, "; ".join(advice), tuple(details))


def check_model(
    config: Config, problems: Sequence[Problem], samples: int, say: Callable[[str], None]
) -> Iterator[Finding]:
    """Findings of a config's model, one by one as they are made. say: told before what takes time."""
    say(f"loading torch and {config.model.path}")
    from soar.run.setup import open_env

    name = "model"
    try:
        with open_env(config) as env:
            size, base = sum(p.numel() for p in env.backbone.model.parameters()), env.backbone
            ends = ", ".join(map(repr, base.tokenizer.convert_ids_to_tokens(sorted(base.end_ids))))
            about = f"{size:,} parameters, {str(base.dtype).removeprefix('torch.')} on {base.device}"
            yield Finding("model", "ok", f"{config.model.path}: {about}; completions end at {ends}")
            env.share(problems)
            say(f"asking the model {min(ASKED, len(problems))} problems, {ATTEMPTS} times each")
            name = "student"
            yield student_finding(env, config, problems)
            if config.teacher_writes:
                say(f"asking the teacher for {samples} problems")
                name = "teacher"
                yield teacher_finding(env, config, samples)
            total = forecast(config).total_line().strip()
            yield Finding("cost", "ok", f"the whole run: {total} (stages and rates: soar run --dry-run)")
    except UserError as error:
        yield failed(name, error)


class TimeOver(Exception):
    """A model call that would have lasted too long."""


def in_time(env: "RolloutEnv", seconds: float, wanted: int, call: Callable[[int, int], list[T]]) -> list[T]:
    """What call(first, count) returns in doubling waves, until there are `wanted`; the wave of the deadline is dropped."""
    rows, wave, deadline = list[T](), 1, time.monotonic() + seconds

    def look(*_: object) -> None:
        if time.monotonic() > deadline:
            raise TimeOver

    handle = env.backbone.model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        with suppress(TimeOver):
            while len(rows) < wanted:
                rows += call(len(rows), min(wave, wanted - len(rows)))
                wave *= 2
                look()
    finally:
        handle.remove()
    return rows


def student_finding(env: "RolloutEnv", config: Config, problems: Sequence[Problem]) -> Finding:
    """What the model makes of some of the problems: why attempts earn nothing, and five of them."""
    from soar.loop.rollout import keep
    from soar.run.screen import what_fits

    sampling, seed = config.student.sampling, seeds.derive(config.seed, "check", "student")
    fitting = [problem for problem in problems if env.room(problem, sampling)]
    left_out, context = len(problems) - len(fitting), f"do not fit in the context of {env.backbone.context:,} tokens"
    if len(fitting) < FEWEST:
        message = f"{left_out:,} of {len(problems):,} problems {context}"
        return Finding("student", "FAIL", message, "lower student.sampling.max_tokens, or take another model")
    asked, before = fitting[:: max(1, len(fitting) // ASKED)][:ASKED], env.tokens

    def attempts(first: int, count: int) -> list[list[Row]]:
        part = asked[first : first + count]
        batch = env.rollout(None, [part], ATTEMPTS, [seed], sampling)
        rows = keep(env, batch, n=len(batch.verdicts))
        return [rows[i : i + ATTEMPTS] for i in range(0, len(rows), ATTEMPTS)]

    rows = in_time(env, STUDENT_SECONDS, len(asked), attempts)
    if not rows:
        message = f"no attempt ended within {STUDENT_SECONDS:.0f} s"
        return Finding("student", "unknown", message, "lower student.sampling.max_tokens, or use a GPU")
    flat = [row[n] for n in range(ATTEMPTS) for row in rows]  # other problems first
    outcomes, count = Counter(row["outcome"] for row in flat), len(flat)
    correct, main = outcomes.pop("right", 0), (outcomes.most_common(1) or [("wrong", 0)])[0][0]
    main = "refused" if outcomes["refused"] else main  # one alone says that the verifier errs
    hopeless = not correct and count >= ENOUGH and (main == "refused" or outcomes[main] > 0.9 * count)
    cause, advice = OUTCOMES[main]
    fits, advice = (what_fits(config, correct / count, count), "") if cause == "difficulty" else ("", advice)
    flat.sort(key=lambda row: (row["outcome"] == "right", row["outcome"] != main))  # first those that earned nothing
    found: Row = {"correct": correct, "count": count, "wanted": ATTEMPTS * len(asked), "seconds": STUDENT_SECONDS}
    found |= {"outcomes": outcomes.most_common(), "sampled": env.tokens - before, "left_out": left_out}
    found |= {"shown": flat[:SHOWN], "context": context, "error": env.verifier.last_error}
    message, *details = fill("check/student.txt", causes=OUTCOMES, clipped=clipped, **found).split("\n")
    counts = {"correct": correct, **outcomes}
    return Finding("student", status_of(advice and hopeless, advice), message, advice or fits, tuple(details), counts)


def teacher_finding(env: "RolloutEnv", config: Config, samples: int) -> Finding:
    """Share of teacher texts that are problems, what an accepted one costs, and why the others are not."""
    from soar.engine.rollouts import Request
    from soar.loop.write import read_pairs, teacher_prompt, vote

    teacher, seed, before = config.teacher, seeds.derive(config.seed, "check", "teacher"), env.tokens
    prompt = teacher_prompt(env, config)

    def pairs(first: int, count: int) -> list[Any]:
        rollouts = env.draw(None, Request([[prompt]], count, [[seeds.skip(seed, first)]], teacher.sampling))
        written = read_pairs(env, config, rollouts.texts(env.backbone), rollouts.ended_B.tolist())
        return vote(env, config, written, seeds.skip(seed, first), {})

    outcomes = in_time(env, TEACHER_SECONDS, samples, pairs)
    rejections = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    sampled, accepted = len(outcomes), len(outcomes) - len(rejections)
    hint = "too slow here to say: lower teacher.sampling.max_tokens, or use a GPU"
    if reasons := Counter(rejection.name for rejection in rejections).most_common():
        name = reasons[0][0]
        hint = HINTS.get(name, f"the domain refuses its problems ({name}): say in the teacher prompt what is asked for")
    found: Row = {"accepted": accepted, "sampled": sampled, "wanted": samples, "seconds": TEACHER_SECONDS}
    found |= {"needed": teacher.datasets * teacher.questions, "tokens": env.tokens - before, "reasons": reasons}
    message, *details = fill("check/teacher.txt", rejections=rejections, **found).split("\n")
    if not accepted:
        status = "unknown" if sampled < min(samples, ENOUGH) else "FAIL"
        return Finding("teacher", status, message, hint, tuple(details))
    written = [outcome for outcome in outcomes if isinstance(outcome, Problem)][:SHOWN]
    asked = () if env.verifier.compares else ([p.answer for p in written], columns_of(written, env.shared))
    if asked and not any(verdict.judged for verdict in env.verifier.check_golds(*asked)):
        hint = f"the verifier judges none of them ({env.verifier.last_error or 'it gives None'}); they have "
        hint += "those columns of the file that are equal in all rows: give the function a default for the others"
        return Finding("teacher", "FAIL", message, hint, tuple(details))
    if (each := sampled / accepted) > teacher.max_tries:
        hint = f"an outer step would end without its pairs (teacher.max_tries = {teacher.max_tries}): {hint}"
    status = status_of(each > teacher.max_tries, accepted / sampled < LOW_RATE)
    return Finding("teacher", status, message, hint if status != "ok" else "", tuple(details))
