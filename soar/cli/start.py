"""Commands that begin something: init, check, screen, run."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from soar.cli.common import (
    AsJson,
    Model,
    Problems,
    Quiet,
    Recipe,
    Resume,
    Sets,
    Verifier,
    Workers,
    carry_out,
    config_of,
    workers_overrides,
)  # fmt: skip
from soar.config import Config, ConfigError, difference, flat, load, override
from soar.files import scrub, write_atomic
from soar.run.interrupts import StopRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from soar.types import Problem

READING = ("problems.source", "problems.limit", "problems.question_column", "problems.answer_column")


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
    max_promotions: Annotated[int | None, Option(help="End the outer loop after so many promotions.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print config and forecast, run nothing.")] = False,
    assume: Annotated[list[str] | None, Option(metavar="NAME=VALUE", help="Assume this in the forecast.")] = None,
    quiet: Quiet = False,
) -> None:
    """Screen, outer loop, arms, evaluation, report.

    The run is saved when it stops at a limit (0: no limit), and goes on with --resume.

    examples:
      soar run                                        the embedded world, on two CPU cores
      soar run --out runs/mine --set teacher.steps=40 --set seed=1
      soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --out runs/qwen
      soar run --out runs/mine --resume               continue an interrupted run
      soar run --out runs/mine --max-hours 8          pause in time; --resume continues
      soar run --out runs/mine --workers 2            share the work among two processes (docs/scaling.md)
    """
    limits = {"max_hours": max_hours, "max_tokens": max_tokens, "max_promotions": max_promotions}
    overrides = [
        *graded_by(verifier),
        *(sets or []),
        *(f"limits.{key}={value}" for key, value in limits.items() if value is not None),
    ]
    overrides += [*workers_overrides(workers), *(["promotion.review=true"] if review else [])]
    if resume and not (recipe or model or problems):
        from soar.run.folder import recorded_config

        begun = recorded_config(out or Path("runs") / config_of(None, None, None, overrides).name)
        config = override(begun, overrides)
    else:
        config = config_of(recipe, model, problems, overrides)
    if dry_run:
        _forecast(config, assume or [], out or Path("runs") / config.name if resume else None)
        return
    out = out or Path("runs") / config.name
    carry_out(context, config, out, resume, quiet)
    print(f"report: {out / 'report.html'}")


def graded_by(verifier: str | None) -> list[str]:
    """The override of --verifier."""
    return [] if verifier is None else [f"problems.verifier={json.dumps(verifier)}"]


def _forecast(config: Config, assume: list[str], run: Path | None) -> None:
    """Print what a run would do and cost; run: its folder, when it has begun."""
    from soar.plan.forecast import assumed, forecast, memory_lines

    values = {}
    for text in assume:
        name, _, value = text.partition("=")
        try:
            values[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--assume {text}: expected NAME=NUMBER") from error
    assumptions = assumed(config).with_values(values, "given")
    print(json.dumps(scrub(config.resolved()), indent=2))
    print(
        "\n".join([*config.doubts(), *memory_lines(config, assumptions), *forecast(config, assumptions, run).lines()])
    )


def screen(
    context: Context,
    out: Annotated[Path, Option(help="Folder for evidence, hard set and table.")],
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    verifier: Verifier = None,
    sets: Sets = None,
    attempts: Annotated[int | None, Option(metavar="K", help="Attempts at each problem (screen.attempts).")] = None,
    early_stop: Annotated[bool, Option("--early-stop", help="Stop at a problem once it is not hard.")] = False,
    workers: Workers = None,
    resume: Resume = False,
    quiet: Quiet = False,
) -> None:
    """Find the problems that a model never solves (fail@K).

    examples:
      soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen
      soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen --resume
      soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems runs/screen/hard.jsonl --out runs/mine
    """
    overrides = [*graded_by(verifier), *([] if attempts is None else [f"screen.attempts={attempts}"])]
    overrides += [*(["screen.early_stop=true"] if early_stop else []), *workers_overrides(workers), *(sets or [])]
    config = config_of(recipe, model, problems, overrides)
    if config.screen.attempts == 0:
        raise ConfigError("screen.attempts = 0: a screening needs at least one attempt at each problem; 128 is usual")
    from soar.run.progress import Progress
    from soar.run.screen import screen_folder

    stop = StopRequest()
    with Progress(quiet=quiet) as progress, stop.on_signals(progress.insist):
        lines = screen_folder(config, out, resume, context.obj, progress, stop)
    print("\n".join(lines))
    hard = out / "hard.jsonl"
    print(f"evidence: {out / 'hard' / 'screen.jsonl'}")
    if hard.exists():  # the run that uses it: the same recipe and keys, but for those that say how the file was read
        words = ["soar", "run", *([recipe] if recipe else []), *(["--model", model] if model else [])]
        for text in overrides:
            words += [] if text.partition("=")[0].strip() in READING else ["--set", text]
        print(f"hard set: {hard}\nnext: {shlex.join([*words, '--problems', str(hard), '--out', 'runs/NAME'])}")


def check(
    recipe: Recipe = None,
    model: Model = None,
    problems: Problems = None,
    sets: Sets = None,
    verifier: Verifier = None,
    no_model: Annotated[bool, Option("--no-model", help="Check the problems only.")] = False,
    samples: Annotated[int, Option(help="Teacher samples.")] = 64,
    as_json: AsJson = False,
) -> int:
    """Say in under two minutes whether a run can work, why rewards are 0, and what to do, without training.

    The last line says yes, no or unknown; the exit code of a yes is 0.

    examples:
      soar check --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --verifier rewards.py:grade
      soar check small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
      soar check --problems hard.jsonl --no-model            the problems only; needs no torch
    """
    from soar.plan.preflight import can_work, check_all, summary

    config = config_of(recipe, model, problems, [*graded_by(verifier), *(sets or [])], model_named=not no_model)
    findings = []
    for finding in check_all(config, samples, lambda line: print(line, file=sys.stderr), no_model):
        findings.append(finding)
        if not as_json:
            print("\n".join(finding.lines()), flush=True)
    works = can_work(findings)
    if as_json:
        print(json.dumps({"works": works, "findings": [finding.as_json() for finding in findings]}, indent=2))
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

    examples:
      soar init --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
      soar init my.toml --model models/mine --problems mine.csv --question-column task --answer-column result
      soar run recipe.toml --dry-run                  what the recipe would cost
      soar run recipe.toml
    """
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; give --force to replace it, or another file name")
    draft = Draft({"name": name or file.stem})
    draft.look_at_model(model)
    draft.look_at_problems(problems, question_column, answer_column, domain)
    write_atomic(file, recipe_text(draft.keys).encode())
    print("\n".join([*draft.notes, f"next: soar run {file} --dry-run"]), file=sys.stderr)
    print(file)


SHARE = 0.95  # of the answers that have to be numbers, or letters, for the simpler verifier
SHOWN = """name seed model.path model.adapter model.lora_rank problems.source problems.question_column
problems.answer_column problems.domain problems.format problems.verifier screen.attempts screen.max_successes
teacher.steps teacher.datasets teacher.questions teacher.subject teacher.sampling.max_tokens teacher.optimizer.lr
teacher.optimizer.warmup_steps student.repeats student.steps student.prompts_per_step student.attempts
student.sampling.max_tokens student.optimizer.lr reward.questions promotion.tau promotion.window evaluate.attempts"""
BASE = "small-1gpu"


@dataclass
class Draft:
    """A recipe in the making. keys: dotted key -> value; notes: sentences on how they were chosen.

    The problem file is read, so that columns and verifier fit it; a model folder is looked at for its context and chat
    template. A hub id is taken as it is: nothing is downloaded.
    """

    keys: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def look_at_problems(self, source: str, question: str | None, answer: str | None, domain: str) -> None:
        """Columns, verifier and counts of a problem file or dataset. Raises DataError as a run would.

        domain: that of the problems; it has a verifier of its own, so none is chosen.
        """
        from soar.problems.domain import load_domain
        from soar.problems.load import load_problems

        self.keys["problems.source"] = source
        if domain:
            load_domain(domain)  # a recipe that names a domain which cannot be loaded helps nobody
            self.keys["problems.domain"] = domain
        if source.startswith("world:"):
            return
        problems, report = load_problems(source, question_column=question, answer_column=answer)
        self.notes += report.lines(most=3)
        for key, given in (("question", question), ("answer", answer)):
            if column := given or report.columns.get(key):
                self.keys[f"problems.{key}_column"] = column
        if not domain:
            self.keys["problems.verifier"], why = choose_verifier(problems)
            self.notes.append(f"verifier {self.keys['problems.verifier']}: {why}")

    def look_at_model(self, model: str) -> None:
        """Format and token budgets that fit a model folder; nothing for a hub id."""
        self.keys["model.path"] = model
        folder = Path(model)
        if folder.suffix == ".gguf" or any(folder.glob("*.gguf")):
            self.notes.append(f"{model}: weights from GGUF, whose tokenizer and context are seen when it is loaded")
            return
        if not (folder / "config.json").is_file():
            self.notes.append(f"{model} is no folder with a config.json, so it is taken as a hub id")
            return
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = folder / "tokenizer_config.json"
        told = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
        if not told.get("chat_template") and not (folder / "chat_template.jinja").is_file():
            self.keys["problems.format"] = "question_answer"
            self.notes.append("the tokenizer has no chat template: problems are put in the plain form question_answer")
        tokens = about.get("max_position_embeddings")
        if isinstance(tokens, int) and tokens < 2048:
            self.keys |= {f"{role}.sampling.max_tokens": max(16, tokens // 2) for role in ("student", "teacher")}
            self.notes.append(f"the model has a context of {tokens} tokens: completions get half of it")


def choose_verifier(problems: Sequence[Problem]) -> tuple[str, str]:
    """The simplest verifier that can read nearly all gold answers, and why."""
    from soar.problems.answers import read_choice
    from soar.problems.verify import read_number

    answers = [problem.answer for problem in problems]
    letters = sum(read_choice(answer, bare=True) is not None for answer in answers) / len(answers)
    numbers = sum(read_number(answer) is not None for answer in answers) / len(answers)
    if letters >= SHARE:
        return "choice", f"{letters:.0%} of the gold answers are choice letters"
    if numbers == 1.0:
        return "number", "all gold answers are numbers"
    return "math", f"{numbers:.0%} of the gold answers are plain numbers, the rest needs a symbolic comparison"


def recipe_text(keys: dict[str, Any]) -> str:
    """A recipe as TOML, one commented line a key. It loads to the recipe `BASE` with these keys."""
    from soar.cli.reference import meanings, toml

    config = load(BASE, [f"{key}={toml(value)}" for key, value in keys.items()]).resolved()
    values, words = flat(config), meanings()
    lines = [
        f"# A starting point for one GPU, made from the built-in recipe {BASE}. Every other key has its default:",
        "# soar config-reference lists them. What it would cost, before anything is loaded:",
        "#   soar run THIS_FILE --dry-run",
    ]
    changed = {line.partition(": ")[0] for line in difference(Config().resolved(), config)}
    sections: dict[str, list[str]] = {}
    for key in (*SHOWN.split(), *sorted(changed - set(SHOWN.split()))):
        if values[key] is not None and (key != "problems.domain" or values[key]):
            place, _, name = key.rpartition(".")
            why = f"  # {words[key]}" if words[key] else ""
            sections.setdefault(place, []).append(f"{name} = {toml(values[key])}{why}")
    for place, rows in sections.items():
        lines += (["", f"[{place}]"] if place else []) + rows
    return "\n".join([*lines, ""])
