"""Command line. Thin: it reads arguments, calls the rooms, prints errors as one message and an exit code."""

import errno
import os
import select
import sys
from contextlib import suppress
from typing import Annotated

import typer
from typer import Option

from soar.cli import commands
from soar.config import RECIPES, TRUSTED
from soar.files import STORAGE_ERRNOS, scrub, visible
from soar.types import VERSION, UserError

PANELS = {
    "Start": ("init", "check", "screen", "run"),
    "Look": ("watch", "report", "doctor", "verify"),
    "Take": ("export", "eval_", "student", "measure", "study", "review"),
}
UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of click, or of the copy of it that typer brings

_NAMES = {"Recipes": RECIPES.glob("*.toml"), "Studies": (RECIPES / "studies").glob("*.toml")}
app = typer.Typer(
    epilog="\n\n".join(f"{what}: {', '.join(sorted(path.stem for path in paths))}" for what, paths in _NAMES.items()),
    help="SOAR: a teacher model writes practice questions and is paid by what its students improve (arXiv 2601.18778).",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in PANELS.items():
    for _command in _commands:
        app.command(_command.strip("_"), rich_help_panel=_panel)(getattr(commands, _command))


@app.callback()
def _soar(
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    trust_run: Annotated[bool, Option("--trust-run", help="Run code that a run folder names (anywhere).")] = False,
) -> None:
    """Both are read before the command (`_main`)."""


def main(argv: list[str] | None = None) -> int:
    """The `soar` command; returns 0 done, 1 refused or failed, 2 wrong usage, 3 paused, 130 and 143 stopped by a signal."""
    words = sys.argv[1:] if argv is None else argv
    again = "; continue with --resume" if {*words[:1]} & {"screen", "run", "student", "study"} else ""
    if not os.environ.get("COLUMNS", "80").strip("0"):
        del os.environ["COLUMNS"]  # rich would show nothing at all
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: its number would go to the next file, with what libraries print
            os.set_inheritable(nowhere := os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, os.fdopen(nowhere, "r+"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    try:
        return _main(words)
    except typer.Exit as end:
        return end.exit_code
    except UsageError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except KeyboardInterrupt:
        return _complain(f"interrupted{again}{again and ' (where nothing was saved yet, with the same command)'}", 130)
    except UserError as error:
        return _complain(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "peft"):  # what the extra `train` brings
            raise
        install = "pip install 'soar-rl[train]'"
        return _complain(f"this command runs a model and needs {error.name}, which is not installed: {install}")
    except MemoryError:
        return _complain(f"out of memory; free memory{again.replace('; ', ', then ')}")
    except OSError as error:
        gone = error.errno == errno.EPIPE and _reader_gone()
        if not gone and error.errno not in {errno.ENOENT, *STORAGE_ERRNOS}:  # ENOENT: what a folder that is gone says
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # what it still holds is dropped, or the interpreter would fail on it again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        place = error.filename2 or error.filename or "the output, a temporary file or the working folder"
        return 0 if gone else _complain(f"{place}: {error.strerror}; make room, permit it or name another place")


def _main(words: list[str]) -> int:
    if "_SOAR_COMPLETE" in os.environ:
        app(prog_name="soar")
    command, rest = typer.main.get_command(app), [word for word in words if word != "--trust-run"]
    if rest[:1] == ["--version"]:
        print(f"soar {VERSION}")
        return 0
    TRUSTED.set(len(rest) < len(words))
    with command.make_context("soar", rest or ["--help"], obj=["soar", *words]) as ctx:
        code: int = ctx.command.invoke(ctx) or 0
    sys.stdout.flush()
    return code


def _complain(text: str, code: int = 1) -> int:
    """One message on standard error, whether or not anyone reads it; no secrets, nothing that moves the cursor."""
    with suppress(OSError):
        print(f"soar: {visible(scrub(text))}", file=sys.stderr, flush=True)
    return code


def _reader_gone() -> bool:
    """Whether whoever read the output has gone (`soar ... | head`); what the command did is done."""
    with suppress(OSError, ValueError, AttributeError):  # no descriptor, or a system without poll
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    return False
