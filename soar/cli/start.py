"""Commands that begin something: init, check, screen, run."""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Context, Option

from soar.cli import common
from soar.config import ConfigError, find_recipe, override
from soar.files import scrub, write_atomic
from soar.plan.forecast import forecast, memory_lines
from soar.plan.preflight import can_work, check_all, check_data, summary
from soar.problems.domain import domain_of
from soar.problems.sources import split_source
from soar.run.folder import recorded_config
from soar.run.interrupts import StopRequest
from soar.run.progress import Progress

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
    dry_run: Annotated[bool, Option("--dry-run", help="Print config and forecast, run nothing.")] = False,
    quiet: common.Quiet = False,
) -> int:
    """Screen, outer loop, arms, evaluation, report.

    The run is saved when it stops at a limit (0: no limit), and goes on with --resume.

    examples:
      soar run                                        the demo: an embedded world, on two CPU cores
      soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl --out runs/qwen
      soar run --out runs/mine --max-hours 8          pause in time; --resume continues
    """
    limits = {"limits__max_hours": max_hours, "limits__max_tokens": max_tokens}
    overrides = common.overrides(sets, workers, problems__verifier=verifier, promotion__review=review, **limits)
    if resume and not (recipe or model or problems):
        config = override(recorded_config(out or Path("runs/demo")), overrides)
    else:
        recipe = recipe or (None if model or problems else "demo")
        config = common.config_of(recipe, model, problems, overrides)
    out = out or Path("runs") / config.name
    if not dry_run:
        common.carry_out(context, config, out, resume, quiet)
        print(f"report: {out / 'report.html'}")
        return 0
    local = split_source(config.problems.source)[0] != "hub"  # which takes a network
    findings = list(check_data(config)) if local else []
    lines = [line for finding in findings for line in finding.lines()] + memory_lines(config)
    lines += [*forecast(config).lines(), *([summary(findings)] if findings else [])]
    print("\n".join([json.dumps(scrub(config.resolved()), indent=2), *lines]))
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
    workers: common.Workers = None,
    resume: common.Resume = False,
    quiet: common.Quiet = False,
) -> None:
    """Find the problems that a model never solves (fail@K).

    example:
      soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen
    """
    overrides = common.overrides(sets, workers, problems__verifier=verifier, screen__attempts=attempts)
    config = common.config_of(recipe, model, problems, overrides)
    stop = StopRequest()
    with Progress(quiet=quiet) as progress, stop.on_signals(progress.insist):
        progress.now(f"loading torch and {config.model.path}, to screen {config.problems.source}")
        from soar.run.screen import screen_folder

        lines, _ = screen_folder(config, out, resume, context.obj, progress, stop)
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
            print("\n".join(finding.lines()), flush=True)
    print(summary(findings))
    return 0 if can_work(findings) else 1


def init(
    model: Annotated[str, Option(help="Folder or hub id of a causal language model.")],
    problems: Annotated[str, Option(help="Problem file, hub id of a dataset, or world:NAME.")],
    file: Annotated[Path, Argument(help="The recipe.")] = Path("recipe.toml"),
    verifier: common.Verifier = "math",
) -> None:
    """Write a recipe for your model and problems: the commented small-1gpu, to be changed by hand.

    example:
      soar init mine.toml --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
    """
    if file.exists():
        raise ConfigError(f"{file} exists; name another file, or move it away")
    text = find_recipe("small-1gpu").read_text(encoding="utf-8")
    for key, value in (("name", file.stem), ("path", model), ("source", problems), ("verifier", verifier)):
        quoted = json.dumps(value, ensure_ascii=False).replace("\\", "\\\\")
        text = re.sub(rf"^(# )?{key} = [^#\n]*(?=  #|$)", f"{key} = {quoted}", text, flags=re.MULTILINE)
    write_atomic(file, text.encode())
    print(f"{file}\nnext: soar check {shlex.quote(str(file))}")
