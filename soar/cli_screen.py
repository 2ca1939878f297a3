"""`soar screen`: which problems does a model never solve, and what would plain RL see on them?"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from soar.cli_common import config_of, recipe_arguments, workers_argument, workers_overrides
from soar.config import ConfigError
from soar.run.interrupts import StopRequest

READING = ("problems.source", "problems.limit", "problems.question_column", "problems.answer_column")
EXAMPLES = """examples:
  soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen
  soar screen small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems math.jsonl --out runs/screen --resume
  soar run small-1gpu --model Qwen/Qwen2.5-0.5B-Instruct --problems runs/screen/hard.jsonl --out runs/mine
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    screen = commands.add_parser(
        "screen",
        help="find the problems that a model never solves (fail@K)",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe_arguments(screen)
    screen.add_argument("--out", type=Path, required=True, help="folder for evidence, hard set and table")
    screen.add_argument("--attempts", type=int, metavar="K", help="attempts at each problem (screen.attempts)")
    screen.add_argument(
        "--early-stop", action="store_true", help="stop at a problem once it is not hard (screen.early_stop)"
    )
    workers_argument(screen)
    screen.add_argument("--resume", action="store_true", help="continue the screening in --out")
    screen.add_argument("--quiet", action="store_true", help="print the table only")
    screen.set_defaults(action=_screen)


def _screen(arguments: argparse.Namespace) -> int:
    shorthands = [] if arguments.attempts is None else [f"screen.attempts={arguments.attempts}"]
    shorthands += ["screen.early_stop=true"] if arguments.early_stop else []
    shorthands += workers_overrides(arguments.workers)
    arguments.overrides = [*shorthands, *arguments.overrides]
    config = config_of(arguments)
    if config.screen.attempts == 0:
        raise ConfigError("screen.attempts = 0: a screening needs at least one attempt at each problem; 128 is usual")
    from soar.run.progress import Progress
    from soar.run.screen import screen_folder

    stop = StopRequest()
    with Progress(quiet=arguments.quiet) as progress, stop.on_signals(progress.insist):
        lines = screen_folder(config, arguments.out, arguments.resume, arguments.command, progress, stop)
    print("\n".join(lines))
    hard = arguments.out / "hard.jsonl"
    print(f"evidence: {arguments.out / 'hard' / 'screen.jsonl'}")
    if hard.exists():
        print(f"hard set: {hard}\nnext: {_next_command(arguments, hard)}")
    return 0


def _next_command(arguments: argparse.Namespace, hard: Path) -> str:
    """The `soar run` that uses the hard set: the same recipe and keys, but for those that say how the file was read."""
    words = ["soar", "run"] + ([arguments.recipe] if arguments.recipe else [])
    words += ["--model", arguments.model] if arguments.model else []
    for override in arguments.overrides:
        if override.partition("=")[0].strip() not in READING:
            words += ["--set", override]
    return shlex.join([*words, "--problems", str(hard), "--out", "runs/NAME"])
