"""Standard output and error that nobody reads, that are closed, full, or unable to show every character."""

from __future__ import annotations

import os
import select
import sys
from typing import TextIO


def prepare() -> None:
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
            mode = "r" if number == 0 else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def reader_gone(stream: TextIO) -> bool:
    """Whether the pipe behind a stream has no reader left (`soar ... | head`)."""
    try:
        stream.flush()
        number = stream.fileno()
    except BrokenPipeError:
        return True
    except (OSError, ValueError):  # not a file, or closed
        return False
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def settle() -> str | None:
    """Write out what the streams still hold; what cannot be written is dropped, or the interpreter would fail on it again.

    Returns why standard output could not be written, None when it could or when its reader has gone.
    """
    reason = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            _drop(stream)
        except OSError as error:
            _drop(stream)
            if stream is sys.stdout:
                reason = f"standard output cannot be written: {error.strerror}"
    return reason


def _drop(stream: TextIO) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
