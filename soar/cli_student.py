"""`soar student`: train a fresh student on one training set and measure it, without an outer loop."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from soar.cli_common import config_of, recipe_arguments
from soar.cli_run import columns, summary_lines
from soar.config import Config, ConfigError
from soar.run.interrupts import StopRequest

EXAMPLES = """examples:
  soar student tiny --train hard --steps 200 --out runs/hard                Hard-Only
  soar student --train pq:runs/demo --steps 100 --out runs/again            promotion questions of a run, its config
  soar student --train teacher:runs/demo --steps 100 --out runs/taught      128 questions of its trained teacher
  soar student tiny --train file:easier.jsonl --steps 100 --out runs/real   real problems, the upper bound
"""
ARMS = {
    "hard": ("hard_only", None),
    "pq": ("pq", "arms.pq_from"),
    "pq_mixed": ("pq_mixed", "arms.pq_from"),
    "pq_curriculum": ("pq_curriculum", "arms.pq_from"),
    "pq_sample": ("pq_sample", "arms.pq_from"),
    "pq_well_posed": ("pq_well_posed", "arms.pq_from"),
    "pq_correct": ("pq_correct", "arms.pq_from"),
    "teacher": ("teacher_t", "arms.teacher_from"),
    "untrained": ("base_t", None),
    "selfinstruct": ("self_instruct", None),
    "file": ("real", "arms.real"),
    "real": ("real", None),
}
"""What --train may say -> the arm, and the config key that the part after the colon is for."""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    student = commands.add_parser(
        "student",
        help="train a fresh student on hard problems, promotion questions, a teacher's questions or a file",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe_arguments(student)
    student.add_argument(
        "--train", required=True, metavar="SET", help=f"one of {', '.join(ARMS)}; with :PATH where due"
    )
    student.add_argument("--steps", type=int, help="RLOO steps (arms.steps)")
    student.add_argument("--out", type=Path, required=True, help="folder, in the form of a run folder")
    student.add_argument("--resume", action="store_true", help="continue in --out")
    student.add_argument("--quiet", action="store_true", help="print the summary only")
    student.set_defaults(action=_student)


def student_config(arguments: argparse.Namespace) -> Config:
    """The run that trains the student: no outer loop, the arms base and the one of --train. Raises ConfigError.

    Without a recipe, `pq:RUN` and `teacher:RUN` take the config of that run, and its screening.
    """
    kind, colon, place = arguments.train.partition(":")
    if kind not in ARMS:
        raise ConfigError(f"--train {arguments.train!r}: expected one of {', '.join(ARMS)}")
    arm, key = ARMS[kind]
    if bool(key) != bool(colon and place):
        example = f"{kind}:PATH" if key else kind
        raise ConfigError(f"--train {arguments.train!r}: expected {example}")
    overrides = ["teacher.steps=0", f'arms.run=["base", "{arm}"]', "arms.pq_steps=0"]
    run = Path(place)
    if key:
        overrides.append(f"{key}={json.dumps(place)}")
    if key in ("arms.pq_from", "arms.teacher_from") and arguments.recipe is None and (run / "manifest.json").is_file():
        arguments.recipe = place
        if (run / "hard" / "screen.jsonl").is_file():
            overrides.append(f"screen.from_run={json.dumps(place)}")
    if arguments.steps is not None:
        overrides.append(f"arms.steps={arguments.steps}")
    arguments.overrides = [*overrides, *arguments.overrides]
    return config_of(arguments)


def _student(arguments: argparse.Namespace) -> int:
    config = student_config(arguments)
    from soar.run.pipeline import execute
    from soar.run.progress import Progress

    stop = StopRequest()
    with Progress(quiet=arguments.quiet) as progress, stop.on_signals(progress.insist):
        summary = execute(config, arguments.out, arguments.resume, arguments.command, progress, stop)
    print("\n".join(summary_lines(summary, columns())))
    print(f"adapter: {arguments.out / 'arms'}; report: {arguments.out / 'report.html'}")
    return 0
