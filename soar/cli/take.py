"""Commands that take something out of runs: export, eval, student, study, review."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Context, Option

from soar.cli import common
from soar.config import Config, ConfigError
from soar.files import write_json
from soar.plan.forecast import forecast
from soar.report.export import export_adapter, export_questions, push_folder
from soar.report.text import result_lines
from soar.run.folder import ACCEPTED, REJECTED, decide, lines, read, recorded_config
from soar.run.interrupts import resume_command
from soar.run.progress import Progress
from soar.studies.study import cells, find_study, read_study, run_study

_PUSH = "Upload it to this private Hugging Face repository."
_ADAPTER = "Adapter folder, may be repeated; without any, the base model alone."
_ARM = "An arm of arms.run, and what it trains on."
FROM = {"pq": "arms.pq_from", "teacher_t": "arms.teacher_from", "real": "arms.real"}
"""Arm of --train -> the config key for what follows the colon; every pq_* as pq."""


def export(
    run: common.RunFolder,
    form: Annotated[Literal["trl", "verl", "jsonl", "peft"], Option("--format", help="See below.")],
    out: Annotated[Path, Option(help="New folder.")],
    questions: Annotated[Literal["pq", "all"], Option(help="Promotion questions, or all accepted ones.")] = "pq",
    with_hard: Annotated[bool, Option("--with-hard", help="Add the hard training half, as for the arm pq.")] = False,
    policy: Annotated[str, Option(help="Of peft: student, teacher, or an arm such as pq.")] = "student",
    push: Annotated[str | None, Option(metavar="REPO", help=_PUSH)] = None,
) -> None:
    """Questions for TRL and verl; weights for PEFT. Every export holds a card.

    formats:
      trl        train.jsonl with prompt and solution, and reward.py
      verl       train.parquet with verl's five fields, and reward.py
      jsonl      question and answer, for soar itself; the folder is a Hugging Face dataset with its card
      peft       an adapter with tokenizer and card

    examples:
      soar export runs/mine --format verl --with-hard --out questions-verl
      soar export runs/mine --format peft --policy pq --out my-adapter --push me/my-adapter
    """
    peft = form == "peft"
    files = export_adapter(run, out, policy) if peft else export_questions(run, out, form, questions, with_hard)
    print("\n".join(map(str, files)))
    if push is not None:
        print(f"pushed: {push_folder(out, push, 'model' if peft else 'dataset')}")


def eval_(
    recipe: common.Recipe = None,
    model: common.Model = None,
    problems: common.Problems = None,
    sets: common.Sets = None,
    adapter: Annotated[list[Path] | None, Option(help=_ADAPTER)] = None,
    workers: common.Workers = None,
    out: Annotated[Path | None, Option(help="JSON file for the result.")] = None,
    quiet: common.Quiet = False,
) -> None:
    """pass@k of adapters on a problem file (transfer), by the config of the first one's run unless a recipe is named.

    examples:
      soar eval --adapter runs/demo/student --problems runs/demo/hard/test.jsonl --out eval.json
      soar eval --adapter runs/a/student --adapter runs/a/arms/pq --problems olympiad.jsonl
    """
    adapters = {str(folder): folder for folder in adapter or []}
    if problems is None:
        raise ConfigError("--problems: expected the problem file to measure on, for example RUN/hard/test.jsonl")
    for folder in adapters.values():
        if not (folder / "adapter_config.json").is_file():
            raise ConfigError(f"--adapter {folder}: no adapter there (adapter_config.json), for example RUN/student")
    around = adapter[0].resolve().parents[:2] if adapter else ()
    run = next((str(place) for place in around if (place / "manifest.json").is_file()), None)
    unset = ["problems.question_column=", "problems.answer_column=", "problems.limit=0"]  # they are about the run's own
    config = common.config_of(recipe or run, model, problems, [*unset, *common.overrides(sets, workers)])
    with Progress(quiet=quiet) as progress, progress.task("evaluation", 1) as task:
        progress.now(f"loading torch and {config.model.path}, to measure on {config.problems.source}")
        from soar.run.measure import measure

        result = measure(config, adapters, progress.say, task.set)
    print("\n".join(result_lines(result)))
    if out is not None:
        write_json(out, result)
        print(f"result: {out}")


def student(
    context: Context,
    recipe: common.Recipe = None,
    train: Annotated[str | None, Option(metavar="ARM[:PATH]", help=_ARM)] = None,
    out: Annotated[Path | None, Option(help="Folder, in the form of a run folder.")] = None,
    emit: Annotated[Path | None, Option(help="Run folder for the training sets of an outer step, see below.")] = None,
    model: common.Model = None,
    problems: common.Problems = None,
    sets: common.Sets = None,
    steps: Annotated[int | None, Option(help="RLOO steps (arms.steps).")] = None,
    resume: common.Resume = False,
    quiet: common.Quiet = False,
) -> None:
    """Train a fresh student on hard problems, promotion questions, a teacher's questions or a file.

    With --emit begin a run whose students are trained by TRL, verl or prime-rl: it stops with the training sets of an outer
    step in DIR/sets, each with a README.md, and soar measure goes on.

    examples:
      soar student small-1gpu --model MODEL --problems hard.jsonl --emit runs/mine
      soar student tiny --train hard_only --steps 200 --out runs/hard           Hard-Only
      soar student --train pq:runs/demo --steps 100 --out runs/again            promotion questions of a run, its config
      soar student tiny --train real:easier.jsonl --steps 100 --out runs/real   real problems, the upper bound
    """
    folder, own = out or emit, [value is not None for value in (train, out)]
    if folder is None or (emit is not None and (any(own) or steps is not None)) or (emit is None and not all(own)):
        raise BadParameter("expected --train ARM and --out DIR, or --emit DIR (without --steps, which is of --train)")
    if train is not None:
        config = student_config(train, recipe, model, problems, sets or [], steps)
    else:
        values = {"backend__kind": "files", "arms__run": ["base", "ps"], "screen__from_run": common.screening(recipe)}
        config = common.config_of(recipe, model, problems, common.overrides(sets, None, **values))
    common.carry_out(context, config, folder, resume, quiet)
    if train is not None:
        print(f"adapter: {folder / 'arms' / config.arms.run[-1]}; report: {folder / 'report.html'}")


def measure(context: Context, run: common.RunFolder, quiet: common.Quiet = False) -> None:
    """Go on with a run of soar student --emit: read the results of its training sets, emit those of the next outer step.

    A result is a JSON file in RUN/sets/STEP/results: {"set": "0-1", "pass_rate": 0.31}, or "adapter" with a PEFT folder,
    which is measured here, or both.
    """
    config = recorded_config(run)
    if config.backend.kind != "files":
        raise ConfigError(f"{run} was not begun by soar student --emit; continue it with: {resume_command(run)}")
    common.carry_out(context, config, run, True, quiet)


def student_config(
    train: str, recipe: str | None, model: str | None, problems: str | None, overrides: list[str], steps: int | None
) -> Config:
    """The run that trains the student: no outer loop, the arms base and the one of --train. Without a recipe, `pq:RUN` and
    `teacher_t:RUN` take the config of that run, and its screening. Raises ConfigError."""
    arm, _, place = train.partition(":")
    key = FROM.get("pq" if arm.startswith("pq") else arm)
    if bool(key) != bool(place):
        raise ConfigError(f"--train {train!r}: expected {f'{arm}:PATH' if key else arm}")
    values: dict[str, Any] = {"teacher__steps": 0, "arms__pq_steps": 0, "arms__steps": steps}
    values |= {"arms__run": ["base", arm], **({key: place} if key else {})}
    if recipe is None and str(key).endswith("_from") and (Path(place) / "manifest.json").is_file():
        recipe, values["screen__from_run"] = place, common.screening(place)
    return common.config_of(recipe, model, problems, common.overrides(overrides, None, **values))


def study(
    name: Annotated[str, Argument(metavar="STUDY", help="A TOML file or a built-in study.")],
    out: Annotated[Path | None, Option(help="Study folder (default: studies/<name>).")] = None,
    seeds: Annotated[list[int] | None, Option(help="Seed instead of the study's; may be repeated.")] = None,
    sets: common.Sets = None,
    jobs: Annotated[int, Option(help="Cells at a time.")] = 1,
    resume: common.Resume = False,
    collect: Annotated[bool, Option("--collect", help="Only write the results of the cells in --out.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the cells and their costs, run nothing.")] = False,
) -> int:
    """Variants x seeds, every cell a run folder: one table, one page.

    examples:
      soar study finding1 --out studies/finding1 --jobs 2       --resume continues it
      soar study null --seeds 0 --seeds 1 --set model.path=my-model --set problems.source=hard.jsonl --out studies/null
    """
    plan = read_study(find_study(name), seeds)
    out, overrides = out or Path("studies") / plan.name, sets or []
    if dry_run:
        for cell in cells(plan, out, overrides):
            print(f"{cell.name}: {' '.join(cell.overrides)}\n{forecast(cell.config).total_line()}")
        return 0
    with common.waiting(f"cells of {plan.name} in {out}"):
        results = run_study(plan, out, overrides, resume or collect, max(1, jobs), not collect)
    print((out / "study.md").read_text(encoding="utf-8"))
    print(f"page: {out / 'study.html'}")
    return int(any(cell["state"] != "finished" for cell in results["cells"]))


def review(
    run: common.RunFolder,
    accept: Annotated[bool, Option("--accept", help="Accept the promotion that waits.")] = False,
    reject: Annotated[bool, Option("--reject", help="Reject it.")] = False,
    by: Annotated[str | None, Option(metavar="NAME", help="Who decides (default: your login name).")] = None,
) -> None:
    """Show a promotion that waits for a person, accept or reject it.

    A run with promotion.review = true (--review) stops at every promotion. This shows its questions and their effect on
    hard problems, and takes the decision; the run goes on with soar run --out RUN --resume.
    """
    if accept and reject:
        raise BadParameter("--accept and --reject exclude each other")
    if accept or reject:
        decide(run, ACCEPTED if accept else REJECTED, by or os.environ.get("USER", "unknown"))
    print("\n".join(lines(read(run))))
    if accept or reject:
        print(f"continue with: {resume_command(run)}")
