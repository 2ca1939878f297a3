"""`soar review`: show a promotion that is on hold, and decide on it."""

from __future__ import annotations

import argparse
import getpass
from pathlib import Path
from typing import Any

from soar.run import folder as review
from soar.run.interrupts import resume_command

EXAMPLES = """examples:
  soar review runs/mine                       the promotion that waits, with its questions
  soar review runs/mine --accept              or --reject; then soar run --out runs/mine --resume
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "review",
        help="show a promotion that waits for a person, accept or reject it",
        description="A run with promotion.review = true (--review) stops at every promotion. This shows the questions "
        "and their effect on hard problems, and takes the decision; then continue the run with --resume.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("run", type=Path)
    decision = command.add_mutually_exclusive_group()
    decision.add_argument("--accept", dest="decision", action="store_const", const=review.ACCEPTED)
    decision.add_argument("--reject", dest="decision", action="store_const", const=review.REJECTED)
    command.add_argument("--by", default=None, metavar="NAME", help="who decides (default: the user's login name)")
    command.set_defaults(action=_review)


def _review(arguments: argparse.Namespace) -> int:
    if arguments.decision is not None:
        review.decide(arguments.run, arguments.decision, arguments.by or _login())
    print("\n".join(review.lines(review.read(arguments.run))))
    if arguments.decision is not None:
        print(f"continue with: {resume_command(arguments.run)}")
    return 0


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in the password file
        return "unknown"
