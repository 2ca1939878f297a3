"""The Python interface: `soar.check`, `screen`, `train`, `arms` and `evaluate`, as short as the command line.

Each takes a model (folder, hub id, or a loaded one with its tokenizer), problems (file, hub id, `world:NAME`, DataFrame,
`datasets.Dataset`, list of dicts or of `Problem`), a recipe for what is not said, and any config key in `settings`. A
verifier or a teacher reward can be a function. What they return prints, and plots with `.plot()`. They raise UserError.
"""

import ast
import builtins
import filecmp
import inspect
import json
import math
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

from soar.config import ELSEWHERE, Config, ConfigError, flat, load
from soar.files import read_object, scrub, storage_errors
from soar.loop import teacher
from soar.plan.check import Finding, can_work, check_all, summary
from soar.plan.forecast import announce
from soar.problems.pool import refuse_in_worker
from soar.report.page import Chart, Shown, arms_section, bar_chart, loop_section, pass_at_chart
from soar.report.runs import Run, read_arm, read_run
from soar.report.text import result_table
from soar.run.folder import RunFolder
from soar.run.pipeline import execute, measure
from soar.run.progress import Progress
from soar.run.screen import screen_folder
from soar.types import Problem, Screening

Model = Any  # str | Path | transformers.PreTrainedModel
Problems = str | Path | Iterable[Problem | Mapping[str, Any]] | None  # or a pandas.DataFrame
Verifier = str | Callable[..., Any]


class Options(TypedDict, total=False):
    """What every function takes by name beside its own arguments.

    tokenizer: of a loaded model. recipe: what is not said (default: small-1gpu). verifier: a built-in one,
    `file.py:function` or a function. settings: any config key. quiet: keep progress off standard error.
    """

    tokenizer: Any
    recipe: str | Path | None
    verifier: Verifier | None
    settings: Mapping[str, Any] | None
    quiet: bool


@dataclass(frozen=True, repr=False)
class Checked(Shown):
    """What `check` found. works: None where there was no time to say."""

    findings: list[Finding]

    @property
    def works(self) -> bool | None:
        return can_work(self.findings)

    def __repr__(self) -> str:
        return "\n".join([*(line for finding in self.findings for line in finding.lines()), summary(self.findings)])

    def charts(self) -> list[Chart]:
        counts = next((finding.counts for finding in self.findings if finding.counts), {})
        return [bar_chart("check", "Attempts of the student, and why they earned nothing", "", "attempts", counts)]


class Screened(Shown, list[tuple[Problem, Screening]]):
    """Every usable problem with its counts. hard: those that are hard; table: what `soar screen` prints."""

    hard: list[Problem]

    def charts(self) -> list[Chart]:
        tenths = Counter(min(9, int(10 * counts.pass_rate)) if counts.successes else -1 for _, counts in self)
        names = {-1: "0", **{tenth: f"to .{tenth + 1}" for tenth in range(9)}, 9: "to 1"}
        counts = {name: tenths[tenth] for tenth, name in names.items()}
        return [bar_chart("screened", "How often problems are solved", "share of the attempts", "problems", counts)]


class Evaluations(Shown, dict[str, dict[str, Any]]):
    """Policy -> `pass_at` and `interval_95` by k as text ("1"), `correct` attempts of each problem, and more.

    problems: what was asked, in the order of `correct`; table: what `soar eval` prints.
    """

    problems: list[Problem]

    def charts(self) -> list[Chart]:
        return [pass_at_chart("pass@k", [(name, read_arm(name, row)) for name, row in self.items()])]


@dataclass(frozen=True, repr=False)
class Trained(Shown):
    """A finished run. path: its folder; summary: summary.json; student, teacher: PEFT adapter folders; report: the page."""

    path: Path
    summary: dict[str, Any]
    student = property(lambda self: self.path / "student")
    teacher = property(lambda self: self.path / "teacher")
    report = property(lambda self: self.path / "report.html")

    @property
    def run(self) -> Run:
        """Everything in the run folder: events, questions, hard problems."""
        return read_run(self.path)

    def __repr__(self) -> str:
        return f"{result_table(self.summary)}\nreport: {self.report}"

    def charts(self) -> list[Chart]:
        run = self.run
        return [*arms_section(run)["charts"], *loop_section(run)["charts"]]

    def pass_at(self, arm: str, k: int = 1) -> float:
        """Held-out pass@k of an arm (`base`, `hard_only`, `ps`, `pq`) as a share."""
        if str(k) not in (arms := self.summary["arms"]).get(arm, {}).get("pass_at", ()):
            there = ", ".join(f"{name} (k = {', '.join(row['pass_at'])})" for name, row in arms.items())
            raise ConfigError(f"{self.path} has no pass@{k} of an arm {arm!r}; it has {there}")
        return float(arms[arm]["pass_at"][str(k)])


def keep(place: Path, name: str, write: Callable[[Path], object], undo: ExitStack) -> Path:
    """Write `place`.NAME, a file or a folder; `undo` removes a new one. Raises ConfigError if a run began with another."""
    path = place.with_name(f"{place.name}.{name}")
    begun = path.exists() and (place / "manifest.json").is_file()
    for new in (new for new in reversed([path, *path.parents]) if not (new.exists() or new.is_symlink())):
        undo.callback(_take_back, new, place)
    with tempfile.TemporaryDirectory() as scratch:
        new = Path(scratch) / path.name if begun else path
        new.parent.mkdir(parents=True, exist_ok=True)
        write(new)
        files = [file for file in (new, *new.rglob("*")) if file.is_file() and not file.name.endswith("config.json")]
        names = [str(file.relative_to(new.parent)) for file in files]  # configs name the version that wrote them
        if begun and any(filecmp.cmpfiles(scratch, path.parent, names, shallow=False)[1:]):
            raise ConfigError(f"{place} holds a run that began with another {path}; give that one, or another `out`")
    return path


def _take_back(path: Path, place: Path) -> None:
    """Remove what a refused call made: not what the run in `place` names, nor a folder with something else in it."""
    with suppress(OSError):
        if path in place.parents:
            path.rmdir()
        elif _json(scrub(path.name))[1:-1] not in _json(read_object(place / "manifest.json")[0].get("config")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def verifier_name(verifier: Verifier, place: Path, undo: ExitStack) -> str:
    """The config's name of a verifier: itself, or `file.py:function` of a function, which worker processes import.

    A function typed in a notebook is kept as `place`.NAME_verifier.py, with what it uses of the notebook (`keep`). Raises
    ConfigError for one that has no name there (a lambda, a method) or cannot be written down.
    """
    if isinstance(verifier, str):
        return verifier
    name = getattr(verifier, "__qualname__", repr(verifier))
    if not name.isidentifier() or not inspect.isfunction(verifier):
        expected = "expected a function at the top level of a file or notebook, since worker processes import it by"
        raise ConfigError(f"verifier = {name}: {expected} name; give it a name there, or name it as 'file.py:function'")
    file = Path(inspect.getfile(verifier))
    if not file.is_file():
        lines = dict[str, str]()
        try:
            _add(name, verifier, verifier.__globals__, lines)
        except (OSError, TypeError, ValueError, SyntaxError) as error:
            found = f"it uses what cannot be written into a file for the worker processes ({error})"
            advice = "define that within the function, or put it into a file of your own"
            raise ConfigError(f"verifier = {name}: {found}; {advice}, and name it as 'file.py:function'") from error
        text = "\n\n".join(["from __future__ import annotations", *lines.values(), ""])
        file = keep(place, f"{name}_verifier.py", lambda path: path.write_text(text, encoding="utf-8"), undo)
    return f"{file.resolve()}:{name}"


def _add(name: str, value: Any, scope: Mapping[str, Any], lines: dict[str, str]) -> None:
    """Add what defines a name of a notebook, after what that uses of it: imports, functions and plain constants."""
    home, full_name = str(getattr(value, "__module__", "")), str(getattr(value, "__qualname__", ""))
    if inspect.ismodule(value):
        lines[name] = f"import {value.__name__} as {name}"
    elif home == scope["__name__"] and (inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value))):
        source, lines[name] = inspect.getsource(value), ""  # a function may use itself
        used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        for other in sorted((used & scope.keys()) - lines.keys() - vars(builtins).keys()):
            _add(other, scope[other], scope, lines)
        lines[name] = f"{lines.pop(name)}{source}"
    elif home != scope["__name__"] and getattr(sys.modules.get(home), full_name, None) is value:
        lines[name] = f"from {home} import {full_name} as {name}"
    elif callable(value):
        raise ValueError(f"{name} = {value!r:.100}")
    else:
        ast.literal_eval(repr(value))
        lines[name] = f"{name} = {value!r}"


def _json(value: Any) -> str:
    """JSON of plain values, of arrays and their numbers (as lists and numbers), and of anything else as text."""
    return json.dumps(value, ensure_ascii=False, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))


def _row(row: Any) -> dict[str, Any]:
    if isinstance(row, Problem):
        return {**row.extra, "id": row.id, "question": row.question, "answer": row.answer}
    if not isinstance(row, Mapping):
        expected = "a dict (question, answer) or a soar.Problem; columns go in as a pandas.DataFrame"
        raise ConfigError(f"problems: found a row {row!r:.60}, expected {expected}")
    return {key: None if isinstance(value, float) and value != value else value for key, value in row.items()}


def _named(what: str, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping | None):
        return dict(given or {})
    example = {"settings": "{'teacher.steps': 40}", "adapters": "{'student': 'runs/mine/student'}"}[what]
    raise ConfigError(f"{what}: found {given!r:.60}, expected a dict, as {example}")


@contextmanager
def _call(
    model: Model, problems: Problems, given: Options, beside: Path | None = None
) -> Iterator[tuple[Config, Progress]]:
    """The config of a call. What is in memory is written to files while it is needed, or for good as `beside`.NAME."""
    refuse_in_worker()
    if unknown := sorted(given.keys() - Options.__annotations__.keys()):
        raise ConfigError(f"{unknown[0]!r}: expected {', '.join(Options.__annotations__)}; settings takes config keys")
    recipe, verifier, tokenizer = given.get("recipe"), given.get("verifier"), given.get("tokenizer")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as undo:
        place = Path(scratch) / "call" if beside is None else beside if beside.name else beside.absolute()
        with storage_errors(place, "Choose another `out`, or permit writing there"):
            if problems is not None and not isinstance(problems, str | Path):
                frame: Any = problems
                rows = frame.to_dict("records") if hasattr(frame, "columns") and hasattr(frame, "to_dict") else problems
                lines = "".join(f"{_json(_row(row))}\n" for row in rows).encode("utf-8", "backslashreplace")
                problems = keep(place, "problems.jsonl", lambda path: path.write_bytes(lines), undo)
            if model is not None and not isinstance(model, str | Path):
                if tokenizer is None or hasattr(model, "peft_config"):
                    why = "without tokenizer=" if tokenizer is None else "with adapters: give model.merge_and_unload()"
                    raise ConfigError(f"model: a loaded {type(model).__name__} {why}")
                parts = (model, tokenizer)
                model = keep(place, "model", lambda path: [part.save_pretrained(path) for part in parts], undo)
            verifier = None if verifier is None else verifier_name(verifier, place, undo)
        values = {"model.path": model, "problems.source": problems, "problems.verifier": verifier}
        keys: dict[str, Any] = {key: str(value) for key, value in values.items() if value is not None}
        keys |= flat(_named("settings", given.get("settings")))
        recipe = str(recipe) if recipe else None if model is None and problems is None else "small-1gpu"
        # JSON is TOML for texts, numbers, truth values and lists of them; "" stands for None.
        overrides = [f"{key}={_json('' if value is None else value)}" for key, value in keys.items()]
        config = load(recipe, overrides, model_named=True)
        with Progress(quiet=given.get("quiet", False)) as progress:
            yield config, progress
        undo.pop_all()  # nothing was refused


def check(model: Model = None, problems: Problems = None, *, samples: int = 64, **options: Unpack[Options]) -> Checked:
    """Whether a run can work, why rewards are 0, and what to do, without training (`soar check`)."""
    with _call(model, problems, options) as (config, progress):
        return Checked(list(check_all(config, samples, progress.now)))


def screen(
    model: Model = None,
    problems: Problems = None,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    **options: Unpack[Options],
) -> Screened:
    """How often the base model solves each problem, in `screen.attempts` attempts.

    out: the folder of `soar screen`, which goes on with resume=True; without it nothing is kept.
    """
    beside = None if out is None else Path(out)
    with _call(model, problems, options, beside) as (config, progress), tempfile.TemporaryDirectory() as scratch:
        place = beside or Path(scratch) / "screen"
        with RunFolder(place, config, ["soar.screen"], resume, progress.insist) as folder:
            progress.now(f"loading {config.model.path}")
            table, rows = screen_folder(folder, config, progress)
    if not rows:
        raise ConfigError("no problem can be used, so there is nothing to screen; the lines `left out` above say why")
    screened, most = Screened(rows), config.screen.max_successes
    screened.hard, screened.table = [p for p, count in screened if count.successes <= most], "\n".join(table)
    return screened


def train(
    model: Model = None,
    problems: Problems = None,
    out: str | Path = "runs/soar",
    *,
    teacher_reward: teacher.TeacherReward | None = None,
    resume: bool = False,
    **options: Unpack[Options],
) -> Trained:
    """A whole run in the folder `out`: screening, outer loop, arms, evaluation, report.

    What is in memory is kept beside it (`OUT.problems.jsonl`, `OUT.model`, `OUT.NAME_verifier.py`). teacher_reward: what a
    dataset earns, in place of `teacher.reward`, from `soar.loop.write.QuestionSets`, `soar.loop.teacher.Measurement` and the
    number of the outer step (None: nothing); promotion still goes by measured improvement. Raises
    `soar.run.interrupts.Stopped` for a run that pauses at a limit or for a review: call again with resume=True.
    """
    path, command, paid = Path(out), ["soar.train"], None
    if teacher_reward is not None:
        try:
            with suppress(ValueError):  # of one that does not say what it takes
                inspect.signature(teacher_reward, follow_wrapped=False).bind("question sets", "measured", "step")
        except TypeError as error:
            found = f"found {teacher_reward!r:.60}, expected a function of three arguments"
            raise ConfigError(f"teacher_reward: {found} (question sets, measurement, step): {error}") from error
        command.append(f"teacher_reward={getattr(teacher_reward, '__qualname__', repr(teacher_reward))}")
        paid = partial(_paid, teacher_reward)
    with _call(model, problems, options, path) as (config, progress):
        with RunFolder(path, config, command, resume, progress.insist) as folder:
            announce(progress, config)
            trained = Trained(path, execute(folder, config, progress, teacher_reward=paid))
        for message in trained.run.left_out if progress.quiet else ():
            warnings.warn(message, stacklevel=2)
        return trained


def _paid(function: teacher.TeacherReward, question_sets: Any, *measured: Any) -> list[float | None]:
    """The user's reward of every dataset of a step. Raises ConfigError for one that is no number."""
    given, sets = function(question_sets, *measured), len(question_sets.problems_G_Q)
    paid_G = list(given) if isinstance(given, Iterable) else []
    usable = all(paid is None or (isinstance(paid, int | float) and math.isfinite(paid)) for paid in paid_G)
    if not usable or len(paid_G) != sets:
        raise ConfigError(f"teacher_reward returned {given!r}: expected a number or None for each of {sets} datasets")
    return paid_G


def arms(
    model: Model = None,
    problems: Problems = None,
    out: str | Path = "runs/arms",
    names: Sequence[str] = ("hard_only",),
    **options: Any,
) -> Trained:
    """Train and measure arms side by side with the base model, without an outer loop (`soar student`).

    names: as in `arms.run`. Questions or the teacher of another run: settings={"arms.pq_from": RUN} or
    {"arms.teacher_from": RUN}; a file of easier problems: {"arms.real": FILE}. options: as of `train`.
    """
    fixed = {"teacher.steps": 0, "arms.run": ["base", *([names] if isinstance(names, str) else names)]}
    settings = {"arms.pq_steps": 0, **_named("settings", options.pop("settings", None)), **fixed}
    return train(model, problems, out, settings=settings, **options)


def evaluate(
    model: Model = None,
    problems: Problems = None,
    adapters: Mapping[str, str | Path] | None = None,
    **options: Unpack[Options],
) -> Evaluations:
    """pass@k of the base model (`base`) and of adapters of a run, all with the same seeds on the same problems.

    adapters: name -> adapter folder, for example `{"student": "runs/mine/student"}`. The config has to fit the adapters
    (`model.adapter`, `model.lora_rank`).
    """
    paths = {name: Path(folder) for name, folder in _named("adapters", adapters).items()}
    unset = {} if problems is None else ELSEWHERE
    options["settings"] = {**unset, **_named("settings", options.get("settings")), "arms.run": []}
    with _call(model, problems, options) as (config, progress):
        progress.now(f"loading {config.model.path}, to measure on {config.problems.source}", tell=False)
        result, asked = measure(config, paths, progress)
    evaluations = Evaluations(result["policies"])
    evaluations.problems, evaluations.table = asked, result_table(result, asked=config.evaluate.ks)
    return evaluations
