"""The questions on which the arms train besides the hard problems: where they come from, drawn from the run's seed.

| arm | questions |
|---|---|
| pq, pq_mixed, pq_curriculum | the promotion questions |
| pq_sample, pq_well_posed, pq_correct | equally many of all, of the well-posed, of the correctly answered ones |
| base_t, teacher_t | N questions of the untrained, of the trained teacher |
| self_instruct | N questions of the untrained teacher, answered by the base model's majority vote |
| real | N easier problems with right answers, from a file or from the embedded world |

`self_instruct` stands for SeRL (arXiv 2505.20347) and leaves out its filters and its rounds of self-training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soar import seeds
from soar.candidates import arranged
from soar.config import Config, ConfigError
from soar.data import find_leaks, load_problems
from soar.domains import domain_of
from soar.grading import usable_answers
from soar.judges import open_judge
from soar.lessons import teacher_prompt, write_lessons
from soar.policy import AdapterStack, Backbone, load_adapter
from soar.rollout import Examiner
from soar.runs import read_jsonl
from soar.settings import HARD_ARMS
from soar.signals import votes
from soar.types import Problem
from soar.workbench import usable
from soar.worlds import get_world

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
    workers: int
    say: Callable[[str], None]
    labels: list[dict[str, Any]] = field(default_factory=list)


def training_questions(arm: str, examiner: Examiner, config: Config, material: Material) -> list[Problem]:
    """Questions of an arm, [] for those on hard problems alone and where there are none (the reason goes to `material.say`).

    Raises ConfigError when the config names no source for them, TeacherError when a teacher writes too few.
    """
    if arm in HARD_ARMS:
        return []
    if arm in PQ_ARMS or arm in PQ_SUBSETS:
        if not material.pq:
            material.say(f"no promotion, so there are no promotion questions: the arm {arm} is left out")
            return []
        return material.pq if arm in PQ_ARMS else pq_subset(arm, examiner, config, material)
    if arm == "real":
        return real_problems(examiner, config, material)
    teacher = material.teacher if arm == "teacher_t" else None
    written = teacher_questions(examiner, teacher, config, arm)
    return majority_answers(examiner, written, config, material) if arm == "self_instruct" else written


def teacher_questions(examiner: Examiner, teacher: AdapterStack | None, config: Config, name: str) -> list[Problem]:
    """arms.questions accepted pairs of a teacher (None: the base model); `name` enters the seed."""
    one_set = config.teacher.model_copy(update={"datasets": 1, "questions": config.arms.questions})
    own = config.model_copy(update={"teacher": one_set, "seed": seeds.derive(config.seed, "arm", name, "questions")})
    (problems,) = write_lessons(examiner, teacher, teacher_prompt(examiner, config), own, 0).problems_G_Q
    return problems


def majority_answers(examiner: Examiner, written: list[Problem], config: Config, material: Material) -> list[Problem]:
    """The questions with the majority answer of the base model's arms.votes attempts; those without one are left out."""
    seed = seeds.derive(config.seed, "arm", "self_instruct", "votes")
    attempts = examiner.attempt(
        None, [written], config.arms.votes, [seed], config.student.sampling, workers=material.workers
    )
    winners = [winner or "" for winner, _ in votes(examiner, attempts)]
    answered = [replace(p, answer=w) for p, w in zip(written, winners, strict=True)]
    kept = [p for p, ok in zip(answered, usable_answers(examiner.verifier, answered), strict=True) if ok]
    material.say(f"self_instruct: {len(kept)} of {len(written)} questions have a majority answer")
    return kept


def real_problems(examiner: Examiner, config: Config, material: Material) -> list[Problem]:
    """arms.questions problems of arms.real (a random choice), or of the embedded world; none that is held out."""
    source, count = config.arms.real, config.arms.questions
    if source:
        found, report = load_problems(source, skip_bad_rows=config.problems.skip_bad_rows)
        for line in report.lines():
            material.say(line)
        found = arranged(domain_of(config.problems), found, report)
        found, _ = usable(examiner, config, found, material.say)
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


def pq_subset(arm: str, examiner: Examiner, config: Config, material: Material) -> list[Problem]:
    """Promotion questions of one kind, as many as the smaller of the well-posed and the correct ones (finding 3).

    Equal sizes, so that a difference between these arms is one of kind, not of number.
    """
    if not material.labels:
        judge = open_judge(examiner, config, material.workers)
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
