"""What a run computes and how long that takes, before anything is loaded (`soar run --dry-run`).

Counts of rollouts and tokens follow from the config and from what is assumed (printed). Time is counts over measured rates
in one process (`TABLE`). Left out: loading, writing files, what promotions add and screen.early_stop saves, measurements on
the way (`evaluate.every`).
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, get_args

from soar.config import HARD_ARMS, HINT_TRIES, VARIANT_ATTEMPTS, WRITTEN_BY_TEACHER, Config, TrainedArm
from soar.domains.candidates import candidates
from soar.files import asset
from soar.loop.parallel import texts_at_once
from soar.problems.load import hard_file
from soar.problems.sources import split_source
from soar.report.text import fill
from soar.run.progress import Progress
from soar.run.sizes import memory_of, size_of
from soar.types import UserError

TRAIN, MEASURE = "students train", "students measured"
TEXTS_PER_PAIR, TEACHER_PROMPT, PROMPT = 1.5, 250, 150  # texts for an accepted pair; tokens of prompts
PAIRS_PER_VOTED = 2.0  # pairs that are voted on for one that is kept
KL_FACTOR = 1.5  # a reference pass forward on top of one pass forward and one backward, base weights frozen
TASKS = {"screen": "screening", "loop": "outer loop", "arms": "arms", "evaluate": "evaluation"}  # stage -> its bar


def assumed(config: Config, given: Mapping[str, float] = {}) -> dict[str, float]:
    """What the config does not say, or what is given: half of every token budget is used (by an embedded model what it used
    in the demo), 30 % of the candidates are hard. Tokens are means a row; every row is trained on (where all attempts fail
    and there is no KL term, it is cheaper).
    """
    values = {
        "candidates": float(config.problems.limit or 1000),
        "hard_share": 1.0 if screened_before(config) else 0.3,
        "teacher_tokens": config.teacher.sampling.max_tokens / 2,
        "question_tokens": config.student.sampling.max_tokens / 2,
        "hard_tokens": config.student.sampling.max_tokens / 2,
    }
    values |= asset("rates")["embedded"] if config.model.path.startswith("builtin:") else {}
    with suppress(UserError, ImportError):  # the finding about the problems says what is wrong with them
        values |= counted(config) if "candidates" not in given else {}
    return values | dict(given)


def counted(config: Config) -> dict[str, float]:
    """The number of candidates; not of a dataset of the hub, which takes a network. Raises UserError, ImportError."""
    local = split_source(config.problems.source)[0] != "hub"
    return {"candidates": float(len(candidates(config).problems))} if local else {}


def screened_before(config: Config) -> bool:
    """Whether a run would not screen: there is evidence beside the problem file, or screening is off."""
    return not config.screen.attempts or hard_file(config.problems.source) is not None


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
    inner = teacher.steps * student.steps
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
    """Tokens a second of a model of so many parameters, 16 adapters, no KL term; source: where they were measured.
    arms: pace of the arms by these rates; on a CPU they train one after another.
    """

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
        return fill("forecast.txt", forecast=self).split("\n")

    def total_line(self) -> str:
        """The forecast in one line, for a list of runs."""
        tokens, time = sum(work.sampled for work in self.works), "the size of the model is not known"
        if self.rates is not None:
            time = f"{self.hours():,.2f} device-hours ({self.rates.source.partition(',')[0]})"
        bare = ", ".join(work.name for work in self.works if work.stage == "arms" and not work.rollouts)
        time += f"; such lengths leave nothing for {bare}: raise arms.tokens, or lower teacher.steps" if bare else ""
        return f"{sum(work.rollouts for work in self.works):,.0f} rollouts, {tokens:,.0f} tokens sampled; {time}"


def forecast(config: Config, given: Mapping[str, float] = {}) -> Forecast:
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
    progress.say(f"in all: {expected.total_line()}; {time}")
    progress.now(f"loading torch and {config.model.path}")


def memory_lines(config: Config) -> list[str]:
    """Memory on the device with its arithmetic; a word for a model whose size cannot be told."""
    if (size := size_of(config.model)) is None:
        return ["memory: unknown, the model is not in the local cache and its name tells no size"]
    arithmetic = memory_of(config, size, PROMPT)[1]
    return ["memory per device", *arithmetic, "  adapters, their moments and activations on top"]
