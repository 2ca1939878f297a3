"""Command line. Thin: it reads arguments, calls the rooms, prints errors as one message and an exit code."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated

import typer
from typer import Option

from soar.cli import look, reference, start, take
from soar.config import RECIPES, TRUSTED
from soar.files import STORAGE_ERRNOS, scrub, visible
from soar.types import VERSION, UserError

PANELS: dict[str, dict[str, Callable[..., int | None]]] = {
    "Start": {"init": start.init, "check": start.check, "screen": start.screen, "run": start.run},
    "Look": {"watch": look.watch, "report": look.report, "doctor": look.doctor, "verify": look.verify},
    "Take": {
        "export": take.export, "eval": take.evaluate, "student": take.student, "study": take.study,
        "review": take.review,
    },
}  # fmt: skip
TRAINING = ("torch", "transformers", "peft")  # what the extra `train` brings
RESUMABLE = ("screen", "run", "student", "study")
SEVERAL = ("--adapter", "--seeds")  # take all values up to the next option
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of click, or of the copy of it that typer brings

_NAMES = {"Recipes": RECIPES.glob("*.toml"), "Studies": (RECIPES / "studies").glob("*.toml")}
app = typer.Typer(
    epilog="\n\n".join(f"{what}: {', '.join(sorted(path.stem for path in paths))}" for what, paths in _NAMES.items()),
    help="SOAR: a language model breaks through a reasoning plateau by teaching itself (arXiv 2601.18778).",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.command("config-reference", hidden=True)(reference.config_reference)


def _version(asked: bool) -> None:
    if asked:
        print(f"soar {VERSION}")
        raise typer.Exit


@app.callback()
def _soar(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
    trust_run: Annotated[
        bool, Option("--trust-run", help="Run code that a run folder names (anywhere in the command).")
    ] = False,
) -> None:
    TRUSTED.set(trust_run)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `soar` command. Returns the exit code.

    0 done, 1 refused or failed, 2 wrong usage, 3 paused (a limit, or a promotion on hold), 130 and 143 stopped by SIGINT
    and SIGTERM.
    """
    _open_streams()
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        if not _reader_gone():
            raise
        code = 0  # whoever read the output has gone (`soar ... | head`); what the command did is done
    finally:
        lost = _settle_streams()
    if lost is not None and code == 0:
        _complain(lost)
        return 1
    return code


def _main(words: list[str]) -> int:
    if "_SOAR_COMPLETE" in os.environ:
        app(prog_name="soar")
    again = "; continue with --resume" if words[:1] and words[0] in RESUMABLE else ""
    try:
        with typer.main.get_command(app).make_context(
            "soar", _spread(words) or ["--help"], obj=["soar", *words]
        ) as ctx:
            return ctx.command.invoke(ctx) or 0
    except typer.Exit as end:
        return end.exit_code
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except KeyboardInterrupt:
        _complain(f"interrupted{again}{again and ' (where nothing was saved yet, with the same command)'}")
        return 130
    except UserError as error:
        _complain(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in TRAINING:
            raise
        install = "pip install 'soar-rl[train]'"
        _complain(f"this command runs a model and needs {error.name}, which is not installed: {install}")
        return 1
    except MemoryError:
        _complain(f"out of memory; free memory{again.replace('; ', ', then ')}")
        return 1
    except OSError as error:
        if error.errno not in STORAGE_ERRNOS:
            raise
        _complain(f"{error.filename or 'the output or a temporary file'}: {error.strerror}")
        return 1


def _spread(words: list[str]) -> list[str]:
    """`--adapter A B` as `--adapter A --adapter B`; --trust-run first, since it belongs to every command."""
    spread = ["--trust-run"] if "--trust-run" in words else []
    option = None
    for word in (word for word in words if word != "--trust-run"):
        if word.startswith("-"):
            option = word if word in SEVERAL else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(word)
    return spread


def _complain(text: str) -> None:
    """One message on standard error, whether or not anyone reads it; no secrets, nothing that moves the cursor."""

    with suppress(OSError):
        print(f"soar: {visible(scrub(text))}", file=sys.stderr, flush=True)


def _open_streams() -> None:
    """Make the standard streams safe to print to, whatever the caller gave this process.

    A closed descriptor is taken up with the null device: the next file to be opened would get its number, and what a
    library prints would land in that file. A character that the terminal's encoding lacks is printed as an escape.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
        reconfigure = getattr(getattr(sys, name), "reconfigure", None)
        if number and reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _reader_gone() -> bool:
    """Whether standard output is a pipe that has no reader left. Never on Windows, which cannot say."""
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False


def _settle_streams() -> str | None:
    """Write out what the streams still hold; what cannot be written is dropped, or the interpreter would fail on it again.

    Returns why standard output could not be written, None when it could or when its reader has gone.
    """
    reason = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                reason = f"standard output cannot be written: {error.strerror}"
    return reason
