"""Commands that take something out of runs: export, eval, student, study, review."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from typer import Argument, BadParameter, Context, Option

from soar.cli.common import (
    Model,
    Problems,
    Quiet,
    Recipe,
    Resume,
    RunFolder,
    Sets,
    Workers,
    carry_out,
    config_of,
    workers_overrides,
)  # fmt: skip
from soar.config import Config, ConfigError, TrainedArm
from soar.files import write_json
from soar.report.text import difference_lines, share

Format = Literal["trl", "verl", "verifiers", "jsonl", "peft", "merged"]
POLICIES = ("student", "teacher", *get_args(TrainedArm))
ARMS = {
    "hard": ("hard_only", None),
    **{name: (name, "arms.pq_from") for name in get_args(TrainedArm) if name.startswith("pq")},
    "teacher": ("teacher_t", "arms.teacher_from"),
    "untrained": ("base_t", None),
    "file": ("real", "arms.real"),
    "real": ("real", None),
}
"""What --train may say -> the arm, and the config key that the part after the colon is for."""


def export(
    run: RunFolder,
    form: Annotated[Format, Option("--format", help="See below.")],
    out: Annotated[Path, Option(help="New folder.")],
    questions: Annotated[Literal["pq", "all"], Option(help="Promotion questions, or all accepted ones.")] = "pq",
    with_hard: Annotated[
        bool, Option("--with-hard", help="Add the hard training half, as the arm pq trains on.")
    ] = False,
    policy: Annotated[str, Option(help="Of peft and merged: student, teacher, or an arm such as pq.")] = "student",
) -> None:
    """Questions for TRL, verl, verifiers; weights for PEFT.

    formats:
      trl        train.jsonl with prompt and solution, and reward.py
      verl       train.parquet with verl's five fields, and reward.py
      verifiers  an environment package for verifiers and prime-rl
      jsonl      question and answer, for soar itself; the folder is a Hugging Face dataset with its card
      peft       an adapter with tokenizer and card
      merged     base model and adapter as one model

    examples:
      soar export runs/mine --format trl --out questions-trl
      soar export runs/mine --format verl --with-hard --out questions-verl
      soar export runs/mine --format merged --policy pq --out my-model
    """
    if policy not in POLICIES:
        raise BadParameter(f"--policy {policy}: expected one of {', '.join(POLICIES)}")
    if form in ("peft", "merged"):
        from soar.report.export import export_adapter, export_merged

        files = (export_adapter if form == "peft" else export_merged)(run, out, policy)
    else:
        from soar.report.export import export_questions

        files = export_questions(run, out, form, questions, with_hard)
    print("\n".join(map(str, files)))


def evaluate(
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    sets: Sets = None,
    adapter: Annotated[list[Path] | None, Option(help="Adapter folders; without any, the base model alone.")] = None,
    workers: Workers = None,
    out: Annotated[Path | None, Option(help="JSON file for the result.")] = None,
    quiet: Quiet = False,
) -> None:
    """pass@k of adapters on a problem file (transfer).

    examples:
      soar eval --adapter runs/demo/student --problems runs/demo/hard/test.jsonl --out eval.json
      soar eval --adapter runs/a/student runs/a/arms/pq --problems olympiad.jsonl --set evaluate.attempts=64
    """
    config = evaluation_config(recipe, model, problems, [*(sets or []), *workers_overrides(workers)], adapter or [])
    from soar.run.measure import measure
    from soar.run.progress import Progress

    adapters = {str(folder): folder for folder in adapter or []}
    with Progress(quiet=quiet) as progress, progress.task("evaluation", 1) as task:
        result = measure(config, adapters, progress.say, task.set)
    print("\n".join(result_lines(result, config.evaluate.ks)))
    if out is not None:
        write_json(out, result)
        print(f"result: {out}")


def evaluation_config(
    recipe: str | None, model: str | None, problems: str | None, overrides: list[str], adapters: list[Path]
) -> Config:
    """Config of the measurement: that of the run which the first adapter lies in, unless a recipe is named.

    The run's problem columns and limit are about its own problems, so they are not used. Raises ConfigError.
    """
    if problems is None:
        raise ConfigError("--problems: expected the problem file to measure on, for example RUN/hard/test.jsonl")
    for folder in adapters:
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"--adapter {folder}: no adapter there (adapter_config.json), for example RUN/student")
    around = adapters[0].resolve().parents[:2] if adapters and recipe is None else ()
    run = next((str(place) for place in around if (place / "manifest.json").is_file()), None)
    config = config_of(recipe or run, model, problems, overrides)
    unset: dict[str, Any] = {"question_column": None, "answer_column": None, "limit": 0}
    given = {text.partition("=")[0].strip().removeprefix("problems.") for text in overrides}
    kept = {key: value for key, value in unset.items() if key not in given}
    return config.model_copy(update={"problems": config.problems.model_copy(update=kept)})


def result_lines(result: dict[str, Any], ks: tuple[int, ...]) -> list[str]:
    """pass@k of every policy as a small table; differences from the base model below."""
    width = max(len(name) for name in result["policies"])
    lines = [f"{result['problems']['count']} problems, {result['attempts']} attempts each"]
    lines.append(f"{'policy':{width}s}  " + "  ".join(f"{'pass@' + str(k):>23}" for k in ks))
    for name, row in result["policies"].items():
        lines.append(f"{name:{width}s}  " + "  ".join(share(row, k) for k in ks))
    return [*lines, *difference_lines(result["paired"])]


def student(
    context: Context,
    train: Annotated[str, Option(metavar="SET", help=f"One of {', '.join(ARMS)}; with :PATH where due.")],
    out: Annotated[Path, Option(help="Folder, in the form of a run folder.")],
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    sets: Sets = None,
    steps: Annotated[int | None, Option(help="RLOO steps (arms.steps).")] = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Train a fresh student on hard problems, promotion questions, a teacher's questions or a file.

    examples:
      soar student tiny --train hard --steps 200 --out runs/hard                Hard-Only
      soar student --train pq:runs/demo --steps 100 --out runs/again            promotion questions of a run, its config
      soar student --train teacher:runs/demo --steps 100 --out runs/taught      128 questions of its trained teacher
      soar student tiny --train file:easier.jsonl --steps 100 --out runs/real   real problems, the upper bound
    """
    config = student_config(train, recipe, model, problems, sets or [], steps)
    carry_out(context, config, out, resume, quiet)
    print(f"adapter: {out / 'arms' / config.arms.run[-1]}; report: {out / 'report.html'}")


def student_config(
    train: str, recipe: str | None, model: str | None, problems: str | None, overrides: list[str], steps: int | None
) -> Config:
    """The run that trains the student: no outer loop, the arms base and the one of --train. Raises ConfigError.

    Without a recipe, `pq:RUN` and `teacher:RUN` take the config of that run, and its screening.
    """
    kind, _, place = train.partition(":")
    if kind not in ARMS:
        raise ConfigError(f"--train {train!r}: expected one of {', '.join(ARMS)}")
    arm, key = ARMS[kind]
    if bool(key) != bool(place):
        raise ConfigError(f"--train {train!r}: expected {f'{kind}:PATH' if key else kind}")
    first = ["teacher.steps=0", f'arms.run=["base", "{arm}"]', "arms.pq_steps=0"]
    if key:
        first.append(f"{key}={json.dumps(place)}")
    if key in ("arms.pq_from", "arms.teacher_from") and recipe is None and (Path(place) / "manifest.json").is_file():
        recipe = place
        if (Path(place) / "hard" / "screen.jsonl").is_file():
            first.append(f"screen.from_run={json.dumps(place)}")
    if steps is not None:
        first.append(f"arms.steps={steps}")
    return config_of(recipe, model, problems, [*first, *overrides])


def study(
    name: Annotated[str, Argument(metavar="STUDY", help="A TOML file or a built-in study.")],
    out: Annotated[Path | None, Option(help="Study folder (default: studies/<name>).")] = None,
    seeds: Annotated[list[int] | None, Option(help="Seeds instead of the study's.")] = None,
    sets: Sets = None,
    jobs: Annotated[int, Option(help="Cells at a time.")] = 1,
    resume: Resume = False,
    collect: Annotated[bool, Option("--collect", help="Only write the results of the cells in --out.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the cells and their costs, run nothing.")] = False,
) -> int:
    """Variants x seeds, every cell a run folder: one table, one page.

    examples:
      soar study finding1 --out studies/finding1 --jobs 2
      soar study finding1 --out studies/finding1 --resume
      soar study null --seeds 0 1 2 --set model.path=my-model --set problems.source=hard.jsonl --out studies/null
    """
    from soar.studies.study import cells, find_study, read_study

    plan = read_study(find_study(name))
    if seeds:
        plan = type(plan).model_validate({**plan.model_dump(), "seeds": seeds})
    out, overrides = out or Path("studies") / plan.name, sets or []
    if dry_run:
        from soar.plan.forecast import forecast

        hours = list[float | None]()
        for cell in cells(plan, out, overrides):
            expected = forecast(cell.config)
            hours.append(expected.hours())
            print(f"{cell.name}: {' '.join(cell.overrides)}\n{expected.total_line()}")
        known = [h for h in hours if h is not None]
        print(f"in all {len(hours)} cells" + (f", {sum(known):,.1f} device-hours" if len(known) == len(hours) else ""))
        return 0
    from soar.studies.study import run_study

    results = run_study(plan, out, overrides, resume or collect, max(1, jobs), not collect)
    print((out / "study.md").read_text(encoding="utf-8"))
    print(f"page: {out / 'study.html'}")
    return int(any(cell["state"] != "finished" for cell in results["cells"]))


def review(
    run: RunFolder,
    accept: Annotated[bool, Option("--accept", help="Accept the promotion that waits.")] = False,
    reject: Annotated[bool, Option("--reject", help="Reject it.")] = False,
    by: Annotated[str | None, Option(metavar="NAME", help="Who decides (default: your login name).")] = None,
) -> None:
    """Show a promotion that waits for a person, accept or reject it.

    A run with promotion.review = true (--review) stops at every promotion. This shows the questions and their effect on
    hard problems, and takes the decision; then continue the run with --resume.

    examples:
      soar review runs/mine                       the promotion that waits, with its questions
      soar review runs/mine --accept              or --reject; then soar run --out runs/mine --resume
    """
    from soar.run import folder
    from soar.run.interrupts import resume_command

    if accept and reject:
        raise BadParameter("--accept and --reject exclude each other")
    if accept or reject:
        folder.decide(run, folder.ACCEPTED if accept else folder.REJECTED, by or _login())
    print("\n".join(folder.lines(folder.read(run))))
    if accept or reject:
        print(f"continue with: {resume_command(run)}")


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password file
        return "unknown"
