"""Pieces of work for `test_ray`: functions that worker processes import by name."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

from soar.loop import rollout
from soar.loop.parallel import Tick
from soar.loop.write import TeacherError


def double(env: Any, tick: Tick, offset: int, value: int) -> tuple[int, int]:
    """(2 * value + offset, process id); a large value is slow."""
    for _ in range(3):
        tick()
        time.sleep(0.01 * value)
    return 2 * value + offset, os.getpid()


def fail(env: Any, tick: Tick, how: str) -> None:
    """Fail in one of the ways in which work can fail."""
    errors = {
        "user": TeacherError("the teacher wrote 0 acceptable pairs"),
        "memory": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "bug": KeyError("no such thing"),
    }
    raise errors[how]


def end_once(env: Any, tick: Tick, marker: str, value: int) -> int:
    """The first process that does this leaves a marker and is killed; the next one returns the value."""
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def always_end(env: Any, tick: Tick) -> None:
    """No process survives this."""
    os.kill(os.getpid(), signal.SIGKILL)


def lose_device_once(env: Any, tick: Tick, marker: str) -> int:
    """The first process that does this has lost its GPU; the next one returns 7."""
    path = Path(marker)
    if not path.exists():
        path.touch()
        raise RuntimeError("CUDA error: unspecified launch failure")
    return 7


def warn(env: Any, tick: Tick) -> None:
    """Say what a person should hear, and what only concerns another package."""
    logging.getLogger("soar.loop.population").warning("out of memory: going on with %d students", 2)
    warnings.warn_explicit("half the rows", UserWarning, rollout.__file__, 1)
    warnings.warn("of the tests, not of the package", stacklevel=1)


def stop_once(env: Any, tick: Tick, marker: str) -> int:
    """The first process that does this stands still for ever; the next one returns 7."""
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGSTOP)
    return 7
