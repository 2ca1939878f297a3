"""`soar study`: variants of a recipe x seeds, one table and one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from soar.studies.study import cells, find_study, read_study

EXAMPLES = """examples:
  soar study finding1 --out studies/finding1 --jobs 2
  soar study finding1 --out studies/finding1 --resume
  soar study null --seeds 0 1 2 --set model.path=my-model --set problems.source=hard.jsonl --out studies/null
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    study = commands.add_parser(
        "study",
        help="variants x seeds, every cell a run folder: one table, one page",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    study.add_argument("study", help="a TOML file or a built-in study")
    study.add_argument("--out", type=Path, help="study folder (default: studies/<name>)")
    study.add_argument("--seeds", type=int, nargs="+", help="seeds instead of the study's")
    study.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key in every cell"
    )
    study.add_argument("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    study.add_argument("--resume", action="store_true", help="continue the study in --out; finished cells stay")
    study.add_argument("--collect", action="store_true", help="run nothing; write the results of the cells in --out")
    study.add_argument("--dry-run", action="store_true", help="list the cells and what each would do, run nothing")
    study.set_defaults(action=_study)


def _study(arguments: argparse.Namespace) -> int:
    study = read_study(find_study(arguments.study))
    if arguments.seeds:
        study = type(study).model_validate({**study.model_dump(), "seeds": arguments.seeds})
    out = arguments.out or Path("studies") / study.name
    if arguments.dry_run:
        from soar.plan.forecast import plan_lines, total_line

        for cell in cells(study, out, arguments.overrides):
            print(f"{cell.name}: {' '.join(cell.overrides)}")
            print("\n".join([*plan_lines(cell.config)[1:], total_line(cell.config)]))
        return 0
    from soar.studies.study import run_study

    resume, run = arguments.resume or arguments.collect, not arguments.collect
    results = run_study(study, out, arguments.overrides, resume, max(1, arguments.jobs), run)
    print((out / "study.md").read_text(encoding="utf-8"))
    print(f"page: {out / 'study.html'}")
    return int(any(cell["state"] != "finished" for cell in results["cells"]))
