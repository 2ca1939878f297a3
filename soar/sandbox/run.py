"""Programs written by a model, run where they can do nothing but compute.

Every program gets a fresh process in fresh namespaces: no network, no other process in sight, an empty environment, a
root that holds the Python library read-only and one small scratch folder in memory, limits on CPU time, wall time,
memory, file size, open files and output, no capability, and a list of allowed system calls that has no way to start a
process or open a socket. The box is made by `jail.py`; this file finds out what the machine can do, starts the servers,
and reads what comes back with bounds on every byte.

Backends, first that passes a trial: `bwrap` (bubblewrap around a server that makes a second box for every program),
`namespaces` (user namespaces without bubblewrap). Without either nothing is run: SandboxError says what to install.

What comes from the server is trusted; what comes from the program is a claim, and the values that it is expected to give
never enter the sandbox. Needs Linux 5.12 or newer on x86_64 or aarch64.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import cache, partial
from pathlib import Path
from typing import Any

from soar.types import UserError

__all__ = ["BACKENDS", "End", "Job", "Limits", "Outcome", "Sandbox", "SandboxError", "find_backend"]

HEADER = struct.Struct(">II")
SLOWER = 4.0  # times the wall time, where a program waited for a core rather than for itself
IDLE_S = 0.1  # of CPU; who used less in all its wall time slept
GRACE_S = 10.0  # beyond a program's wall time until its server is taken for dead
SCRATCH = "/scratch"
SITES = ("site-packages", "dist-packages")
NOBODY = 65534
JAIL = (Path(__file__).parent / "jail.py").read_text(encoding="utf-8")


class SandboxError(UserError):
    """No sandbox on this machine, or one that stopped working. Nothing was run outside of one."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. cpu_s decides, and is rounded up to whole seconds by the kernel; a program that is over
    wall_s having computed for less is run once more, alone and for SLOWER times as long. output_kb bounds its results."""

    cpu_s: int = 2
    wall_s: float = 5.0
    memory_mb: int = 256
    scratch_kb: int = 4096
    file_kb: int = 1024
    open_files: int = 32
    output_kb: int = 256


@dataclass(frozen=True)
class Job:
    """One program. entry and calls: the function to call, and the source of a list of (args, kwargs). inputs: instead of
    calls, the standard inputs that the program is run with, one after another."""

    source: str
    entry: str = ""
    calls: str = "[]"
    inputs: tuple[str, ...] | None = None


class End(str, Enum):
    """How a program ended: by itself; over its CPU or wall time; by a signal; with more output than allowed."""

    DONE = "done"
    TIMEOUT = "timeout"
    KILLED = "killed"
    FLOOD = "flood"


@dataclass(frozen=True)
class Outcome:
    """What came back. answers: index of call or input -> JSON of its value (`plain.decode`); errors: index -> message,
    -1 for the program itself. Both are claims of the program, to be compared with what is expected and no more."""

    end: End
    answers: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    detail: str = ""
    cpu_s: float = 0.0
    starved: bool = False  # over its wall time, but not its CPU time


@cache
def _world() -> dict[str, Any]:
    """What of this machine's files is seen in the box: system libraries and the Python library, without site-packages."""
    library = f"{sys.base_prefix}/{sys.platlibdir}"
    candidates = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", f"{sys.base_prefix}/lib", library]
    binds: list[str] = []
    links: dict[str, str] = {}
    for path in candidates:
        if os.path.islink(path) and os.path.dirname(path) == "/":
            links[path] = os.readlink(path)
        elif os.path.exists(path) and not any(path == have or path.startswith(have + "/") for have in binds):
            binds.append(path)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sites = [f"{base}/{name}/{site}" for base in binds for name in (version, "python3") for site in SITES]
    hidden = [path for path in sites if os.path.isdir(path) and not os.path.islink(path)]
    return {"binds": binds, "links": links, "hidden": hidden}


def _command(backend: str) -> list[str]:
    """The command line of a server."""
    python = os.path.realpath(sys.executable)
    run = [python, "-S", "-s", "-P", "-B", "-c", JAIL]
    if backend == "namespaces":
        return run
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--clearenv", "--new-session"]
    command += ["--setenv", "PYTHONHASHSEED", "0", "--cap-drop", "ALL", "--hostname", "box"]
    command += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    world = _world()
    shown = world["binds"]
    for path in shown if any(python.startswith(path + "/") for path in shown) else [*shown, python]:
        command += ["--ro-bind", path, path]
    for path in world["hidden"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    for link, goal in world["links"].items():
        command += ["--symlink", goal, link]
    # the server makes user namespaces; programs see neither /proc nor /tmp
    command += ["--dev-bind", "/dev/null", "/dev/null", "--bind", "/proc", "/proc", "--dir", "/tmp"]
    return [*command, "--remount-ro", "/", "--", *run]


class Lost(Exception):
    """A server that died or fell silent; never the doing of a program, which cannot reach it."""


class Box:
    """One server process. `ask` runs one program; not for several threads at once. Starts at the first program."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._process: subprocess.Popen[bytes] | None = None
        self._said: Any = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._requests, requests = socket.socketpair()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        try:
            self._process = subprocess.Popen(
                _command(self.backend),
                stdin=requests.fileno(),
                stdout=subprocess.PIPE,
                stderr=self._said,
                env={"PYTHONHASHSEED": "0"},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self._requests.close()
            raise Lost(f"{type(error).__name__}: {error}") from error
        finally:
            requests.close()
        owner = [os.getuid(), os.getgid()] if self.backend == "namespaces" else [NOBODY, NOBODY]
        settings = json.dumps({**_world(), "owner": owner}).encode()  # owner: whom a box maps to nobody
        self._requests.sendall(HEADER.pack(len(settings), 0) + settings)
        return self._process

    def close(self) -> None:
        """End the server. The next program starts another one."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdout is not None
        self._requests.close()
        process.stdout.close()
        try:
            process.wait(1.0)  # it ends with its input
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._said.close()

    def ask(self, job: Job, limits: Limits) -> Outcome:
        """Run one program. Raises Lost when the server died, SandboxError when it could not make a box."""
        request: dict[str, Any] = {"source": job.source, "limits": asdict(limits)}
        request |= {"entry": job.entry, "calls": job.calls} if job.inputs is None else {"inputs": job.inputs}
        payload = json.dumps(request).encode()
        process = self._process or self._start()
        results, write_end = os.pipe()  # of this program alone: its flags are nobody else's
        try:
            try:
                header = HEADER.pack(len(payload), max(1, int(limits.wall_s * 1000)))
                socket.send_fds(self._requests, [header], [write_end])
            finally:
                os.close(write_end)
            report, output = self._exchange(process, payload, results, limits)
        except (Lost, OSError) as error:
            self._said.seek(0)
            said = self._said.read(10_000).decode("utf-8", "replace").strip().splitlines()
            self.close()
            raise Lost(": ".join([str(error), *said[-1:]])) from error
        finally:
            os.close(results)
        if report["setup"] is not None:
            self.close()
            raise SandboxError(f"sandbox {self.backend}: {report['setup']}")
        return _outcome(report, output, limits)

    def _exchange(
        self, process: subprocess.Popen[bytes], data: bytes, results: int, limits: Limits
    ) -> tuple[dict[str, Any], bytes | None]:
        """Send the request, gather results until the server reports. Results are None when they exceed their limit."""
        assert process.stdout is not None
        send, control, most = self._requests.fileno(), process.stdout.fileno(), limits.output_kb * 2**10
        os.set_blocking(results, False)
        deadline = time.monotonic() + limits.wall_s + GRACE_S
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(results, select.POLLIN)
        poll.register(send, select.POLLOUT)
        report, output = b"", bytearray()
        while len(report) < 4 or len(report) < 4 + int.from_bytes(report[:4], "big"):
            events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not events:
                raise Lost("the server of the sandbox does not answer")
            if results in events and not _drain(results, output, most):
                poll.unregister(results)  # the program has ended
            if send in events:
                data = data[self._requests.send(data[:65536], socket.MSG_DONTWAIT) :]
                if not data:
                    poll.unregister(send)
            if control in events:
                piece = os.read(control, 65536)
                if not piece:
                    raise Lost("the server of the sandbox ended")
                report += piece
        if data:
            raise Lost("the server of the sandbox did not read its request")
        _drain(results, output, most)
        return json.loads(report[4:]), None if len(output) > most else bytes(output)


def _drain(results: int, output: bytearray, most: int) -> bool:
    """Read what is there; keep one byte more than `most` and forget the rest. False at the end of the pipe."""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(results, 65536):
            output += piece[: most + 1 - len(output)]
        return False
    return True


def _outcome(report: dict[str, Any], output: bytes | None, limits: Limits) -> Outcome:
    """The reading of a report and of the lines that a program sent. A line that is none of ours is left out."""
    status, cpu_s = int(report["status"]), float(report["cpu_s"])
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    spent = number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s > limits.cpu_s - 0.2)
    if report["timed_out"] or spent:
        detail = f"over {limits.cpu_s} s of CPU" if spent else f"over {limits.wall_s:g} s, with {cpu_s:.1f} s of CPU"
        return Outcome(End.TIMEOUT, detail=detail, cpu_s=cpu_s, starved=not spent and cpu_s > IDLE_S)
    if output is None:
        return Outcome(End.FLOOD, detail=f"more than {limits.output_kb} kB of results", cpu_s=cpu_s)
    if number:
        return Outcome(End.KILLED, detail=f"ended by {signal.Signals(number).name}", cpu_s=cpu_s)
    answers: dict[int, Any] = {}
    errors: dict[int, str] = {}
    for line in output.split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, list) and len(row) in (2, 3) and type(row[0]) is int:
            if len(row) == 2:
                answers.setdefault(row[0], row[1])
            else:
                errors.setdefault(row[0], str(row[2])[:200].encode("utf-8", "replace").decode())
    return Outcome(End.DONE, answers, errors, next(iter(errors.values()), ""), cpu_s)


BACKENDS = ("bwrap", "namespaces")
STARTS = 3  # lost servers in a row for one program until giving up
INSTALL = (
    "Install bubblewrap (Debian, Ubuntu: apt install bubblewrap; Fedora: dnf install bubblewrap), or allow user "
    "namespaces: inside Docker --security-opt seccomp=unconfined --security-opt apparmor=unconfined, on Ubuntu 24.04 "
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0"
)

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
EXPECTED = [*["PermissionError"] * 2, *["FileNotFoundError"] * 2, "OSError", "possible", SCRATCH, {"dict": []}]


def _trial(backend: str) -> str:
    """Why a backend cannot be used here; "" when a program in it is as locked in as it should be."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux, this is {sys.platform}"
    if backend == "bwrap" and shutil.which("bwrap") is None:
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


@cache
def find_backend(wanted: str = "auto") -> str:
    """The first of BACKENDS, or the one wanted, that passes a trial here. Raises SandboxError with their reasons."""
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

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the servers. The next program starts new ones."""
        for box in self._all:
            box.close()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """One Outcome for each program, in order."""
        while len(self._all) < min(self.workers, len(jobs)):
            self._all.append(Box(find_backend(self.wanted)))
            self._boxes.put(self._all[-1])
        with ThreadPoolExecutor(self.workers) as pool:
            outcomes = list(pool.map(partial(self._run_one, limits=self.limits), jobs))
        longer = replace(self.limits, wall_s=SLOWER * self.limits.wall_s)
        pairs = zip(jobs, outcomes, strict=True)
        return [self._run_one(job, longer) if outcome.starved else outcome for job, outcome in pairs]

    def _run_one(self, job: Job, limits: Limits) -> Outcome:
        box = self._boxes.get()
        try:
            for _ in range(STARTS - 1):
                with contextlib.suppress(Lost):
                    return box.ask(job, limits)
            return box.ask(job, limits)
        except Lost as error:
            raise SandboxError(f"sandbox {box.backend}: {error}") from error
        finally:
            self._boxes.put(box)
