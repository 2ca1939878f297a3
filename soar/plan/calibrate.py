"""What this device needs for every part of a run, measured in about half a minute with the run's own functions.

Each part is tried with few rows first, which also warms up and tells how long completions are. What then fits in its share
of the time is timed in full. Else, on a CPU, as many rows as fit, and the line through two sizes; on a GPU, where few rows
cost nearly what many do, all rows for a few steps (`probe.py`). Nothing that is measured here enters the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from soar import seeds
from soar.config import Config, by_set
from soar.domains.candidates import candidates
from soar.engine.memory import ModelShape, shape_of
from soar.engine.policy import concat
from soar.engine.rollouts import Rollouts
from soar.engine.update import StackOptimizer
from soar.loop.arms import arm_learning_rate
from soar.loop.evaluate import count_correct
from soar.loop.parallel import spread
from soar.loop.rollout import Examiner
from soar.loop.student import Population, choose_chunk, shuffled_passes, train_population
from soar.loop.teacher import LoopState, OuterLoop, new_state
from soar.loop.write import Lessons, read_pairs, teacher_prompt
from soar.plan.forecast import Assumptions, Forecast, Rates, Sharing, forecast, trained_arms
from soar.plan.probe import Log, Observed, Probe, Stopwatch, Timed, at_full, rate_at_full
from soar.run.measure import BLOCK as HELD_OUT_BLOCK
from soar.run.screen import BLOCK, screen_block
from soar.run.setup import choose_workers, open_examiner, usable
from soar.types import Problem

PARTS = 6
PILOT = 4
GPU_PILOTS = {"write": 32, "measure": 16, "student": 8, "arm": 8}  # there rows are cheap, and lengths need some
APART = 3  # two sizes on a CPU: the larger at least so many times the smaller


@dataclass
class Calibration:
    """Rates and measured assumptions as they come. shares: part -> what was timed, as a share of the run's rows or steps."""

    sample: dict[str, float] = field(default_factory=dict)
    train: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    taken: float = 0.0

    def rates(self, device: str) -> Rates:
        """For `forecast`."""
        partly = ", ".join(f"{part} {share:.0%}" for part, share in self.shares.items() if share < 1)
        note = f"; from a share of the rows or steps: {partly}" if partly else ""
        return Rates(self.sample, self.train, f"measured on this device ({device}) in {self.taken:.0f} s{note}", True)


class Calibrator:
    """Times the parts of a run one after another. clock: seconds; a benchmark on a busy machine gives CPU time."""

    def __init__(
        self,
        examiner: Examiner,
        config: Config,
        workers: int,
        seconds: float = 30.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config, self.workers, self.clock = config, workers, clock
        self.meter = Probe(examiner.sampler, examiner.backbone)
        self.examiner = Examiner(
            examiner.backbone, self.meter, examiner.fmt, examiner.verifier, examiner.scheme, examiner.parts
        )
        self.limit = seconds / PARTS
        self.watch = Stopwatch(clock, self.limit)
        self.on_gpu = examiner.backbone.device.type == "cuda"
        self.found = Calibration()

    def run(self, problems: Sequence[Problem]) -> Calibration:
        """Everything that the config's run does, on these candidate problems."""
        began = time.perf_counter()
        state = new_state(self.examiner, self.config)
        prompts = [len(self.examiner.prompt(problem)) for problem in problems]
        self.found.measured["candidates"] = float(len(problems))
        self.found.measured["hard_prompt_tokens"] = sum(prompts) / len(prompts)
        hard = self._screen(list(problems))
        questions, lessons = self._write(state)
        if self.config.teacher.steps:
            population = self._teach(state, questions or hard)
            self._measure(state, population, hard)
            self._learn(state, lessons)
        if trained_arms(self.config):
            self._arm(state, hard)
        self._evaluate(state, hard)
        self.found.taken = time.perf_counter() - began
        return self.found

    def _sized(
        self, part: str, full: int, work: Callable[[int], Any], smallest: int = 1, like_before: bool = False
    ) -> tuple[list[Timed], Any]:
        """Measurements of `work` for `at_full`, and the result of its last call in full length. See the module's header.

        On a GPU a size is called once before it is timed: graphs are captured and kernels compiled there. like_before:
        completions are as long as those of the part before, so none need be sampled in full; there is no result then.
        """
        pilot = self._pilot(part, full, smallest)
        if self.on_gpu and like_before and pilot < full:
            mean = float(self.meter.length_B().mean())
            seconds, self.found.shares[part] = self.watch.decoding(self.meter, pilot, full, work)
            return [Timed(full, seconds, int(mean * self.meter.asked), self.meter.asked)], None
        began = self.clock()
        result = work(pilot)
        each = (self.clock() - began) / pilot
        if self.on_gpu and pilot < full and 2 * each * full > self.limit:
            first = self.meter.length_B()
            tokens, rows = int(first.sum()), len(first)
            seconds, self.found.shares[part] = self.watch.decoding(self.meter, pilot, full, work)
            return [Timed(full, seconds, tokens * full // pilot, rows * full // pilot)], result
        size, points = full if self.on_gpu else min(full, max(pilot, int(self.limit / max(each, 1e-9)))), []
        if self.on_gpu and pilot < full:
            work(full)
        if APART * pilot <= size < full:
            points.append(self._timed(pilot, work)[0])
        self.found.shares[part] = size / full
        timed, result = self._timed(size, work)
        return [*points, timed], result

    def _pilot(self, part: str, full: int, smallest: int) -> int:
        if self.on_gpu:
            return min(full, GPU_PILOTS.get(part, PILOT))
        return min(full, max(smallest, full // PILOT if full < 4 * PILOT else PILOT))

    def _timed(self, size: int, work: Callable[[int], Any]) -> tuple[Timed, Any]:
        tokens, count, began = self.meter.tokens, self.meter.count, self.clock()
        result = work(size)
        seconds = max(1e-9, self.clock() - began)
        return Timed(size, seconds, self.meter.tokens - tokens, self.meter.count - count), result

    def _screen(self, problems: list[Problem]) -> list[Problem]:
        """Rate of screening; the tokens of an attempt, and the problems that were not solved."""
        config, workers = self.config, self.workers
        block = BLOCK.get(self.examiner.backbone.device.type, BLOCK["cuda"])
        part = problems[: block * workers]
        blocks = [part[first : first + block] for first in range(0, len(part), block)]

        def work(attempts: int) -> list[Any]:
            changed = config.model_copy(update={"screen": config.screen.model_copy(update={"attempts": attempts})})
            tasks = [(block,) for block in blocks]
            found = spread(None, self.examiner, workers, screen_block, (changed,), tasks)
            return [row for rows in found for row in rows]

        full = config.screen.attempts or 8
        points, rows = self._sized("screen", full, work)
        self.found.sample["screen"] = rate_at_full(points, full)
        self.found.measured["hard_tokens"] = points[-1].tokens / points[-1].rows
        hard = [p for p, row in zip(part, rows, strict=True) if row.successes <= config.screen.max_successes]
        self.found.measured["hard_share"] = len(hard) / len(part)
        return hard or part

    def _write(self, state: LoopState) -> tuple[list[Problem], Lessons | None]:
        """Rate of the teacher, its acceptance, and its questions."""
        name, config = next(iter(by_set(self.config).items()))  # the first set stands for all of a mixed run
        examiner = self.examiner.of_set(name)
        prompt = teacher_prompt(examiner, config)
        pairs = config.teacher.datasets * config.teacher.questions
        seed = seeds.derive(config.seed, "calibrate", "teacher")

        def work(count: int) -> tuple[Any, list[Any]]:
            rollouts = examiner.sampler.sample(state.teacher, [[prompt]], count, [[seed]], config.teacher.sampling)
            texts, ended = rollouts.texts(examiner.backbone), rollouts.ended_B.tolist()
            return rollouts, read_pairs(examiner, config, texts, ended, None)

        points, (rollouts, outcomes) = self._sized("write", pairs, work)
        questions = [outcome for outcome in outcomes if isinstance(outcome, Problem)]
        questions = [replace(problem, extra={"set": name}) for problem in questions] if name else questions
        measured = self.found.measured
        self.found.sample["write"] = rate_at_full(points, pairs)
        measured["teacher_tokens"] = points[-1].tokens / points[-1].rows
        measured["teacher_prompt_tokens"] = float(len(prompt))
        if not questions:
            return [], None
        measured["texts_per_pair"] = len(outcomes) / len(questions)
        rows = rollouts.select([row % rollouts.rows for row in range(pairs)])
        n = config.teacher.questions
        sets = [[questions[(k * n + i) % len(questions)] for i in range(n)] for k in range(config.teacher.datasets)]
        return questions, Lessons(sets, rows, len(outcomes), {})

    def _students(self, state: LoopState, batches_P_S: list[list[list[Problem]]], part: str) -> tuple[Population, Log]:
        """Train one RLOO step and note the rates of sampling and of the update under `part`."""
        config = self.config
        seeds_P = [seeds.derive(config.seed, "calibrate", part, p) for p in range(len(batches_P_S))]
        lr = config.student.optimizer.lr if part == "student" else arm_learning_rate("hard_only", config)
        if self.on_gpu and self._pilot(part, config.student.attempts, 2) < config.student.attempts:
            return self._apart(part, state, batches_P_S, seeds_P, lr)
        observed = Observed(self.examiner, config)

        # Chunks run in parallel threads: the time goes to attempts and updates in the proportion of the threads' own.
        chunk = choose_chunk(self.examiner.backbone, len(batches_P_S), self.workers)
        threads = min(self.workers, -(-len(batches_P_S) // chunk))
        share: dict[int, float] = {}

        def work(attempts: int) -> tuple[Population, Log]:
            observed.log = log = Log()
            student = config.student.model_copy(update={"attempts": attempts})
            began = time.perf_counter()
            trained = train_population(observed, state.baseline, batches_P_S, seeds_P, student, lr, self.workers)
            share[attempts] = min(0.99, log.seconds / max(1e-9, (time.perf_counter() - began) * threads))
            return trained, log

        full = config.student.attempts
        points, (population, log) = self._sized(part, full, work, 2)
        more = full / points[-1].size
        sampling = at_full([(point.size, point.seconds * share[point.size]) for point in points], full)
        updating = at_full([(point.size, point.seconds * (1 - share[point.size])) for point in points], full)
        self.found.sample[part] = points[-1].tokens * more / sampling
        self.found.train[part] = (log.tokens + log.prompt_tokens) * more / updating
        return population, log

    def _apart(
        self, part: str, state: LoopState, batches_P_S: list[list[list[Problem]]], seeds_P: list[int], lr: float
    ) -> tuple[Population, Log]:
        """`_students` for a GPU: attempts for a few steps, then the update with a few micro-batches.

        One chunk is timed, of the size that a process of the run would have. The students returned are untrained.
        """
        student, P = self.config.student, len(batches_P_S)
        chunk, pilot = self._chunk(P), self._pilot(part, student.attempts, 2)
        observed = Observed(self.examiner, self.config)
        stack = concat([state.baseline] * chunk)

        def attempt(attempts: int) -> Rollouts:
            asked = [batches[0] for batches in batches_P_S[:chunk]]
            return observed.attempt(stack, asked, attempts, seeds_P[:chunk], student.sampling).rollouts

        tried, log = attempt(pilot), observed.log
        observed.log = Log()
        each = len(batches_P_S[0][0]) * student.attempts
        seconds, sampled = self.watch.decoding(self.meter, pilot, student.attempts, attempt)
        optimizer = StackOptimizer(stack, student.optimizer.model_copy(update={"lr": lr}))
        update_s, updated = self.watch.updating(self.examiner.backbone, stack, optimizer, tried, each, student.sampling)
        self.found.shares |= {part: sampled, f"{part} update": updated}
        self.found.sample[part] = chunk * each * log.tokens / log.rows / seconds
        self.found.train[part] = chunk * each * (log.tokens + log.prompt_tokens) / log.rows / update_s
        return Population(concat([state.baseline] * P), torch.zeros(P, dtype=torch.bool), [], 0), log

    def _chunk(self, policies: int) -> int:
        """Students of one forward pass; with workers on GPUs, as many as one of them gets."""
        crew = self.config.cluster.workers
        if crew and self.on_gpu and not self.config.model.chunk:
            return -(-policies // crew)
        return choose_chunk(self.examiner.backbone, policies, self.workers)

    def _teach(self, state: LoopState, questions: list[Problem]) -> Population:
        config = self.config
        students = config.teacher.datasets * config.student.repeats
        batches = [
            shuffled_passes(questions, seeds.derive(config.seed, "calibrate", p), 1, config.student.prompts_per_step)
            for p in range(students)
        ]
        population, log = self._students(state, batches, "student")
        measured = self.found.measured
        measured["question_tokens"] = log.tokens / log.rows
        measured["question_prompt_tokens"] = log.prompt_tokens / log.rows
        measured["question_gradient_share"] = log.gradient_rows / log.rows
        return population

    def _measure(self, state: LoopState, population: Population, hard: list[Problem]) -> None:
        config = self.config
        asked = (hard * -(-config.reward.questions // len(hard)))[: config.reward.questions]

        def work(questions: int) -> None:
            state.pass_rates = dict.fromkeys((problem.id for problem in asked), 0.0)
            OuterLoop(self.examiner, asked[:questions], config, state, self.workers).measure(population)

        points, _ = self._sized("measure", len(asked), work)
        self.found.sample["measure"] = rate_at_full(points, len(asked))
        self.found.measured["reward_tokens"] = points[-1].tokens / points[-1].rows

    def _learn(self, state: LoopState, lessons: Lessons | None) -> None:
        """The teacher's update, with rewards that give every row a gradient."""
        units = self.config.teacher.datasets
        if lessons is None or self.config.teacher.reward == "none":
            self.found.train["teacher"] = self.found.train["student"]
            return
        teacher = self.config.teacher
        prompts = sum(map(len, lessons.rollouts.prompts))
        if self.on_gpu:
            seconds, self.found.shares["teacher update"] = self.watch.updating(
                self.examiner.backbone,
                state.teacher,
                state.optimizer,
                lessons.rollouts,
                lessons.rollouts.rows,
                teacher.sampling,
            )
            self.found.train["teacher"] = (int(lessons.rollouts.length_B.sum()) + prompts) / seconds
            return
        loop = OuterLoop(self.examiner, [], self.config, state, self.workers)
        began = self.clock()
        loop.learn(lessons, [float(k % 2) for k in range(units)])
        tokens = int(lessons.rollouts.length_B.sum()) + prompts
        self.found.train["teacher"] = tokens / max(1e-9, self.clock() - began)

    def _arm(self, state: LoopState, hard: list[Problem]) -> None:
        seed = seeds.derive(self.config.seed, "calibrate", "arm")
        batches = [shuffled_passes(hard, seed, 1, self.config.student.prompts_per_step)]
        _, log = self._students(state, batches, "arm")
        self.found.measured["hard_gradient_share"] = log.gradient_rows / log.rows

    def _evaluate(self, state: LoopState, hard: list[Problem]) -> None:
        config, workers = self.config, self.workers
        stack = concat([state.baseline] * max(1, len(config.arms.run)))
        part = (hard * HELD_OUT_BLOCK * workers)[: HELD_OUT_BLOCK * workers]
        sampling = config.student.sampling.model_copy(update={"temperature": config.evaluate.temperature})

        def work(attempts: int) -> None:
            count_correct(self.examiner, stack, part, attempts, 0, sampling, workers, HELD_OUT_BLOCK)

        points, _ = self._sized("evaluate", config.evaluate.attempts, work, like_before=bool(trained_arms(config)))
        self.found.sample["evaluate"] = rate_at_full(points, config.evaluate.attempts)


def calibrate(
    examiner: Examiner,
    config: Config,
    workers: int,
    assumptions: Assumptions,
    seconds: float = 30.0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Assumptions, Rates]:
    """Assumptions with what was measured, and the rates of this device. Raises ConfigError and DataError.

    What was given by hand is kept. seconds: to be spent, about; a model whose single rows take longer takes longer.
    """
    problems, _ = usable(examiner, config, candidates(config).problems, lambda line: None)
    calibrator = Calibrator(examiner, config, workers, seconds, clock)
    found = calibrator.run(problems)
    given = {name for name, origin in assumptions.origin.items() if origin in ("given", "screened before")}
    values = {name: value for name, value in found.measured.items() if name not in given}
    return assumptions.with_values(values, "measured"), found.rates(device_name(examiner))


def calibrated_forecast(config: Config, assumptions: Assumptions) -> tuple[Forecast, ModelShape | None]:
    """Load the model, calibrate, forecast. The shape has the parameters that were loaded. Raises as `calibrate`."""
    with open_examiner(config) as examiner:
        workers = choose_workers(examiner.backbone, config.threads)
        known, rates = calibrate(examiner, config, workers, assumptions)
        return forecast(config, known, rates, sharing_of(examiner, config, workers)), shape_of(config)


def forecast_event(
    examiner: Examiner, config: Config, workers: int, assumptions: Assumptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """Calibrate, say the forecast line by line, and return it as the first event of a run."""
    say("calibrating: what does each part of this run cost here?")
    known, rates = calibrate(examiner, config, workers, assumptions)
    expected = forecast(config, known, rates, sharing_of(examiner, config, workers))
    for line in expected.lines():
        say(line)
    return expected.event(device_name(examiner))


def sharing_of(examiner: Examiner, config: Config, workers: int) -> Sharing:
    """How the config's worker processes, each like this one, will share the run. workers: threads of a process."""
    kind, P = examiner.backbone.device.type, config.teacher.datasets * config.student.repeats
    chunk = config.model.chunk if kind == "cuda" else choose_chunk(examiner.backbone, P, workers)
    return Sharing(config.cluster.workers, workers, chunk, BLOCK.get(kind, BLOCK["cuda"]))


def device_name(examiner: Examiner) -> str:
    """The device as a person would call it."""
    device = examiner.backbone.device
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {torch.get_num_threads()} threads"
    )
