"""Command line. Thin: it reads arguments, calls the rooms, prints errors as one message and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import soar
from soar import cli_check, cli_eval, cli_run, cli_screen, cli_student, cli_study, cli_verify
from soar.types import UserError

COMMANDS = (cli_check, cli_screen, cli_run, cli_student, cli_eval, cli_study, cli_verify)  # in the order of the help


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `soar` command. Returns the exit code: 0 done, 1 refused or failed, 130 interrupted."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return 1
    arguments.command = ["soar", *(sys.argv[1:] if argv is None else argv)]
    action: Callable[[argparse.Namespace], int] = arguments.action
    try:
        return action(arguments)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"soar: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soar",
        description=soar.__doc__,
        epilog=cli_run.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"soar {soar.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
