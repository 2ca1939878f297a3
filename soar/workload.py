"""What a run computes, counted before anything is loaded: rollouts, tokens sampled and tokens trained, by stage and arm.

The counts follow from the config and from what is assumed about the model and its problems (`Assumptions`); each
assumption is printed and can be given or measured. Pure, needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from soar.candidates import candidates
from soar.config import Config, ConfigError, by_set
from soar.data import evidence_path
from soar.settings import HARD_ARMS, TrainedArm
from soar.types import UserError

STAGES = ("screen", "loop", "arms", "evaluate")
GENERATED = ("world:", "science:", "code:", "reasoning_gym:")
INTRINSIC = ("learnability", "uncertainty", "band")
FIRST_GUESS = 0.8  # share of teacher texts that are accepted, before the first of a step is seen
HELD_OUT_BLOCK = 8  # held-out problems of one piece of the evaluation
WRITTEN_BY_TEACHER = ("base_t", "teacher_t", "self_instruct")


@dataclass(frozen=True)
class Assumptions:
    """What the config does not say. origin: name -> `assumed`, `given` or `measured`.

    Tokens are means a row; reward_tokens of an attempt at a reward question, which is greedy unless the config says
    otherwise (0: as hard_tokens). gradient shares: rows of students that carry a gradient; without a KL term rows of a group
    whose rewards are all equal carry none. promotions: in the whole outer loop.
    """

    candidates: float = 1000.0
    hard_share: float = 0.3
    texts_per_pair: float = 1.5
    teacher_prompt_tokens: float = 250.0
    teacher_tokens: float = 256.0
    question_prompt_tokens: float = 150.0
    question_tokens: float = 512.0
    hard_prompt_tokens: float = 150.0
    hard_tokens: float = 512.0
    reward_tokens: float = 0.0
    question_gradient_share: float = 0.5
    hard_gradient_share: float = 0.05
    promotions: float = 0.0
    origin: Mapping[str, str] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, float], origin: str) -> Assumptions:
        """A copy with these values and their origin. Raises ConfigError for an unknown name or an impossible value."""
        known = {f.name for f in fields(self)} - {"origin"}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"--assume {name}: no such assumption; known: {', '.join(sorted(known))}")
            share = name.endswith("share")
            if not math.isfinite(value) or value < 0 or (share and value > 1):
                raise ConfigError(f"--assume {name}={value}: expected a number {'from 0 to 1' if share else '>= 0'}")
        return replace(self, **values, origin={**self.origin, **dict.fromkeys(values, origin)})

    def lines(self) -> list[str]:
        """Name, value and origin of each."""
        rows = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "origin"]
        return [f"  {name:24s} {value:10,.4g}  {self.origin.get(name, 'assumed')}" for name, value in rows]


def assumed(config: Config) -> Assumptions:
    """Assumptions for a config: half of every token budget is used; with a KL term every row carries a gradient.

    Candidates are counted where that takes no network; of a problem file with its evidence beside it all are hard.
    """
    student, teacher = config.student, config.teacher
    guess = Assumptions(
        teacher_tokens=teacher.sampling.max_tokens / 2,
        question_tokens=student.sampling.max_tokens / 2,
        hard_tokens=student.sampling.max_tokens / 2,
    )
    if student.optimizer.kl > 0:
        guess = guess.with_values({"question_gradient_share": 1.0, "hard_gradient_share": 1.0}, "by the KL term")
    sources = [own.problems.source for own in by_set(config).values()]
    local = all(source.startswith(GENERATED) or Path(source).expanduser().is_file() for source in sources)
    try:
        count = len(candidates(config).problems) if local else 0
    except (UserError, ImportError):
        count = 0  # `soar check` says what is wrong with the problems; a plan is still worth having
    if count:
        guess = guess.with_values({"candidates": float(count)}, "counted")
    elif config.problems.limit:
        guess = guess.with_values({"candidates": float(config.problems.limit)}, "problems.limit")
    if screened_before(config):
        guess = guess.with_values({"hard_share": 1.0}, "screened before")
    return guess


def screened_before(config: Config) -> bool:
    """Whether a run would not screen: there is evidence beside the problem file, or screening is off."""
    return not config.screen.attempts or evidence_path(Path(config.problems.source).expanduser()).is_file()


@dataclass(frozen=True)
class Work:
    """One line of a forecast.

    stage: as in `wall_seconds` of summary.json. kind: whose rates apply. sampled: tokens of completions. trained: tokens
    of prompts and completions that pass forward and backward. shared: share of the work that worker processes take over;
    the rest is the driver's.
    """

    stage: str
    name: str
    kind: str
    rollouts: float
    sampled: float
    trained: float
    shared: float = 1.0


def inner_steps_mean(config: Config, promotions: float) -> float:
    """Mean RLOO steps of an inner loop when promotions are spread evenly over the outer loop."""
    student, steps = config.student, config.teacher.steps
    if not steps:
        return 0.0
    at = (student.steps + student.extra_steps_per_promotion * math.floor(promotions * t / steps) for t in range(steps))
    return sum(min(student.max_steps, each) for each in at) / steps


def workload(config: Config, known: Assumptions) -> list[Work]:
    """Every part of a run, in order."""
    screening = 0.0 if screened_before(config) else known.candidates * config.screen.attempts
    hard = known.candidates * known.hard_share
    if config.problems.max_hard:
        hard = min(hard, config.problems.max_hard)
    held_out = hard * config.problems.test_share
    works = [Work("screen", "screening", "screen", screening, screening * known.hard_tokens, 0.0)]
    loop = _loop(config, known, hard - held_out)
    works += loop
    spent = sum(work.rollouts for work in loop if work.kind in ("student", "measure"))
    works += [_arm(arm, config, known, hard - held_out, spent) for arm in trained_arms(config)]
    attempts = held_out * config.evaluate.attempts * len(config.arms.run)
    return [*works, Work("evaluate", "evaluation", "evaluate", attempts, attempts * known.hard_tokens, 0.0)]


def texts_at_once(missing: int, wanted: int, accepted: float = FIRST_GUESS) -> int:
    """Teacher texts of one call, for so many missing pairs of `wanted` when a share `accepted` of the texts holds one."""
    return min(int(missing / accepted * 1.1) + 8, 8 * wanted)


def trained_arms(config: Config) -> list[str]:
    """The arms of arms.run that are trained, in the order in which they are."""
    return [arm for arm in get_args(TrainedArm) if arm in config.arms.run]


def _loop(config: Config, known: Assumptions, hard_train: float) -> list[Work]:
    teacher, student, reward = config.teacher, config.student, config.reward
    pairs = teacher.steps * teacher.datasets * teacher.questions
    wanted = teacher.datasets * teacher.questions
    texts = max(pairs * known.texts_per_pair, teacher.steps * texts_at_once(wanted, wanted))
    students = teacher.steps * teacher.datasets * student.repeats
    steps = inner_steps_mean(config, known.promotions)
    sampled = students * steps * student.prompts_per_step * student.attempts
    trained = sampled * known.question_gradient_share * (known.question_prompt_tokens + known.question_tokens)
    asked = min(reward.questions, hard_train)
    once = 1 if reward.mode == "greedy" else reward.baseline_attempts
    # The baseline is asked each question once while it stands.
    baseline = once * min(hard_train * (1 + known.promotions), asked * teacher.steps)
    intrinsic = pairs * config.intrinsic.attempts if teacher.reward in INTRINSIC else 0.0
    learned = pairs * (known.teacher_prompt_tokens + known.teacher_tokens) if teacher.reward != "none" else 0.0
    measured = students * asked * reward.attempts + baseline
    return [
        Work("loop", "teacher writes", "write", texts, texts * known.teacher_tokens, 0.0, 0.0),
        Work("loop", "students train", "student", sampled, sampled * known.question_tokens, trained),
        Work(
            "loop",
            "students measured",
            "measure",
            measured + intrinsic,
            measured * (known.reward_tokens or known.hard_tokens) + intrinsic * known.question_tokens,
            0.0,
            students * asked * reward.attempts / max(1.0, measured + intrinsic),
        ),
        Work("loop", "teacher learns", "teacher", 0.0, 0.0, learned, 0.0),
    ]


def _arm(arm: str, config: Config, known: Assumptions, hard_train: float, spent: float) -> Work:
    """An arm on hard problems and, unless it has those alone, on questions: mixed by number, or one after the other."""
    student, arms = config.student, config.arms
    per_step = student.prompts_per_step * student.attempts
    fixed = 0 if arm == "hard_only" else arms.pq_steps
    steps = fixed or arms.steps or max(1, math.ceil(spent / per_step))
    promoted = max(1.0, known.promotions) * config.teacher.questions
    questions = 0.0 if arm in HARD_ARMS else promoted if arm.startswith("pq") else float(arms.questions)
    mode = {"pq_mixed": "mixed", "pq_curriculum": "curriculum"}.get(arm, arms.pq_mode)
    share = questions / max(1.0, questions + hard_train)
    if mode == "curriculum" and questions:
        share = min(steps, arms.curriculum_steps) / steps
    rollouts = float(steps * per_step)
    tokens = share * known.question_tokens + (1 - share) * known.hard_tokens
    trained = rollouts * (
        share * known.question_gradient_share * (known.question_prompt_tokens + known.question_tokens)
        + (1 - share) * known.hard_gradient_share * (known.hard_prompt_tokens + known.hard_tokens)
    )
    written = arms.questions * known.texts_per_pair * known.teacher_tokens if arm in WRITTEN_BY_TEACHER else 0.0
    written += arms.questions * arms.votes * known.question_tokens if arm == "self_instruct" else 0.0
    return Work("arms", arm, "arm", rollouts, rollouts * tokens + written, trained)
