"""`soar report`: one page about a run or several, and its figures as files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  soar report runs/mine                                   writes runs/mine/report.html
  soar report runs/seed0 runs/seed1 runs/seed2 --out seeds.html
  soar report runs/mine --figures figures                 every chart as SVG; add --png for PNG
"""


def add(commands: Any) -> None:
    """Add the command to the parser."""
    report = commands.add_parser(
        "report",
        help="one HTML page about a run, or a comparison of several",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    report.add_argument(
        "--out", type=Path, default=None, help="file (default: report.html in the run, or comparison.html)"
    )
    report.add_argument(
        "--figures", type=Path, default=None, metavar="FOLDER", help="write the charts of one run as SVG"
    )
    report.add_argument("--png", action="store_true", help="with --figures: PNG as well")
    report.set_defaults(action=_report, parser=report)


def _report(arguments: argparse.Namespace) -> int:
    from soar.report.page import write_report

    if arguments.figures is not None:
        from soar.report.pictures import write_pictures

        if len(arguments.runs) > 1:
            arguments.parser.error("--figures takes one run")
        for path in write_pictures(arguments.runs[0], arguments.figures, arguments.png):
            print(path)
        return 0
    if len(arguments.runs) > 1:
        arguments.parser.error("one run a page; several runs of one question are a study: soar study")
    print(write_report(arguments.runs[0], arguments.out))
    return 0
