"""`soar init`: a commented recipe for the user's model and problems."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  soar init --model Qwen/Qwen2.5-0.5B-Instruct --problems hard.jsonl
  soar init my.toml --model models/mine --problems mine.csv --question-column task --answer-column result
  soar run recipe.toml --dry-run                  what the recipe would cost
  soar run recipe.toml
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    init = commands.add_parser(
        "init",
        help="write a commented recipe for your model and problems",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    init.add_argument("file", nargs="?", type=Path, default=Path("recipe.toml"), help="default: recipe.toml")
    init.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    init.add_argument("--problems", required=True, help="problem file, hub id of a dataset, or world:NAME")
    init.add_argument("--question-column", help="default: the first column with a usual name")
    init.add_argument("--answer-column", help="the same for the gold answer")
    init.add_argument("--domain", default="", help="a built-in domain, file.py:NAME or module:NAME (problems.domain)")
    init.add_argument("--name", help="name of the run (default: that of the file)")
    init.add_argument("--force", action="store_true", help="replace a file that exists")
    init.set_defaults(action=_init)


def _init(arguments: argparse.Namespace) -> int:
    from soar.config import ConfigError
    from soar.files import write_atomic
    from soar.problems.domain import load_domain
    from soar.recipe import Draft, look_at_model, look_at_problems, recipe_text

    if arguments.file.exists() and not arguments.force:
        raise ConfigError(f"{arguments.file} exists; give --force to replace it, or another file name")
    if arguments.domain:
        load_domain(arguments.domain)  # a recipe that names a domain which cannot be loaded helps nobody
    parts = [
        Draft({"name": arguments.name or arguments.file.stem}),
        look_at_model(arguments.model),
        look_at_problems(arguments.problems, arguments.question_column, arguments.answer_column, arguments.domain),
    ]
    draft = Draft({k: v for part in parts for k, v in part.keys.items()}, [n for part in parts for n in part.notes])
    write_atomic(arguments.file, recipe_text(draft).encode())
    for note in draft.notes:
        print(note, file=sys.stderr)
    print(arguments.file)
    print(f"next: soar run {arguments.file} --dry-run", file=sys.stderr)
    return 0
