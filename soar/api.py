"""The Python interface: `soar.screen`, `soar.train` and `soar.evaluate`, as short as the command line.

Each takes the model and the problems, a recipe for what is not said, and any config key in `settings`. A verifier or a
teacher reward can be a function. Left out: a class to configure; a `Config` is plain data that `soar.config` builds.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import re
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar import seeds
from soar.config import Config, ConfigError, load
from soar.domains.candidates import candidates
from soar.loop import teacher
from soar.loop.arms import usable
from soar.loop.evaluate import count_correct
from soar.loop.write import QuestionSets
from soar.report.runs import Run, read_run
from soar.run.measure import measure
from soar.run.pipeline import execute
from soar.run.progress import Progress
from soar.run.setup import choose_threads, open_env
from soar.types import Problem, Screening

Problems = str | Path | Sequence[Problem | Mapping[str, Any]]
Verifier = str | Callable[..., Any]


@dataclass(frozen=True)
class QuestionSet:
    """One dataset of an outer step, for a custom teacher reward.

    questions: as the teacher wrote them. improvement: pass rate on the reward questions minus the baseline's, one entry
    per valid student (empty when all failed). baseline: the baseline's pass rate. grounded: the method's own reward, the
    mean of `improvement` (None without a valid student). step, dataset: which one it is.
    """

    questions: list[Problem]
    improvement: list[float]
    baseline: float
    grounded: float | None
    step: int
    dataset: int


TeacherReward = Callable[[QuestionSet], float | None]


@dataclass(frozen=True)
class Trained:
    """A finished run. path: its folder; summary: summary.json; student, teacher: PEFT adapter folders."""

    path: Path
    summary: dict[str, Any]

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def run(self) -> Run:
        """Everything in the run folder: events, questions, hard problems."""
        return read_run(self.path)

    def pass_at(self, arm: str, k: int = 1) -> float:
        """Held-out pass@k of an arm (`base`, `hard_only`, `ps`, `pq`) as a share."""
        return float(self.summary["arms"][arm]["pass_at"][str(k)])


@dataclass(frozen=True)
class Evaluation:
    """pass@k of one policy. pass_at, interval_95: k -> share; correct: correct attempts per problem."""

    pass_at: dict[int, float]
    interval_95: dict[int, tuple[float, float]]
    correct: list[int]
    problems: list[Problem]


def verifier_name(verifier: Verifier, folder: Path | None = None) -> str:
    """The config's name of a verifier: itself, or `file.py:function` of a function, which worker processes import.

    A function typed in a notebook is written into `folder` (None: a temporary one), with what it uses of the notebook. Raises
    ConfigError for a function that cannot be found by name (a lambda, a method) or written down.
    """
    if isinstance(verifier, str):
        return verifier
    name = getattr(verifier, "__qualname__", repr(verifier))
    if not name.isidentifier() or not inspect.isfunction(verifier):
        raise ConfigError(
            f"verifier = {name}: expected a function at the top level of a file or notebook, since worker processes import "
            "it by name; give it a name there, or name it as 'file.py:function'"
        )
    file = Path(inspect.getfile(verifier))
    if not file.is_file():
        text = _source_of(verifier)
        file = (folder or Path(tempfile.mkdtemp(prefix="soar-"))) / f"{name}_verifier.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return f"{file.resolve()}:{name}"


def _source_of(function: Callable[..., Any]) -> str:
    """A file that defines a function typed in a notebook, with what it uses of it: imports, functions, plain constants.

    Raises ConfigError naming what cannot be written down.
    """
    lines: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        home = getattr(value, "__module__", function.__module__)
        if isinstance(value, types.ModuleType):
            lines[name] = f"import {value.__name__} as {name}"
        elif callable(value) and home != function.__module__:
            lines[name] = f"from {home} import {value.__qualname__} as {name}"
        elif callable(value):
            lines[name] = ""  # a function may use itself
            text = inspect.getsource(value)
            for used in sorted(set(re.findall(r"[A-Za-z_]\w*", text)) & function.__globals__.keys() - lines.keys()):
                if not hasattr(builtins, used):
                    add(used, function.__globals__[used])
            del lines[name]
            lines[name] = text
        else:
            ast.literal_eval(repr(value))
            lines[name] = f"{name} = {value!r}"

    try:
        add(function.__name__, function)
    except (OSError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"verifier = {function.__name__}: it uses what cannot be written into a file for the worker processes "
            f"({error}); put it into a file of your own, and name it as 'file.py:function'"
        ) from error
    return "\n\n".join(["from __future__ import annotations", *lines.values(), ""])


def make_config(
    model: str | Path | None = None,
    problems: str | Path | None = None,
    recipe: str | None = None,
    verifier: Verifier | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Config:
    """A config from a recipe and dotted keys, `{"teacher.steps": 40}`. Raises ConfigError as the command line does."""
    given = {
        "model.path": None if model is None else str(model),
        "problems.source": None if problems is None else str(problems),
        "problems.verifier": None if verifier is None else verifier_name(verifier),
    }
    keys = {key: value for key, value in given.items() if value is not None} | dict(settings or {})
    if recipe is None and (model is not None or problems is not None):
        recipe = "small-1gpu"
    # JSON is TOML for texts, numbers, truth values and lists of them.
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    return load(recipe, overrides, model_named=True)


def _write_rows(problems: Sequence[Problem | Mapping[str, Any]], path: Path) -> Path:
    rows = [
        {**p.extra, "id": p.id, "question": p.question, "answer": p.answer} if isinstance(p, Problem) else dict(p)
        for p in problems
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@contextmanager
def _problem_file(problems: Problems | None) -> Iterator[str | Path | None]:
    """The problems as something that a config can name; a list becomes a file for as long as it is needed."""
    if problems is None or isinstance(problems, str | Path):
        yield problems
        return
    with tempfile.TemporaryDirectory() as folder:
        yield _write_rows(problems, Path(folder) / "problems.jsonl")


def screen(
    model: str | Path | None = None,
    problems: Problems | None = None,
    *,
    recipe: str | None = None,
    verifier: Verifier | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[tuple[Problem, Screening]]:
    """How often the base model solves each problem, in `screen.attempts` attempts, all of them. Nothing is written.

    problems: a file, a hub id, `world:NAME`, or a list of problems or rows. Raises UserError as the command line does.
    """
    with _problem_file(problems) as source:
        config = make_config(model, source, recipe, verifier, settings)
        with open_env(config) as env, Progress(quiet=True) as progress:
            problems_H, _ = usable(env, config, candidates(config).problems, progress.say)
            sampling = config.student.sampling.model_copy(update={"temperature": config.screen.temperature})
            attempts, seed = config.screen.attempts, seeds.derive(config.seed, "screen")
            threads = choose_threads(env.backbone, config.threads)
            correct_P_H, cut_P_H = count_correct(env, None, problems_H, attempts, seed, sampling, threads)
    counts = zip(problems_H, correct_P_H[0].tolist(), cut_P_H[0].tolist(), strict=True)
    return [(problem, Screening(correct, attempts, cut)) for problem, correct, cut in counts]


def train(
    model: str | Path | None = None,
    problems: Problems | None = None,
    out: str | Path = "runs/soar",
    *,
    recipe: str | None = None,
    verifier: Verifier | None = None,
    teacher_reward: TeacherReward | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> Trained:
    """A whole run in the folder `out`: screening, outer loop, arms, evaluation, report.

    A list of problems is kept beside the folder as `OUT.problems.jsonl`, a verifier typed in a notebook as
    `NAME_verifier.py`. teacher_reward: what a dataset earns, instead of
    the grounded reward; promotion still goes by measured improvement. Raises UserError as the command line does, among
    them `soar.run.interrupts.Stopped` for a run that pauses at a limit or for a review: call again with resume=True.
    """
    path = Path(out)
    if problems is not None and not isinstance(problems, str | Path):
        problems = _write_rows(problems, path.with_name(f"{path.name}.problems.jsonl"))
    checked_by = None if verifier is None else verifier_name(verifier, path.parent)
    config = make_config(model, problems, recipe, checked_by, settings)
    command = ["soar.train"]
    if teacher_reward is not None:
        if config.teacher.reward != "grounded":
            raise ConfigError(
                f"teacher.reward = {config.teacher.reward!r} and the function teacher_reward both say what the teacher is "
                "paid; leave teacher.reward at 'grounded', or leave out teacher_reward"
            )
        command.append(f"teacher_reward={teacher_reward.__module__}.{teacher_reward.__qualname__}")
    with Progress(quiet=quiet) as progress:
        paid = None if teacher_reward is None else _paid_by(teacher_reward)
        return Trained(path, execute(config, path, resume, command, progress, teacher_reward=paid))


def _paid_by(function: TeacherReward) -> teacher.TeacherReward:
    """The user's reward of every dataset of a step; raises ConfigError for one that is no number."""

    def rewards(question_sets: QuestionSets, measured: teacher.Measurement, step: int) -> list[float | None]:
        paid_G: list[float | None] = []
        for k, questions in enumerate(question_sets.problems_G_Q):
            improvement = measured.improvement_G_R[k][measured.valid_G_R[k]].tolist()
            paid = function(QuestionSet(questions, improvement, measured.baseline, measured.reward_G[k], step, k))
            if paid is not None and not (isinstance(paid, int | float) and abs(paid) < float("inf")):
                raise ConfigError(
                    f"teacher_reward returned {paid!r} for dataset {k} of step {step}: expected a number or None"
                )
            paid_G.append(None if paid is None else float(paid))
        return paid_G

    return rewards


def evaluate(
    model: str | Path | None = None,
    problems: Problems | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    recipe: str | None = None,
    verifier: Verifier | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Evaluation]:
    """pass@k of the base model (`base`) and of adapters of a run, all with the same seeds on the same problems.

    adapters: name -> adapter folder, for example `{"student": "runs/mine/student"}`. The config has to fit the adapters
    (`model.adapter`, `model.lora_rank`). Raises UserError as the command line does.
    """
    with _problem_file(problems) as source:
        config = make_config(model, source, recipe, verifier, settings)
        paths = {name: Path(folder) for name, folder in (adapters or {}).items()}
        with Progress(quiet=True) as progress, progress.task("evaluation", 1) as task:
            result = measure(config, paths, progress.say, task.set)
        by_id = {problem.id: problem for problem in candidates(config).problems}
    problems_H = [by_id[name] for name in result["problems"]["ids"]]
    evaluations = {}
    for name, row in result["policies"].items():
        pass_at = {k: row["pass_at"][str(k)] for k in config.evaluate.ks}
        interval = {k: tuple(row["interval_95"][str(k)]) for k in config.evaluate.ks}
        evaluations[name] = Evaluation(pass_at, interval, row["correct"], problems_H)
    return evaluations
