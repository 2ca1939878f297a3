"""Commands that begin something: init, check, screen, run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from jinja2 import Template
from typer import Argument, Context, Option

from soar.cli import common
from soar.config import Config, ConfigError, override
from soar.files import read_object, scrub, write_atomic
from soar.plan.forecast import forecast, memory_lines
from soar.plan.preflight import can_work, check_all, check_data, summary
from soar.problems.answers import split_choice
from soar.problems.domain import domain_of, load_domain
from soar.problems.load import load_problems
from soar.problems.sources import split_source
from soar.problems.verify import read_number
from soar.run.folder import recorded_config
from soar.run.interrupts import StopRequest
from soar.run.progress import Progress

TEMPLATE = Path(__file__).parents[1] / "templates" / "recipe.toml"
READING = ("problems.source", "problems.limit", "problems.question_column", "problems.answer_column")


def run(
    context: Context,
    recipe: common.Recipe = None,
    model: common.Model = None,
    problems: common.Problems = None,
    verifier: common.Verifier = None,
    sets: common.Sets = None,
    out: Annotated[Path | None, Option(help="Run folder (default: runs/<name of the recipe>).")] = None,
    resume: common.Resume = False,
    review: Annotated[bool, Option("--review", help="Hold every promotion for soar review.")] = False,
    workers: common.Workers = None,
    max_hours: Annotated[float | None, Option(help="Pause after so many hours of this process.")] = None,
    max_tokens: Annotated[int | None, Option(help="Pause after so many sampled tokens in all.")] = None,
    max_promotions: Annotated[int | None, Option(help="End the outer loop after so many promotions.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print config and forecast, run nothing.")] = False,
    assume: Annotated[list[str] | None, Option(metavar="NAME=VALUE", help="Assume this in the forecast.")] = None,
    quiet: common.Quiet = False,
) -> int:
    """Screen, outer loop, arms, evaluation, report.

    The run is saved when it stops at a limit (0: no limit), and goes on with --resume.

    examples:
      soar run                                        the demo: an embedded world, on two CPU cores
      soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --out runs/qwen
      soar run --out runs/mine --max-hours 8          pause in time; --resume continues
    """
    overrides = common.overrides(
        sets, workers, problems__verifier=verifier, promotion__review=review, limits__max_hours=max_hours,
        limits__max_tokens=max_tokens, limits__max_promotions=max_promotions,
    )  # fmt: skip
    if resume and not (recipe or model or problems):
        config = override(recorded_config(out or Path("runs/demo")), overrides)
    else:
        recipe = recipe or (None if model or problems else "demo")
        config = common.config_of(recipe, model, problems, overrides)
    out = out or Path("runs") / config.name
    if dry_run:
        return _dry_run(config, assume or [], out if resume else None)
    common.carry_out(context, config, out, resume, quiet)
    print(f"report: {out / 'report.html'}")
    return 0


def _dry_run(config: Config, assume: list[str], run: Path | None) -> int:
    """Print what is wrong with the data, what a run would do and cost; 1 when it cannot work. run: its folder, if begun."""
    try:
        values = {name: float(value) for name, _, value in (text.partition("=") for text in assume)}
    except ValueError as error:
        raise ConfigError(f"--assume {' '.join(assume)}: expected NAME=NUMBER") from error
    expected, local = forecast(config, values, run), split_source(config.problems.source)[0] != "hub"
    print(json.dumps(scrub(config.resolved()), indent=2))
    findings = list(check_data(config)) if local else []  # a hub dataset takes a network
    lines = [line for finding in findings for line in finding.lines()]
    print("\n".join([*lines, *memory_lines(config), *expected.lines(), *([summary(findings)] if findings else [])]))
    return int(can_work(findings) is False)


def screen(
    context: Context,
    out: Annotated[Path, Option(help="Folder for evidence, hard set and table.")],
    recipe: common.Recipe = None,
    model: common.Model = None,
    problems: common.Problems = None,
    verifier: common.Verifier = None,
    sets: common.Sets = None,
    attempts: Annotated[int | None, Option(metavar="K", help="Attempts at each problem (screen.attempts).")] = None,
    early_stop: Annotated[bool, Option("--early-stop", help="Stop at a problem once it is not hard.")] = False,
    workers: common.Workers = None,
    resume: common.Resume = False,
    quiet: common.Quiet = False,
) -> None:
    """Find the problems that a model never solves (fail@K).

    example:
      soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen
    """
    overrides = common.overrides(
        sets, workers, problems__verifier=verifier, screen__attempts=attempts, screen__early_stop=early_stop
    )
    config = common.config_of(recipe, model, problems, overrides)
    if config.screen.attempts == 0:
        raise ConfigError("screen.attempts = 0: a screening needs at least one attempt at each problem; 128 is usual")
    stop = StopRequest()
    with Progress(quiet=quiet) as progress, stop.on_signals(progress.insist):
        progress.now(f"loading torch and {config.model.path}, to screen {config.problems.source}")
        from soar.run.screen import screen_folder

        lines = screen_folder(config, out, resume, context.obj, progress, stop)
    print("\n".join(lines))
    hard = out / "hard.jsonl"
    print(f"evidence: {out / 'hard' / 'screen.jsonl'}")
    if hard.exists():  # the run that uses it: the same recipe and keys, but for those that say how the file was read
        words = ["soar", "run", *([recipe] if recipe else []), *(["--model", model] if model else [])]
        for text in overrides:
            words += [] if text.partition("=")[0].strip() in READING else ["--set", text]
        if split_source(config.problems.source)[0] == "verifiers":
            words += ["--set", f"problems.verifier={domain_of(config.problems).label}"]
        print(f"hard set: {hard}\nnext: {shlex.join([*words, '--problems', str(hard), '--out', 'runs/NAME'])}")


def check(
    recipe: common.Recipe = None,
    model: common.Model = None,
    problems: common.Problems = None,
    sets: common.Sets = None,
    verifier: common.Verifier = None,
    no_model: Annotated[bool, Option("--no-model", help="Check the problems only.")] = False,
    samples: Annotated[int, Option(help="Teacher samples.")] = 64,
    as_json: common.AsJson = False,
) -> int:
    """Say in under two minutes whether a run can work, why rewards are 0, and what to do, without training.

    The last line says yes, no or unknown; the exit code of a yes is 0.

    examples:
      soar check --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --verifier rewards.py:grade
      soar check --problems hard.jsonl --no-model            the problems only; needs no torch
    """
    overrides = common.overrides(sets, None, problems__verifier=verifier)
    config = common.config_of(recipe, model, problems, overrides, model_named=not no_model)
    findings = []
    with Progress() as progress:
        progress.now(f"looking at {config.problems.source}")
        for finding in check_all(config, samples, progress.now, no_model):
            findings.append(finding)
            if not as_json:
                print("\n".join(finding.lines()), flush=True)
    works = can_work(findings)
    if as_json:
        print(json.dumps({"works": works, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        print(summary(findings))
    return 0 if works else 1


def init(
    model: Annotated[str, Option(help="Folder or hub id of a causal language model.")],
    problems: Annotated[str, Option(help="Problem file, hub id of a dataset, or world:NAME.")],
    file: Annotated[Path, Argument(help="The recipe.")] = Path("recipe.toml"),
    question_column: Annotated[str | None, Option(help="Default: the first column with a usual name.")] = None,
    answer_column: Annotated[str | None, Option(help="The same for the gold answer.")] = None,
    domain: Annotated[str, Option(help="A built-in domain, file.py:NAME or module:NAME (problems.domain).")] = "",
    name: Annotated[str | None, Option(help="Name of the run (default: that of the file).")] = None,
    force: Annotated[bool, Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write a commented recipe for your model and problems.

    The problem file is read, so that columns and verifier fit; of a model folder context and chat template are looked at.

    example:
      soar init --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
    """
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; give --force to replace it, or another file name")
    values: dict[str, Any] = {"name": name or file.stem, "model": model, "source": problems}
    columns = {"question_column": question_column, "answer_column": answer_column, "domain": domain or None}
    fits, notes = fit_model(Path(model))
    if domain:
        load_domain(domain)  # a recipe that names a domain which cannot be loaded helps nobody
    if not problems.startswith("world:"):
        fits |= fit_problems(problems, columns, notes)
    text = {key: json.dumps(value, ensure_ascii=False) for key, value in (values | fits | columns).items()}
    write_atomic(file, Template(TEMPLATE.read_text(encoding="utf-8"), trim_blocks=True).render(text).encode())
    print("\n".join([*notes, f"next: soar run {file} --dry-run"]), file=sys.stderr)
    print(file)


def fit_model(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Format and token budgets that fit a model folder, and why; nothing for a hub id, which is not downloaded."""
    if not (folder / "config.json").is_file():
        return {}, [f"{folder} has no config.json here (a hub id, or GGUF): its context and format are not looked at"]
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    about, tokenizer = (read_object(file)[0] for file in files)
    fits, notes = dict[str, Any](), list[str]()
    if not tokenizer.get("chat_template") and not (folder / "chat_template.jinja").is_file():
        fits["format"] = "question_answer"
        notes.append("the tokenizer has no chat template: problems are put in the plain form question_answer")
    tokens = about.get("max_position_embeddings")
    if isinstance(tokens, int) and tokens < 2048:
        fits["tokens"] = max(16, tokens // 2)
        notes.append(f"the model has a context of {tokens} tokens: completions get half of it")
    return fits, notes


def fit_problems(source: str, columns: dict[str, str | None], notes: list[str]) -> dict[str, str]:
    """The simplest verifier that can read nearly all gold answers; `columns` and `notes` are filled. Raises DataError."""
    question, answer = columns["question_column"], columns["answer_column"]
    problems, report = load_problems(source, question_column=question, answer_column=answer)
    notes += report.lines(most=3)
    columns |= {f"{name}_column": column for name, column in report.columns.items() if name != "id"}
    if columns["domain"]:
        return {}
    answers = [problem.answer for problem in problems]
    letters = sum(bool(letter and not text) for letter, text in map(split_choice, answers)) / len(answers)
    numbers = sum(read_number(answer) is not None for answer in answers) / len(answers)
    verifier, why = (
        "math",
        f"{numbers:.0%} of the gold answers are plain numbers, the rest is read as formulas or words",
    )
    if letters >= 0.95:
        verifier, why = "choice", f"{letters:.0%} of the gold answers are choice letters"
    elif numbers == 1.0:
        verifier, why = "number", "all gold answers are numbers"
    notes.append(f"verifier {verifier}: {why}")
    return {"verifier": verifier}
