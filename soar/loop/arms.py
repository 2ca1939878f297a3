"""The questions on which the arms train besides the hard problems: where they come from, drawn from the run's seed.

| arm | questions |
|---|---|
| pq, pq_mixed, pq_curriculum | the promotion questions |
| pq_sample, pq_well_posed, pq_correct | equally many of all, of the well-posed, of the correctly answered ones |
| base_t, teacher_t | N questions of the untrained, of the trained teacher |
| self_instruct | N questions of the untrained teacher, answered by the base model's majority vote |
| real | N easier problems with right answers, from a file or from the embedded world |

`self_instruct` stands for SeRL (arXiv 2505.20347) and leaves out its filters and its rounds of self-training.

The arms of a run after the outer loop: what is trained, on what, with which budget.

Hard-Only gets as many student rollouts as the whole outer loop spent on training and measuring students. `ps_hard` goes on
from the promoted student on the hard training half (ours; the paper samples from that student as it is). Every other arm
trains a fresh base student on its questions (`training_sets`) and the hard training half; its own rollouts are counted,
and the search for questions and promoted student is reported beside them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from soar import seeds
from soar.config import HARD_ARMS, Config, ConfigError, TrainedArm
from soar.domains.candidates import arranged
from soar.domains.world import get_world
from soar.engine.policy import AdapterStack, Backbone, load_adapter
from soar.files import read_jsonl
from soar.loop.judges import open_judge
from soar.loop.parallel import Parallel, Tick
from soar.loop.population import train_population
from soar.loop.rewards import votes
from soar.loop.rollout import RolloutEnv
from soar.loop.student import Metrics, Population, TrainState, shuffled_passes
from soar.loop.write import teacher_prompt, write_questions
from soar.problems.domain import domain_of
from soar.problems.load import find_leaks, fits_budget, load_problems
from soar.types import Problem, Verdict

PQ_ARMS = ("pq", "pq_mixed", "pq_curriculum")
PQ_SUBSETS = ("pq_sample", "pq_well_posed", "pq_correct")


@dataclass(frozen=True)
class Material:
    """What a run has to offer to its arms: promotion questions, the trained teacher, the held-out problems (which no
    training set may hold), threads, and where notes go. labels: the judge's rows on the promotion questions, once asked.
    """

    pq: list[Problem]
    teacher: AdapterStack
    hard_test: list[Problem]
    threads: int
    say: Callable[[str], None]
    labels: list[dict[str, Any]] = field(default_factory=list)


def training_questions(arm: str, env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """Questions of an arm, [] for those on hard problems alone and where there are none (the reason goes to `material.say`).

    Raises ConfigError when the config names no source for them, TeacherError when a teacher writes too few.
    """
    if arm in HARD_ARMS:
        return []
    if arm in PQ_ARMS or arm in PQ_SUBSETS:
        if not material.pq:
            material.say(f"no promotion, so there are no promotion questions: the arm {arm} is left out")
            return []
        return material.pq if arm in PQ_ARMS else pq_subset(arm, env, config, material)
    if arm == "real":
        return real_problems(env, config, material)
    teacher = material.teacher if arm == "teacher_t" else None
    written = teacher_questions(env, teacher, config, arm)
    return majority_answers(env, written, config, material) if arm == "self_instruct" else written


def teacher_questions(env: RolloutEnv, teacher: AdapterStack | None, config: Config, name: str) -> list[Problem]:
    """arms.questions accepted pairs of a teacher (None: the base model); `name` enters the seed."""
    one_set = config.teacher.model_copy(update={"datasets": 1, "questions": config.arms.questions})
    own = config.model_copy(update={"teacher": one_set, "seed": seeds.derive(config.seed, "arm", name, "questions")})
    (problems,) = write_questions(env, teacher, teacher_prompt(env, config), own, 0).problems_G_Q
    return problems


def majority_answers(env: RolloutEnv, written: list[Problem], config: Config, material: Material) -> list[Problem]:
    """The questions with the majority answer of the base model's arms.votes attempts; those without one are left out."""
    seed = seeds.derive(config.seed, "arm", "self_instruct", "votes")
    attempts = env.rollout(
        None, [written], config.arms.votes, [seed], config.student.sampling, threads=material.threads
    )
    winners = [winner or "" for winner, _ in votes(env, attempts)]
    answered = [replace(p, answer=w) for p, w in zip(written, winners, strict=True)]
    kept = [p for p, ok in zip(answered, env.verifier.usable(answered), strict=True) if ok]
    material.say(f"self_instruct: {len(kept)} of {len(written)} questions have a majority answer")
    return kept


def real_problems(env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """arms.questions problems of arms.real (a random choice), or of the embedded world; none that is held out."""
    source, count = config.arms.real, config.arms.questions
    if source:
        found, report = load_problems(source, skip_bad_rows=config.problems.skip_bad_rows)
        for line in report.lines():
            material.say(line)
        found = arranged(domain_of(config.problems), found, report)
        found, _ = usable(env, config, found, material.say)
    elif config.problems.source.startswith("world:"):
        world = get_world(config.problems.source.removeprefix("world:"))
        try:
            found = world.real_problems(count, config.seed)
        except ValueError as error:
            raise ConfigError(f"arms.questions = {count} for the arm real: {error}") from error
    else:
        raise ConfigError(
            f'arms.run has "real", but arms.real = "" and problems.source = {config.problems.source!r} is no embedded '
            "world; set arms.real to a file of easier problems"
        )
    leaks = {problem.id for problem in find_leaks(material.hard_test, found)}
    if leaks:
        material.say(f"real: {len(leaks)} problems are held out for the test, so they are left out")
    found = [problem for problem in found if problem.id not in leaks]
    if not found:
        raise ConfigError(f"arms.real = {source!r} has no problem left to train on; give another file")
    order = seeds.generator(config.seed, "arm", "real", "questions").permutation(len(found)).tolist()
    return [found[i] for i in order[:count]]


def pq_subset(arm: str, env: RolloutEnv, config: Config, material: Material) -> list[Problem]:
    """Promotion questions of one kind, as many as the smaller of the well-posed and the correct ones (finding 3).

    Equal sizes, so that a difference between these arms is one of kind, not of number.
    """
    if not material.labels:
        judge = open_judge(env, config, material.threads)
        for p, label in zip(material.pq, judge.label(material.pq), strict=True):
            row = {"question": p.question, "answer": p.answer, "judge": judge.name}
            material.labels.append({**row, "well_posed": label.well_posed, "correct": label.correct})
    rows = list(zip(material.pq, material.labels, strict=True))
    pools = {
        "pq_sample": material.pq,
        "pq_well_posed": [p for p, row in rows if row["well_posed"]],
        "pq_correct": [p for p, row in rows if row["correct"]],
    }
    size = min(len(pools["pq_well_posed"]), len(pools["pq_correct"]))
    material.say(
        f"{arm}: {size} of {len(material.pq)} promotion questions; {len(pools['pq_well_posed'])} are well-posed and "
        f"{len(pools['pq_correct'])} have a correct answer ({material.labels[0]['judge']})"
    )
    if size == 0:
        material.say(f"so the arm {arm} is left out")
        return []
    order = seeds.generator(config.seed, "arm", arm, "subset").permutation(len(pools[arm])).tolist()
    return [pools[arm][i] for i in sorted(order[:size])]


def read_pq(place: Path) -> list[dict[str, Any]]:
    """Rows of a pq.jsonl file, or of the run folder that holds it. Raises ConfigError when there is no question."""
    path = place / "pq.jsonl" if place.is_dir() else place
    rows, notes = read_jsonl(path)
    good = [row for row in rows if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)]
    if not good:
        why = "; ".join(notes) or "no line has a question and an answer"
        raise ConfigError(f"arms.pq_from = {str(place)!r}: {why}; give a run folder that promoted, or its pq.jsonl")
    return good


def read_teacher(backbone: Backbone, place: Path) -> AdapterStack:
    """The teacher in a run folder or in an adapter folder. Raises ConfigError."""
    folder = place if (place / "adapter_config.json").is_file() else place / "teacher"
    if not (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"arms.teacher_from = {str(place)!r}: neither it nor its folder teacher/ holds an adapter "
            "(adapter_config.json); give a finished run folder or an adapter folder"
        )
    return load_adapter(backbone, folder)


TRAINED: tuple[str, ...] = get_args(TrainedArm)


def arms_left(config: Config, done: Container[str], promotions: int, say: Callable[[str], None]) -> list[str]:
    """The trained arms of arms.run that are not `done`, in their order; `ps_hard` wants a promoted student."""
    wanted: list[str] = [arm for arm in TRAINED if arm in config.arms.run and arm not in done]
    if "ps_hard" in wanted and not promotions:
        say("no promotion, so there is no promoted student: the arm ps_hard is left out")
        wanted.remove("ps_hard")
    return wanted


def arm_steps(name: str, config: Config, loop_rollouts: int) -> int:
    """RLOO steps of an arm: those of Hard-Only, or arms.pq_steps for the others."""
    own = 0 if name == "hard_only" else config.arms.pq_steps
    return own or budget_steps(config, loop_rollouts)


def arm_learning_rate(name: str, config: Config) -> float:
    """arms.learning_rates of the arm, else arms.learning_rate, else the student's."""
    return config.arms.learning_rates.get(name) or config.arms.learning_rate or config.student.optimizer.lr  # type: ignore[call-overload]


def budget_steps(config: Config, loop_rollouts: int) -> int:
    """RLOO steps of Hard-Only: arms.steps, or enough to spend the outer loop's student rollouts (rounded up)."""
    per_step = config.student.prompts_per_step * config.student.attempts
    return config.arms.steps or max(1, math.ceil(loop_rollouts / per_step))


def arm_batches(
    name: str, config: Config, hard_train: list[Problem], questions: list[Problem], steps: int
) -> list[list[Problem]]:
    """Training batches [steps][prompts_per_step] of an arm.

    Mixed: passes over questions and hard problems together. Curriculum: arms.curriculum_steps of questions only, then
    hard problems only. The arms pq_mixed and pq_curriculum say it in their name, for the others arms.pq_mode decides.
    """
    seed, per_step = seeds.derive(config.seed, "arm", name), config.student.prompts_per_step
    if name in HARD_ARMS:
        return shuffled_passes(hard_train, seed, steps, per_step)
    if name not in TRAINED:
        raise ValueError(f"arm {name!r} is not trained")
    mode = {"pq_mixed": "mixed", "pq_curriculum": "curriculum"}.get(name, config.arms.pq_mode)
    if mode == "mixed":
        return shuffled_passes([*questions, *hard_train], seed, steps, per_step)
    first = min(steps, config.arms.curriculum_steps)
    rest = shuffled_passes(hard_train, seed + 1, steps - first, per_step) if steps > first else []
    return shuffled_passes(questions, seed, first, per_step) + rest


def left_out(name: str, message: str) -> dict[str, Any]:
    """The alarm that an arm of arms.run could not be trained, and why."""
    return {"event": "alarm", "step": None, "kind": "arm left out", "arm": name, "message": message}


@dataclass(frozen=True)
class ArmProgress:
    """An arm in the middle of its training. untold: metrics of its last steps, where no listener has heard of them yet."""

    arm: str
    train_state: TrainState
    untold: list[Metrics] = field(default_factory=list)


Begun = Mapping[str, ArmProgress]
Starts = Mapping[str, AdapterStack]
"""Arm -> the one slice that its student starts from."""


@dataclass(frozen=True)
class Listener:
    """Who hears of the arms' training.

    on_step(): after each step of any arm. on_state(begun, events): after a step whose number of steps done is `due`,
    with every arm that is in the middle and the arm_step events since the last call. on_done(arm, population, events):
    once per arm, with the events that are left. Events come in the order of the arms, whatever order they finish in.
    """

    on_step: Tick
    on_state: Callable[[dict[str, ArmProgress], list[dict[str, Any]]], None]
    on_done: Callable[[str, Population, list[dict[str, Any]]], None]
    due: Callable[[int], bool]


def train_arms(
    env: RolloutEnv,
    starts: Starts,
    batches: dict[str, list[list[Problem]]],
    config: Config,
    threads: int,
    listener: Listener,
    begun: Begun | None = None,
    parallel: Parallel | None = None,
) -> dict[str, Population]:
    """Train every named arm from its start: one after another, or all at once by worker processes.

    Arms are reported in the order of `batches`: one arm_step event a step, and an alarm when the student diverged.
    begun: the arms that an earlier process left in the middle. threads: threads that share out the sampling of an arm.
    """
    left = {name: progress for name, progress in (begun or {}).items() if name in batches}
    if parallel is not None:
        return _train_together(env, starts, batches, config, threads, listener, left, parallel)
    done: dict[str, Population] = {}
    for name in batches:
        log = _ArmLog(name, left.pop(name, None))

        def keep(train_state: TrainState, name: str = name, log: _ArmLog = log) -> None:
            listener.on_state({name: ArmProgress(name, train_state), **left}, log.events(train_state.metrics))

        done[name] = _train_one(
            env, listener.on_step, starts, batches, config, threads, name, log.train_state, keep, listener.due
        )
        listener.on_done(name, done[name], log.last_events(done[name]))
    return done


def _train_one(
    env: RolloutEnv,
    tick: Tick,
    starts: Starts,
    batches: dict[str, list[list[Problem]]],
    config: Config,
    threads: int,
    name: str,
    train_state: TrainState | None,
    on_state: Callable[[TrainState], None],
    due: Callable[[int], bool],
) -> Population:
    seed, lr = seeds.derive(config.seed, "arm", name, "student"), arm_learning_rate(name, config)
    return train_population(
        env, starts[name], [batches[name]], [seed], config.student, lr, threads, tick, train_state, on_state, due
    )


class _Reached(Exception):
    """Ends a training at the step that was asked for."""

    def __init__(self, train_state: TrainState) -> None:
        super().__init__("the step that was asked for is done")
        self.train_state = train_state


def arm_segment(
    env: RolloutEnv,
    tick: Tick,
    starts: Starts,
    batches: dict[str, list[list[Problem]]],
    config: Config,
    threads: int,
    name: str,
    train_state: TrainState | None,
    until: int,
) -> TrainState | Population:
    """An arm up to the step `until`, or to its end, as a piece of work. Its state travels on the host."""

    def stop(reached: TrainState) -> None:
        raise _Reached(reached)

    starts = {name: starts[name].to(env.backbone.device)}
    try:
        return _train_one(
            env, tick, starts, batches, config, threads, name, train_state, stop, lambda steps: steps == until
        )
    except _Reached as end:
        found = end.train_state
        return replace(found, optimizer={key: value.cpu() for key, value in found.optimizer.items()})


def _train_together(
    env: RolloutEnv,
    starts: Starts,
    batches: dict[str, list[list[Problem]]],
    config: Config,
    threads: int,
    listener: Listener,
    left: dict[str, ArmProgress],
    parallel: Parallel,
) -> dict[str, Population]:
    """Every arm in segments of arms.save_steps, so that a lost worker costs one segment.

    The first arm that is not done is reported as it goes. What the arms after it do is held back, so that the events are
    those of arms trained one after another.
    """
    logs = {name: _ArmLog(name, left.get(name)) for name in batches}
    save = config.arms.save_steps

    def segment(name: str, train_state: TrainState | None) -> tuple[str, TrainState | None, int]:
        return name, train_state, ((train_state.step if train_state else 0) // save + 1) * save

    queue = deque((name, segment(name, log.train_state)) for name, log in logs.items())
    finished: dict[str, Population] = {}
    done: dict[str, Population] = {}
    results = parallel.stream(arm_segment, (starts, batches, config, threads), queue, listener.on_step)
    for name, part in results:
        if isinstance(part, TrainState):
            queue.append((name, segment(name, part)))
            metrics = logs[name].untold + part.metrics
            logs[name].untold = metrics
            left[name] = ArmProgress(name, replace(part, metrics=[]), metrics)
        else:
            finished[name] = replace(part, stack=part.stack.to(env.backbone.device))
        while (first := next((arm for arm in batches if arm not in done), None)) in finished:
            assert first is not None
            left.pop(first, None)
            done[first] = finished[first]
            listener.on_done(first, done[first], logs[first].last_events(done[first]))
        if first is not None and left:
            events = logs[first].events([]) if first in left else []
            if first in left:
                left[first] = replace(left[first], untold=[])
            listener.on_state(dict(left), events)
    return done


class _ArmLog:
    """The events of one arm. train_state: where its training goes on; untold: metrics of the steps before that which nobody
    heard of; told: steps whose events were handed on."""

    def __init__(self, arm: str, begun: ArmProgress | None) -> None:
        self.arm, self.train_state = arm, begun.train_state if begun else None
        self.untold = list(begun.untold) if begun else []
        self.first = self.told = (begun.train_state.step if begun else 0) - len(self.untold)

    def events(self, metrics: list[Metrics]) -> list[dict[str, Any]]:
        """The events that nobody has got yet, of all metrics since the training began or was continued."""
        rows = [*self.untold, *metrics]
        new = list(enumerate(rows, start=self.first))[self.told - self.first :]
        self.told = self.first + len(rows)
        return [{"event": "arm_step", "arm": self.arm, "step": step, **row} for step, row in new]

    def last_events(self, population: Population) -> list[dict[str, Any]]:
        """What is left at the end, with the alarm when the student diverged."""
        events = self.events(population.metrics)
        if population.failed_P.any():
            message = f"the student of the arm {self.arm} produced NaN or inf in training; its result says nothing"
            events.append({"event": "alarm", "step": None, "kind": "arm failed", "arm": self.arm, "message": message})
        return events


def usable(
    env: RolloutEnv, config: Config, problems: list[Problem], say: Callable[[str], None]
) -> tuple[list[Problem], dict[str, int]]:
    """Problems that fit in the context and whose gold answer can be graded; how many are left out, by reason.

    The first five of each reason are named through `say`.
    """
    tokens, context = config.student.sampling.max_tokens, env.backbone.context
    kept, dropped = fits_budget(problems, lambda problem: len(env.prompt(problem)), context, tokens)
    for row in dropped[:5]:
        say(f"left out: {row}")
    verdicts = env.grade(kept)
    bad = [p for p, verdict in zip(kept, verdicts, strict=True) if verdict is Verdict.UNSCORABLE]
    for problem in bad[:5]:
        say(f"left out: the gold answer of {problem.id} cannot be graded: {problem.answer[:80]!r}")
    gone = {problem.id for problem in bad}
    return [p for p in kept if p.id not in gone], {"too_long": len(dropped), "ungradable": len(bad)}
