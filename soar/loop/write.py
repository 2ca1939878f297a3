"""The teacher writes: rejection sampling of its texts until every dataset is full.

Left out: several groups of datasets a step, off-policy reuse of teacher samples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from soar import seeds
from soar.config import Config, ConfigError, by_set
from soar.engine.policy import AdapterStack
from soar.engine.sampler import Rollouts, join
from soar.loop.rollout import Examiner
from soar.plan.forecast import FIRST_GUESS, texts_at_once
from soar.problems.pool import read_problems
from soar.types import Problem, Reason, Rejection, UserError


class TeacherError(UserError):
    """The teacher wrote too few acceptable pairs; the message holds the reasons and its last outputs."""


@dataclass(frozen=True)
class Lessons:
    """One step's accepted pairs: problems_G_Q, their teacher rollouts (rows in the same order), and the bookkeeping."""

    problems_G_Q: list[list[Problem]]
    rollouts: Rollouts
    sampled: int
    rejected: dict[str, int]

    @property
    def sets_G(self) -> list[str]:
        """The hard set that each dataset was written for; "" in an unmixed run."""
        return [problems[0].set for problems in self.problems_G_Q]


def teacher_prompt(examiner: Examiner, config: Config) -> list[int]:
    """Token ids of the teacher prompt. Raises ConfigError when it leaves no room for the teacher's text."""
    prompt = examiner.fmt.teacher_ids(examiner.backbone.tokenizer, config.teacher.subject)
    tokens = config.teacher.sampling.max_tokens
    if len(prompt) + tokens > examiner.backbone.context:
        raise ConfigError(
            f"teacher.sampling.max_tokens = {tokens}: with the teacher prompt of {len(prompt)} tokens it "
            f"exceeds the model's context of {examiner.backbone.context}; lower it"
        )
    return prompt


def write_lessons(
    examiner: Examiner, teacher: AdapterStack | None, prompt: list[int], run: Config, step: int
) -> Lessons:
    """g * n accepted pairs of one outer step by rejection sampling (method: the loop, step 1).

    teacher: a stack of one policy, or None for the base model. Raises TeacherError when teacher.max_tries is spent.
    """
    config = run.teacher
    wanted = config.datasets * config.questions
    accepted: list[Problem] = []
    kept: list[Rollouts] = []
    rejected: Counter[str] = Counter()
    seen: set[str] | None = set() if config.reject_duplicates else None
    last: list[str] = []
    sampled = attempt = 0
    while len(accepted) < wanted:
        if sampled >= config.max_tries * wanted:
            raise TeacherError(_no_pairs(len(accepted), wanted, sampled, rejected, last))
        rate = max(len(accepted) / sampled, 1 / 16) if sampled else FIRST_GUESS
        count = min(texts_at_once(wanted - len(accepted), wanted, rate), config.max_tries * wanted - sampled)
        seed = seeds.derive(run.seed, "teacher", step, attempt)
        rollouts = examiner.sampler.sample(teacher, [[prompt]], count, [[seed]], config.sampling)
        attempt += 1
        texts, ended = rollouts.texts(examiner.backbone), rollouts.ended_B.tolist()
        rows = []
        for row, outcome in enumerate(read_pairs(examiner, run, texts, ended, seen)):
            if len(accepted) == wanted:
                break
            sampled += 1
            if isinstance(outcome, Rejection):
                rejected[outcome.name] += 1
                last = [*last[-4:], outcome.text]
            else:
                accepted.append(outcome)
                rows.append(row)
        if rows:
            kept.append(rollouts.select(rows))
    n = config.questions
    sets = [accepted[k * n : (k + 1) * n] for k in range(config.datasets)]
    return Lessons(sets, join(kept), sampled, dict(rejected))


def sets_of_step(run: Config, step: int) -> list[str]:
    """Which hard set each of the step's datasets is written for: in turn, so that all sets get equally many.

    The order is drawn once from the run's seed. The teacher is told by the set's prompt and subject.
    """
    names = sorted(run.problems.sets)
    order = seeds.generator(run.seed, "sets").permutation(len(names)).tolist()
    G = run.teacher.datasets
    return [names[order[(step * G + k) % len(names)]] for k in range(G)]


def write_step(examiner: Examiner, teacher: AdapterStack | None, prompt: list[int], run: Config, step: int) -> Lessons:
    """`write_lessons`, in a mixed run for every set by its own prompts. Raises TeacherError and ConfigError."""
    if not run.problems.sets:
        return write_lessons(examiner, teacher, prompt, run, step)
    sets_G = sets_of_step(run, step)
    written: dict[str, Lessons] = {}
    for name, own in by_set(run).items():
        if name in sets_G:
            count = own.teacher.model_copy(update={"datasets": sets_G.count(name)})
            part = own.model_copy(update={"teacher": count, "seed": seeds.derive(run.seed, "set", name)})
            view = examiner.of_set(name)
            written[name] = write_lessons(view, teacher, teacher_prompt(view, part), part, step)
    n, used = run.teacher.questions, Counter[str]()
    problems_G_Q, rollouts = [], []
    for name in sets_G:
        k = used[name]
        used[name] += 1
        problems_G_Q.append([replace(p, extra={"set": name}) for p in written[name].problems_G_Q[k]])
        rollouts.append(written[name].rollouts.select(list(range(k * n, (k + 1) * n))))
    rejected: Counter[str] = Counter()
    for lessons in written.values():
        rejected.update(lessons.rejected)
    return Lessons(problems_G_Q, join(rollouts), sum(lessons.sampled for lessons in written.values()), dict(rejected))


def read_pairs(
    examiner: Examiner, config: Config, texts: list[str], ended: list[bool], seen: set[str] | None
) -> list[Problem | Rejection]:
    """Problems or reasons, in order; a question that leaves no room for the student's answer is too long."""
    cut = [not e for e in ended]
    outcomes = read_problems(examiner.verifier, examiner.fmt, texts, cut, seen, config.teacher.strict_tags)
    sampling = config.student.sampling
    return [
        Rejection(Reason.TOO_LONG, text)
        if isinstance(outcome, Problem) and not examiner.room(outcome, sampling)
        else outcome
        for text, outcome in zip(texts, outcomes, strict=True)
    ]


def _no_pairs(accepted: int, wanted: int, sampled: int, rejected: Counter[str], last: list[str]) -> str:
    reasons = ", ".join(f"{name} {count}" for name, count in rejected.most_common()) or "none"
    shown = "\n".join(f"  {text[:300]!r}" for text in last)
    return (
        f"the teacher wrote {accepted} acceptable pairs of {wanted} in {sampled} samples (rejected: {reasons}).\n"
        f"Its last outputs:\n{shown}\n"
        "Try another problems.format or domain, a lower teacher.sampling.temperature, more teacher.sampling.max_tokens, or a "
        "stronger model; raise teacher.max_tries if the share is small but not zero."
    )
