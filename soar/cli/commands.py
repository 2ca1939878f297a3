"""The commands: each reads its options, makes a config of them, and calls the rooms. First what they share."""

import json
import os
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from typer import Argument, BadParameter, Context, Option

from soar.cli.grade import grade_file
from soar.config import ELSEWHERE, Config, ConfigError, find_recipe, load
from soar.files import check_place, scrub, shell_words, storage_errors, visible, write_atomic, write_json
from soar.plan.check import can_work, check_all, check_data, summary
from soar.plan.forecast import announce, forecast, memory_lines
from soar.problems.domain import domain_of
from soar.problems.pool import make_pool
from soar.problems.sources import file_rows, split_source
from soar.report.export import export_adapter, export_questions, push_folder
from soar.report.page import write_report
from soar.report.runs import read_run
from soar.report.text import fill, result_table
from soar.report.watch import follow, web_server
from soar.run import folder as folders
from soar.run.interrupts import StopRequest, resume_command
from soar.run.progress import Progress
from soar.studies.study import DEFINITION, cells, read_study, run_study
from soar.types import UserError, Verdict

_RECIPE = "TOML file, recipe, or run folder for its config (run: demo; own model or problems: small-1gpu; else: tiny)."
_PROBLEMS = "Problem file, dataset id, world:NAME, reasoning_gym:NAME or verifiers:NAME (problems.source)."
_WORKERS = "Share the work among N processes here, or those of a Ray cluster (auto, HOST:PORT, ray://HOST:PORT)."
Recipe = Annotated[str | None, Argument(help=_RECIPE)]
Sets = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Override a config key; may be repeated.")]
Model = Annotated[str | None, Option(help="Folder or hub id of a causal language model (model.path).")]
Problems = Annotated[str | None, Option(help=_PROBLEMS)]
Verifier = Annotated[str | None, Option(help="A built-in one, or file.py:function (problems.verifier).")]
Workers = Annotated[str | None, Option(metavar="N|ADDRESS", help=_WORKERS)]
Resume = Annotated[bool, Option("--resume", help="Continue what was begun in --out.")]
Quiet = Annotated[bool, Option("--quiet", help="Print the result only.")]
RunPath = Annotated[Path, Argument(metavar="RUN", help="Run folder.")]


def overriding(sets: list[str] | None, workers: str | None = None, **values: Any) -> list[str]:
    """`KEY=VALUE` of every option given (`section__key`; not None or False), then those of --set. Raises ConfigError."""
    if workers is not None and not workers.isdecimal() and workers != "auto" and ":" not in workers:
        forms = "the address of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT"
        more = "how many of them on a cluster says --set cluster.workers=N"
        raise ConfigError(f"--workers {workers!r}: expected a number of processes, or {forms}; {more}")
    if workers is not None:
        values |= {"cluster__workers": int(workers)} if workers.isdecimal() else {"cluster__address": workers}
    given = {key.replace("__", "."): value for key, value in values.items() if value is not None and value is not False}
    return [*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items()), *(sets or [])]


def config_of(
    recipe: str | None, model: str | None, problems: str | None, overrides: list[str], model_named: bool = True
) -> Config:
    """Config of a recipe, by default `small-1gpu` for a model or problems of one's own, else `tiny`. Raises ConfigError."""
    if recipe is None and (model or problems):
        recipe = "small-1gpu"
    return load(recipe, overriding(overrides, model__path=model, problems__source=problems), model_named)


def screening(recipe: str | None) -> str | None:
    """The run folder given as a recipe, when it holds a screening."""
    return recipe if recipe and (Path(recipe) / folders.EVIDENCE).is_file() else None


def before_torch(progress: Progress, config: Config, purpose: str) -> None:
    """Say what is loaded from here on, and for what. Raises DataError for a problem file that cannot be read."""
    if split_source(config.problems.source)[0] == "file":
        file_rows(config.problems.source)
    progress.now(f"loading torch and {config.model.path}, {purpose} {config.problems.source}")


def carry_out(context: Context, config: Config, out: Path, resume: bool, quiet: bool) -> None:
    """Carry a run out in the folder `out` and print its summary. context.obj: the command as it was given."""
    with (
        Progress(quiet=quiet) as progress,
        StopRequest().on_signals(progress.insist) as stop,
        folders.RunFolder(out, config, context.obj, resume, progress.insist) as folder,
    ):
        announce(progress, config)
        from soar.run.pipeline import execute

        summary = execute(folder, config, progress, stop)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(result_table(summary, width))


HOW_READ = ("problems.source", "problems.limit", "problems.question_column", "problems.answer_column")
_ADAPTER = "Adapter folder, may be repeated; without any, the base model alone."
PATH_KEYS = {"pq": "arms.pq_from", "teacher_t": "arms.teacher_from", "real": "arms.real"}  # --train ARM:PATH


def run(
    context: Context,
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    verifier: Verifier = None,
    sets: Sets = None,
    out: Annotated[Path | None, Option(help="Run folder (default: runs/<name of the recipe>).")] = None,
    resume: Resume = False,
    review: Annotated[bool, Option("--review", help="Hold every promotion for soar review.")] = False,
    workers: Workers = None,
    max_hours: Annotated[float | None, Option(help="Pause after so many hours of this process.")] = None,
    max_tokens: Annotated[int | None, Option(help="Pause after so many sampled tokens in all.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print config and forecast, run nothing.")] = False,
    quiet: Quiet = False,
) -> int:
    """Screen, outer loop, arms, evaluation, report.

    The run is saved when it stops at a limit (0: no limit), and goes on with --resume.

    examples:
      soar run                                        the demo: an embedded world, on two CPU cores
      soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --out runs/qwen
      soar run --out runs/mine --max-hours 8          pause in time; --resume continues
    """
    limits = {"limits__max_hours": max_hours, "limits__max_tokens": max_tokens}
    overrides = overriding(sets, workers, problems__verifier=verifier, promotion__review=review, **limits)
    if resume and not (recipe or model or problems):
        config = folders.recorded_config(out or Path("runs/demo"), overrides)
    else:
        recipe = recipe or (None if model or problems else "demo")
        config = config_of(recipe, model, problems, overrides)
    out = out or Path("runs") / config.name
    if not dry_run:
        carry_out(context, config, out, resume, quiet)
        print(f"report: {out / 'report.html'}")
        return 0
    findings = [] if split_source(config.problems.source)[0] == "hub" else list(check_data(config))  # without a network
    lines = [line for finding in findings for line in finding.lines()] + memory_lines(config)
    lines += [*forecast(config).lines(), *([summary(findings)] if findings else [])]
    print("\n".join([json.dumps(scrub(config.resolved()), indent=2), *lines]))
    return int(can_work(findings) is False)


def screen(
    context: Context,
    out: Annotated[Path, Option(help="Folder for evidence, hard set and table.")],
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    verifier: Verifier = None,
    sets: Sets = None,
    attempts: Annotated[int | None, Option(metavar="K", help="Attempts at each problem (screen.attempts).")] = None,
    workers: Workers = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Find the problems that a model never solves (fail@K).

    example:
      soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen
    """
    overrides = overriding(sets, workers, problems__verifier=verifier, screen__attempts=attempts)
    config = config_of(recipe, model, problems, overrides)
    again = scrub(shell_words(*context.obj, *([] if resume else ["--resume"])))
    with (
        Progress(quiet=quiet) as progress,
        StopRequest().on_signals(progress.insist) as stop,
        folders.RunFolder(out, config, context.obj, resume, progress.insist) as folder,
    ):
        before_torch(progress, config, "to screen")
        from soar.run.screen import screen_folder

        lines, _ = screen_folder(folder, config, progress, lambda *_: stop.check(f": {again}"))
    print("\n".join([*lines, f"evidence: {out / folders.EVIDENCE}"]))
    hard = out / "hard.jsonl"
    if hard.exists():  # the run that uses it: the same recipe and keys, but for those that say how the file was read
        words = ["soar", "run", *([recipe] if recipe else []), *(["--model", model] if model else [])]
        for text in overrides:
            words += [] if text.partition("=")[0].strip() in HOW_READ else ["--set", text]
        if split_source(config.problems.source)[0] == "verifiers":
            words += ["--set", f"problems.verifier={domain_of(config.problems).label}"]
        print(f"hard set: {hard}\nnext: {shell_words(*words, '--problems', hard, '--out', 'runs/NAME')}")


def check(
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    sets: Sets = None,
    verifier: Verifier = None,
    no_model: Annotated[bool, Option("--no-model", help="Check the problems only.")] = False,
    samples: Annotated[int, Option(help="Teacher samples.")] = 64,
) -> int:
    """Say in under two minutes whether a run can work, why rewards are 0, and what to do, without training.

    The last line says yes, no or unknown; the exit code of a yes is 0.

    examples:
      soar check --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --verifier rewards.py:grade
      soar check --problems hard.jsonl --no-model            the problems only; needs no torch
    """
    config = config_of(recipe, model, problems, overriding(sets, problems__verifier=verifier), not no_model)
    findings = []
    with Progress() as progress:
        progress.now(f"looking at {config.problems.source}")
        for finding in check_all(config, samples, progress.now, no_model):
            findings.append(finding)
            print("\n".join(finding.lines()), flush=True)
    print(summary(findings))
    return 0 if can_work(findings) else 1


def init(
    model: Annotated[str, Option(help="Folder or hub id of a causal language model.")],
    problems: Annotated[str, Option(help="Problem file, hub id of a dataset, or world:NAME.")],
    file: Annotated[Path, Argument(help="The recipe.")] = Path("recipe.toml"),
    verifier: Verifier = "math",
) -> None:
    """Write a recipe for your model and problems: the commented small-1gpu, to be changed by hand.

    example:
      soar init mine.toml --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
    """
    if file.exists():
        raise ConfigError(f"{file} exists; name another file, or move it away")
    text = find_recipe("small-1gpu").read_text(encoding="utf-8")
    for key, value in (("name", file.stem), ("path", model), ("source", problems), ("verifier", verifier or "math")):
        if value.encode("utf-8", "replace").decode() != value:
            raise ConfigError(f"{key} = {value!r} is not UTF-8, as a recipe has to be; give it another name")
        quoted = json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f").replace("\\", "\\\\")
        text = re.sub(rf"^(# )?{key} = [^#\n]*(?=  #|$)", f"{key} = {quoted}", text, flags=re.MULTILINE)
    config_of("small-1gpu", model, problems, overriding(None, name=file.stem, problems__verifier=verifier))
    write_atomic(file, text.encode())
    print(f"{file}\nnext: soar check {shell_words(file)}")


def watch(
    run: RunPath,
    once: Annotated[bool, Option("--once", help="Show the run as it is now and end.")] = False,
    web: Annotated[bool, Option("--web", help="Serve its page to a browser on this machine.")] = False,
    port: Annotated[int, Option(metavar="N", help="Of --web (0: a free one).")] = 0,
) -> None:
    """A running or finished run, from any terminal: live, or into a file the view now and at the end.

    example:
      soar watch runs/mine --web     the report as it grows; from elsewhere: ssh -L PORT:127.0.0.1:PORT
    """
    with suppress(KeyboardInterrupt):  # the run goes on; only the looking ends
        if web:
            server, address = web_server(run, port)
            print(f"{address}\nCtrl-C ends it; the run goes on", flush=True)
            server.serve_forever()
        follow(run, Console(highlight=False), 2.0, once)


def report(
    run: RunPath, out: Annotated[Path | None, Option(help="File (default: report.html in the run).")] = None
) -> None:
    """One HTML page about a run."""
    with Progress(what=f"drawing the page of {run}"), storage_errors(run, "Name another place with --out"):
        page = write_report(run, out)
    print(page)


def doctor(run: Annotated[Path, Argument(metavar="FOLDER", help="Folder of run, screen, student or study.")]) -> int:
    """Is a folder what its run left: hashes of all files, config, adapters, and the summary recomputed from the events.

    One line a check; exit code 0: all is well; 1: something is not.
    """
    with Progress(what=f"reading every file of {run}"):
        checks = folders.examine(run)
    bad = sum(bool(complaints) for _, complaints in checks)
    print(fill("doctor.txt", checks=checks, bad=bad))
    return 1 if bad else 0


def verify(
    file: Annotated[str, Argument(help="JSONL, JSON, CSV or parquet file.")],
    verifier: Annotated[str, Option(help="math, number, exact, choice, module:function or file.py:function.")] = "math",
    domain: Annotated[str, Option(help="A built-in domain, file.py:NAME or module:NAME, in place of both.")] = "",
    golds: Annotated[bool, Option("--golds", help="Check every gold answer against itself.")] = False,
    answer_style: Annotated[Literal["boxed", "marker"], Option(help="How they answer.")] = "boxed",
    completion_column: Annotated[str | None, Option(metavar="NAME")] = None,
    gold_column: Annotated[str | None, Option(metavar="NAME")] = None,
    label_column: Annotated[str | None, Option(metavar="NAME", help="The file's own verdicts.")] = None,
    show: Annotated[int, Option(metavar="N", help="Rows listed.")] = 10,
    timeout: Annotated[float, Option(metavar="S", help="Seconds for one check.")] = 5.0,
    workers: Annotated[int, Option(metavar="N", help="Processes (0: one per core).")] = 0,
    as_json: Annotated[bool, Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Grade a file of completions against its gold answers.

    examples:
      soar verify completions.jsonl                          columns completion and gold (or their usual names)
      soar verify problems.jsonl --golds                     every gold answer against itself; exit code 1 if one fails
      soar verify completions.jsonl --label-column correct   where the verifier and your own labels differ
      soar verify completions.jsonl --domain my.py:DOMAIN    as the domain reads and checks them
    """
    columns = {"completion": completion_column, "gold": gold_column, "label": label_column}
    pool = make_pool(verifier, answer_style, domain, timeout_s=timeout, workers=max(0, workers))
    with Progress(what=f"grading {file}"), pool:
        grades = grade_file(file, pool, columns, golds, max(0, show))
        problem, rows = pool.last_error, grades.counts.total()
    if as_json:
        counts = {verdict.value: grades.counts[verdict] for verdict in Verdict}
        shares = {name: count / rows for name, count in counts.items()}
        more = {"rows": rows, "counts": counts, "shares": shares, "last_error": problem}
        print(json.dumps({**vars(grades), **more}, indent=2))
    else:
        told = {"grades": grades, "golds": golds, "problem": problem, "style": "" if domain else answer_style}
        print(visible(fill("grades.txt", verdicts=list(Verdict), **told)))
    return 1 if golds and grades.counts[Verdict.CORRECT] < rows else 0


def export(
    run: RunPath,
    form: Annotated[Literal["trl", "verl", "jsonl", "peft"], Option("--format", help="See below.")],
    out: Annotated[Path, Option(help="New folder.")],
    questions: Annotated[Literal["pq", "all"], Option(help="Promotion questions, or all accepted ones.")] = "pq",
    with_hard: Annotated[bool, Option("--with-hard", help="Add the hard training half, as for the arm pq.")] = False,
    policy: Annotated[str, Option(help="Of peft: student, teacher, or an arm such as pq.")] = "student",
    push: Annotated[str | None, Option(metavar="REPO", help="Upload to this private Hugging Face repository.")] = None,
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
    if (with_hard or questions != "pq") if peft else policy != "student":
        raise BadParameter(f"{form}: --questions and --with-hard are of trl, verl and jsonl, --policy of peft")
    files = export_adapter(run, out, policy) if peft else export_questions(run, out, form, questions, with_hard)
    print("\n".join(map(str, files)))
    if push is not None:
        print(f"pushed: {push_folder(out, push, 'model' if peft else 'dataset')}")


def eval_(
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    verifier: Verifier = None,
    sets: Sets = None,
    adapter: Annotated[list[Path] | None, Option(help=_ADAPTER)] = None,
    workers: Workers = None,
    out: Annotated[Path | None, Option(help="JSON file for the result.")] = None,
    quiet: Quiet = False,
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
    overrides = overriding(sets, workers, **ELSEWHERE, problems__verifier=verifier)
    config = config_of(recipe or run, model, problems, overrides)
    if out is not None:
        check_place(out)
    with Progress(quiet=quiet) as progress:
        before_torch(progress, config, "to measure on")
        from soar.run.pipeline import measure as measured

        result, _ = measured(config, adapters, progress)
    print(result_table(result, asked=config.evaluate.ks))
    if out is not None:
        write_json(out, result)
        print(f"result: {out}")


def student(
    context: Context,
    recipe: Recipe = None,
    train: Annotated[str | None, Option(metavar="ARM[:PATH]", help="Arm of arms.run, and what it trains on.")] = None,
    out: Annotated[Path | None, Option(help="Folder, in the form of a run folder.")] = None,
    emit: Annotated[Path | None, Option(help="Run folder for the training sets of an outer step, see below.")] = None,
    model: Model = None,
    problems: Problems = None,
    verifier: Verifier = None,
    sets: Sets = None,
    steps: Annotated[int | None, Option(help="RLOO steps (arms.steps).")] = None,
    resume: Resume = False,
    quiet: Quiet = False,
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
    sets = overriding(sets, problems__verifier=verifier)
    if emit is not None and (train, out, steps) == (None, None, None):
        values: Any = {"backend__kind": "files", "arms__run": ["base", "ps"], "screen__from_run": screening(recipe)}
        config = config_of(recipe, model, problems, overriding(sets, **values))
        carry_out(context, config, emit, resume, quiet)
    elif train is not None and out is not None and emit is None:
        config = student_config(train, recipe, model, problems, sets, steps)
        carry_out(context, config, out, resume, quiet)
        if left_out := read_run(out).left_out:
            raise UserError(f"{'; '.join(left_out)}. Nothing was trained; report: {out / 'report.html'}")
        print(f"adapter: {out / 'arms' / config.arms.run[-1]}; report: {out / 'report.html'}")
    else:
        raise BadParameter("expected --train ARM and --out DIR, or --emit DIR (without --steps, which is of --train)")


def measure(context: Context, run: RunPath, quiet: Quiet = False) -> None:
    """Go on with a run of soar student --emit: read the results of its training sets, emit those of the next outer step.

    A result is a JSON file in RUN/sets/STEP/results: {"set": "0-1", "pass_rate": 0.31}, or "adapter" with a PEFT folder,
    which is measured here, or both.
    """
    config = folders.recorded_config(run)
    if config.backend.kind != "files":
        raise ConfigError(f"{run} was not begun by soar student --emit; continue it with: {resume_command(run)}")
    carry_out(context, config, run, True, quiet)


def student_config(
    train: str, recipe: str | None, model: str | None, problems: str | None, overrides: list[str], steps: int | None
) -> Config:
    """The run of --train; without a recipe `pq:RUN` and `teacher_t:RUN` bring config and screening. Raises ConfigError."""
    arm, _, place = train.partition(":")
    key = PATH_KEYS.get("pq" if arm.startswith("pq") else arm)
    if bool(key) != bool(place):
        raise ConfigError(f"--train {train!r}: expected {f'{arm}:PATH' if key else arm}")
    if arm in ("base", "ps"):
        raise ConfigError(f"--train {train!r}: that is nothing to train without an outer loop; soar run measures it")
    values: dict[str, Any] = {"teacher__steps": 0, "arms__pq_steps": 0, "arms__steps": steps}
    values |= {"arms__run": ["base", arm], **({key: place} if key else {})}
    if recipe is None and str(key).endswith("_from") and (Path(place) / "manifest.json").is_file():
        recipe, values["screen__from_run"] = place, screening(place)
    config = config_of(recipe, model, problems, overriding(overrides, **values))
    if config.teacher.steps:
        raise ConfigError("--set teacher.steps: soar student --train has no outer loop; leave it out, or take soar run")
    return config


def study(
    name: Annotated[str, Argument(metavar="STUDY", help="A TOML file or a built-in study.")],
    out: Annotated[Path | None, Option(help="Study folder (default: studies/<name>).")] = None,
    seeds: Annotated[list[int] | None, Option(help="Seed instead of the study's; may be repeated.")] = None,
    sets: Sets = None,
    jobs: Annotated[int, Option(help="Cells at a time.")] = 1,
    resume: Resume = False,
    collect: Annotated[bool, Option("--collect", help="Only write the results of the cells in --out.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the cells and their costs, run nothing.")] = False,
) -> int:
    """Variants x seeds, every cell a run folder: one table, one page.

    examples:
      soar study finding1 --out studies/finding1 --jobs 2       --resume continues it, with its --set
      soar study null --seeds 0 --seeds 1 --set model.path=my-model --set problems.source=hard.jsonl --out studies/null
    """
    plan = read_study(name, seeds)
    out = out or Path("studies") / plan.name
    overrides = sets or (folders.recorded_sets(out / DEFINITION, plan.seeds) if resume or collect else [])
    if dry_run:
        planned = [(cell, forecast(cell.config)) for cell in cells(plan, out, overrides)]
        for cell, expected in planned:
            print(visible(f"{cell.name}: {' '.join(cell.overrides)}\n  {expected.total_line()}"))
        hours = sum(expected.hours() or 0.0 for _, expected in planned)
        print(f"in all: {len(planned)} cells, {hours:,.2f} device-hours" if hours else f"in all: {len(planned)} cells")
        return 0
    with Progress(what=f"cells of {plan.name} in {out}") as progress, StopRequest().on_signals(progress.insist) as stop:
        results = run_study(plan, out, overrides, resume or collect, 0 if collect else max(1, jobs), stop)
    print((out / "study.md").read_text(encoding="utf-8"))
    print(f"page: {out / 'study.html'}")
    return int(any(cell["state"] != "finished" for cell in results["cells"]))


def review(
    run: RunPath,
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
        decision = folders.ACCEPTED if accept else folders.REJECTED
        folders.decide_review(run, decision, by or os.environ.get("USER", "unknown"))
    print(fill("review.txt", review=folders.read_review(run)))
    if accept or reject:
        print(f"continue with: soar run --out {shell_words(run)} --resume")  # whoever made it may not be trusted
