"""Programs written by a model, run where they can do nothing but compute.

Every program gets a fresh process in fresh namespaces: no network, no other process in sight, an empty environment, a
root that holds the Python library read-only and one small scratch folder in memory, limits on CPU time, wall time,
memory, file size, open files and output, no capability, and a list of allowed system calls that has no way to start a
process or open a socket (`seccomp.py`). The box is made by `jail.py`; this file finds out what the machine can do,
starts the servers, and reads what comes back with bounds on every byte.

Backends, first that passes a trial: `bwrap` (bubblewrap around a server that makes a second box for every program),
`bwrap-single` (where namespaces cannot be nested: one bubblewrap for each program, slower), `namespaces` (user namespaces
without bubblewrap). Without any of them nothing is run: SandboxError says what to install.

The values that a program is expected to give never enter the sandbox. Needs Linux 5.12 or newer on x86_64 or aarch64.
"""

from __future__ import annotations

import functools
import os
import queue
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from soar.boxes import SCRATCH, Box, End, Job, Limits, Lost, Outcome, SandboxError
from soar.types import UserError

__all__ = ["BACKENDS", "End", "Job", "Limits", "Outcome", "Sandbox", "SandboxError", "find_backend"]

BACKENDS = ("bwrap", "bwrap-single", "namespaces")
STARTS = 3  # lost servers in a row for one program until giving up
INSTALL = (
    "Install bubblewrap (Debian, Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap), or allow user "
    "namespaces: inside Docker --security-opt seccomp=unconfined --security-opt apparmor=unconfined, on Ubuntu 24.04 "
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
)

# ---- which backend ----

PROBE = """
import os, socket
def attempt(action):
    try:
        action()
        return "possible"
    except Exception as error:
        return type(error).__name__
def probe():
    return [
        attempt(lambda: socket.socket()),
        attempt(os.fork),
        attempt(lambda: open("/etc/passwd")),
        attempt(lambda: os.listdir("/proc/self")),
        attempt(lambda: open("/probe", "w")),
        attempt(lambda: open("probe", "w")),
        os.getcwd(),
        dict(os.environ),
    ]
"""
EXPECTED = [
    "PermissionError",
    "PermissionError",
    "FileNotFoundError",
    "FileNotFoundError",
    "OSError",
    "possible",
    SCRATCH,
    {"dict": []},
]


def _trial(backend: str) -> str:
    """Why a backend cannot be used here; "" when a program in it is as locked in as it should be."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux, this is {sys.platform}"
    if backend.startswith("bwrap") and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    box = Box(backend)
    try:
        outcome = box.ask(Job(PROBE, "probe", "[((), {})]"), Limits(wall_s=20.0))
    except (Lost, UserError, OSError) as error:
        return str(error)
    finally:
        box.close()
    found = outcome.answers.get(0)
    return "" if found == EXPECTED else f"the trial gave {found or outcome.detail}, expected {EXPECTED}"


@functools.cache
def find_backend(wanted: str = "auto") -> str:
    """The first backend of BACKENDS (or the one wanted) that passes a trial on this machine; decided once a process.

    Raises SandboxError with the reason of each.
    """
    if wanted not in ("auto", *BACKENDS):
        raise SandboxError(f"sandbox {wanted!r}: expected auto, {', '.join(BACKENDS)}")
    reasons = {}
    for backend in BACKENDS if wanted == "auto" else (wanted,):
        reasons[backend] = _trial(backend)
        if not reasons[backend]:
            return backend
    listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
    raise SandboxError(f"no sandbox works on this machine, so no program is run.{listed}\n{INSTALL}")


class Sandbox:
    """Runs programs in `workers` servers. Use it as a context manager, or call `close`.

    backend: `auto` or one of BACKENDS. workers: 0 for one per core, at most 8. Nothing starts before the first program.
    Raises SandboxError where there is no sandbox, or when its servers keep dying.
    """

    def __init__(self, limits: Limits | None = None, backend: str = "auto", workers: int = 0) -> None:
        self.limits = limits or Limits()
        self.wanted = backend
        self.workers = workers or min(os.cpu_count() or 1, 8)
        self._boxes: queue.SimpleQueue[Box] = queue.SimpleQueue()
        self._all: list[Box] = []

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> str:
        """The backend in use; finds one at the first call."""
        return find_backend(self.wanted)

    def close(self) -> None:
        """End the servers. The next program starts new ones."""
        for box in self._all:
            box.close()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One Outcome for each program, in order."""
        while len(self._all) < min(self.workers, len(jobs)):
            self._all.append(Box(self.backend))
            self._boxes.put(self._all[-1])
        if not jobs:
            return []
        if len(jobs) == 1:
            return [self._run_one(jobs[0])]
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self._run_one, jobs))

    def _run_one(self, job: Job) -> Outcome:
        box = self._boxes.get()
        try:
            for start in range(STARTS):
                try:
                    return box.ask(job, self.limits)
                except Lost as error:
                    if start == STARTS - 1:
                        raise SandboxError(f"sandbox {box.backend}: {error}") from error
            raise AssertionError("unreachable")
        finally:
            self._boxes.put(box)
