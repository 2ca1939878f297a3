"""`soar export`: take questions or weights of a run elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from soar.config import TrainedArm

WEIGHT_FORMATS = ("peft", "merged")
FORMATS = ("trl", "verl", "verifiers", "jsonl", "hf", *WEIGHT_FORMATS)
EXAMPLES = """formats:
  trl        train.jsonl with prompt and solution, and reward.py
  verl       train.parquet with verl's five fields, and reward.py
  verifiers  an environment package for verifiers and prime-rl
  jsonl      question and answer, for soar itself and anything else
  hf         a Hugging Face dataset folder with its card
  peft       an adapter with tokenizer and card
  merged     base model and adapter as one model

examples:
  soar export runs/mine --format trl --out questions-trl
  soar export runs/mine --format verl --with-hard --out questions-verl
  soar export runs/mine --format merged --policy pq --out my-model
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    export = commands.add_parser(
        "export",
        help="questions for TRL, verl, verifiers; weights for PEFT",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("--format", choices=FORMATS, required=True)
    export.add_argument("--out", type=Path, required=True, help="new folder")
    export.add_argument("--questions", choices=("pq", "all"), default="pq", help="promotion questions, or all accepted")
    export.add_argument("--with-hard", action="store_true", help="add the hard training half, as the arm pq trains on")
    export.add_argument(
        "--policy",
        choices=("student", "teacher", *get_args(TrainedArm)),
        default="student",
        metavar="POLICY",
        help="for peft and merged: student (the promoted one, default), teacher, or an arm such as pq or hard_only",
    )
    export.set_defaults(action=_export)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.format in WEIGHT_FORMATS:
        from soar.report.weights import export_adapter, export_merged

        write = export_adapter if arguments.format == "peft" else export_merged
        files = write(arguments.run, arguments.out, arguments.policy)
    else:
        from soar.report.export import export_questions

        files = export_questions(
            arguments.run, arguments.out, arguments.format, arguments.questions, arguments.with_hard
        )
    for path in files:
        print(path)
    return 0
