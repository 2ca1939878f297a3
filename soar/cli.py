"""Command line. Thin: it reads arguments, calls the rooms, prints errors as one message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import soar
from soar import (
    cli_check,
    cli_doctor,
    cli_eval,
    cli_export,
    cli_init,
    cli_reference,
    cli_report,
    cli_review,
    cli_run,
    cli_screen,
    cli_student,
    cli_study,
    cli_verify,
    cli_watch,
)
from soar.figures import visible
from soar.scrub import scrub
from soar.types import UserError

COMMANDS = (
    cli_init,
    cli_check,
    cli_screen,
    cli_run,
    cli_watch,
    cli_report,
    cli_student,
    cli_eval,
    cli_study,
    cli_export,
    cli_verify,
    cli_review,
    cli_doctor,
    cli_reference,
)
"""In the order of the help."""

TRAINING = ("torch", "transformers", "peft")  # what the extra `train` brings


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `soar` command. Returns the exit code.

    0 done, 1 refused or failed, 3 paused (a limit, or a promotion on hold), 130 and 143 stopped by SIGINT and SIGTERM.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return 1
    arguments.root = parser
    arguments.command = ["soar", *(sys.argv[1:] if argv is None else argv)]
    code = _do(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # nobody reads it any more; the interpreter would fail on flushing it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _do(arguments: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = arguments.action
    try:
        return action(arguments)
    except BrokenPipeError:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return 0  # whoever read the output has gone (`soar ... | head`); what the command did is done
        raise
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"soar: {visible(scrub(str(error)))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in TRAINING:
            raise
        print(
            f"soar: this command runs a model and needs {error.name}, which is not installed: pip install 'soar-rl[train]'",
            file=sys.stderr,
        )
        return UserError.exit_code


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
