"""`soar watch`: look at a run from another terminal."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  soar watch runs/mine              a live view until the run is finished or paused
  soar watch runs/mine --once       the view once, for a script or a finished run
  soar watch runs/mine | tee log    plain lines, one for each event
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    watch = commands.add_parser(
        "watch",
        help="a running or finished run, from any terminal",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    watch.add_argument("run", type=Path, help="run folder")
    watch.add_argument("--once", action="store_true", help="show the run as it is now and end")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="look this often (default: 2)")
    watch.set_defaults(action=_watch)


def _watch(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from soar.report.watch import follow

    class Quiet(Console):
        """Ends without a word when its reader went away."""

        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(0)

    try:
        follow(arguments.run, Quiet(highlight=False), max(0.1, arguments.every), arguments.once)
    except KeyboardInterrupt:
        return 0  # the run goes on; only the looking ends
    return 0
