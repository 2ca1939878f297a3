"""`soar doctor`: does everything that a run folder says follow from its raw lines?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from soar.report.figures import visible

EXAMPLES = """examples:
  soar doctor runs/mine             one line a check; exit code 1 when something is wrong
  soar doctor runs/screen           a folder of soar screen; studies/NAME: of soar study, with all its runs
  soar doctor eval.json             what soar eval wrote
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "doctor",
        help="check a run, screening or study folder, or an eval file: hashes, completeness, every number recomputed",
        description="Checks the hashes of a run folder, that nothing is missing, and that summary, report, promotions "
        "and evaluations follow from the raw lines. Exit code 0: all is well; 1: something is not.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run", type=Path)
    command.set_defaults(action=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from soar.run.audits import audit

    checks = audit(arguments.run)
    for check in checks:
        print(f"{'ok ' if not check.complaints else 'BAD'}  {check.what}{': ' + check.note if check.note else ''}")
        for line in check.complaints:
            print(f"     {visible(line)}")
    bad = sum(bool(check.complaints) for check in checks)
    print(f"{bad} of {len(checks)} checks found something" if bad else f"all {len(checks)} checks are well")
    return 1 if bad else 0
