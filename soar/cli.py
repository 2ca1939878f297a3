"""Command line. Thin: it reads arguments, calls the rooms, prints errors as one message and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress

from soar import (
    cli_check,
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
    streams,
)
from soar.files import STORAGE_ERRNOS, scrub, visible
from soar.types import VERSION, UserError

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
    cli_reference,
)
"""In the order of the help."""

TRAINING = ("torch", "transformers", "peft")  # what the extra `train` brings


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `soar` command. Returns the exit code.

    0 done, 1 refused or failed, 3 paused (a limit, or a promotion on hold), 130 and 143 stopped by SIGINT and SIGTERM.
    """
    streams.prepare()
    try:
        code = _main(argv)
    except BrokenPipeError:
        if not streams.reader_gone(sys.stdout):
            raise
        code = 0  # whoever read the output has gone (`soar ... | head`); what the command did is done
    finally:
        lost = streams.settle()
    if lost is not None:
        _complain(lost)
        return code or 1
    return code


def _main(argv: list[str] | None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return 1
    arguments.root = parser
    arguments.command = ["soar", *(sys.argv[1:] if argv is None else argv)]
    action: Callable[[argparse.Namespace], int] = arguments.action
    again = hasattr(arguments, "resume")
    try:
        return action(arguments)
    except KeyboardInterrupt:
        _complain("interrupted" + ("; continue with --resume" if again else ""))
        return 130
    except UserError as error:
        _complain(visible(scrub(str(error))))
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in TRAINING:
            raise
        _complain(
            f"this command runs a model and needs {error.name}, which is not installed: pip install 'soar-rl[train]'"
        )
        return UserError.exit_code
    except MemoryError:
        _complain("out of memory; free memory" + (", then continue with --resume" if again else ""))
        return 1
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        _complain(f"{visible(str(error.filename or 'the output or a temporary file'))}: {error.strerror}")
        return 1


def _complain(text: str) -> None:
    """One message on standard error, whether or not anyone reads it."""
    with suppress(OSError):
        print(f"soar: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soar",
        description="SOAR: a language model breaks through a reasoning plateau by teaching itself (arXiv 2601.18778).",
        epilog=cli_run.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"soar {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
