"""Programs written by a model, run where they can do nothing but compute (docs/code.md).

Every program gets a fresh process, locked in by `jail.py`. This file finds out what the machine can do, starts the
server that makes these processes, and reads what comes back with bounds on every byte. Backends, first that passes a
trial: `bwrap` (bubblewrap around the server), `namespaces` (user namespaces alone). Without either nothing is run. What
comes from the server is trusted; what comes from the program is a claim, and the values that it is expected to give
never enter the sandbox. Needs Linux 5.12 or newer.
"""

import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from soar.files import asset
from soar.types import UserError

GRACE_S = 10.0  # beyond a program's wall time until its server is taken for dead
SITES = ("site-packages", "dist-packages")
NOBODY = 65534
JAIL = (Path(__file__).parent / "jail.py").read_text(encoding="utf-8")
BOX = asset("sandbox")
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
KILL_PROCESS, NOT_PERMITTED = (RETURN, 0, 0, 0x80000000), (RETURN, 0, 0, 0x00050001)  # SECCOMP_RET_ERRNO | EPERM
ALLOW = (RETURN, 0, 0, 0x7FFF0000)
NUMBER, ARCHITECTURE, COMMAND = 0, 4, 24  # offsets in struct seccomp_data; the second argument, little-endian
X32_BIT = 0x40000000

BACKENDS = ("bwrap", "namespaces")


class SandboxError(UserError):
    """No sandbox on this machine, or one that stopped working. Nothing was run outside of one."""


class Limits(NamedTuple):
    """What one program may use. A program that is over its wall time with CPU time to spare is run once more."""

    cpu_s: int = 2  # CPU seconds; this limit decides
    wall_s: float = 15.0  # for programs that sleep; long enough for one that waits for a core
    memory_mb: int = 256  # of address space
    output_kb: int = 256  # of results


class Job(NamedTuple):
    """One program, and what to ask it."""

    source: str
    entry: str = ""  # the function to call; "": the whole program is run, and its value is what it prints
    calls: str = "[(('',), {})]"  # source of a list of (args, kwargs); of a whole program its standard inputs


class End(str, Enum):
    """How a program ended: by itself; over its CPU or wall time; by a signal, or with more output than allowed."""

    DONE = "done"
    TIMEOUT = "timeout"
    KILLED = "killed"


@dataclass(frozen=True)
class Outcome:
    """What came back of one program. Its values are claims, to be compared with what is expected and no more."""

    end: End
    answers: dict[int, Any] = field(default_factory=dict)  # index of the call -> JSON of its value (`code.decode`)
    detail: str = ""  # why the first call without a value has none
    cpu_s: float = 0.0  # CPU seconds that were used


def calls(machine: str) -> dict[str, int]:
    """Name and number of the allowed system calls (assets/sandbox.toml). Raises SandboxError for other processors."""
    if machine not in BOX["machines"]:
        raise SandboxError(f"the sandbox knows the system calls of {', '.join(BOX['machines'])}, not of {machine}")
    rows = (pair.replace("=", "/").split("/") for pair in BOX["allowed"].split())
    numbers = ((row[0], row[1 + list(BOX["machines"]).index(machine)]) for row in rows)
    return {name: int(number) for name, number in numbers if number != "-"}


def build_filter(machine: str) -> bytes:
    """The seccomp filter as an array of struct sock_filter. Raises SandboxError for a processor that is not known."""
    steps = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, BOX["machines"].get(machine, 0)), KILL_PROCESS]
    steps += [(LOAD, 0, 0, NUMBER), (AT_LEAST, 0, 1, X32_BIT), KILL_PROCESS]  # the x32 calls have numbers of their own
    for name, number in calls(machine).items():
        tests = [step for command in BOX["commands"].get(name, ()) for step in ((EQUAL, 0, 1, command), ALLOW)]
        rule = [(LOAD, 0, 0, COMMAND), *tests, NOT_PERMITTED] if tests else [ALLOW]
        steps += [(EQUAL, 0, len(rule), number), *rule]
    return b"".join(struct.pack("=HBBI", *step) for step in [*steps, NOT_PERMITTED])


@cache
def _world() -> dict[str, Any]:
    """What of this machine's files is seen in the box: system libraries and the Python library, without site-packages."""
    library = f"{sys.base_prefix}/{sys.platlibdir}"
    candidates = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", f"{sys.base_prefix}/lib", library]
    binds, links = list[str](), dict[str, str]()
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
    command = [shutil.which("bwrap") or "bwrap", *BOX["bwrap"]["before"].split()]
    world, shown = _world(), _world()["binds"]
    for path in shown if any(python.startswith(path + "/") for path in shown) else [*shown, python]:
        command += ["--ro-bind", path, path]
    for path in world["hidden"]:
        command += ["--tmpfs", path, "--remount-ro", path]
    for link, goal in world["links"].items():
        command += ["--symlink", goal, link]
    return [*command, *BOX["bwrap"]["behind"].split(), *run]


class Lost(SandboxError):
    """A server that died or fell silent; never the doing of a program, which cannot reach it. The next one gets it."""


class Sandbox(AbstractContextManager["Sandbox"]):
    """Runs programs in a server, one after another; not for several threads at once. A context manager, or call `close`.

    backend: `auto` or one of BACKENDS. Nothing starts before the first program. Raises SandboxError where this machine has
    no sandbox, or when the server keeps dying.
    """

    def __init__(self, limits: Limits | None = None, backend: str = "auto") -> None:
        self.limits, self.backend = limits or Limits(), backend
        self._process: subprocess.Popen[bytes] | None = None

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        cpu = platform.machine()
        owner = [os.getuid(), os.getgid()] if self.backend == "namespaces" else [NOBODY, NOBODY]  # mapped to nobody
        settings = _world() | {"owner": owner, "filter": build_filter(cpu).hex(), "clone": BOX["clone"][cpu]}
        settings["warm"] = BOX["warm"].split()
        self._requests, requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        with requests:
            self._process = subprocess.Popen(
                [*_command(self.backend), json.dumps(settings)], stdin=requests.fileno(), stdout=subprocess.DEVNULL,
                stderr=self._said, env={"PYTHONHASHSEED": "0"}, cwd="/", start_new_session=True,
            )  # fmt: skip

    def close(self) -> str:
        """End the server; the next program starts another one. Returns the last line that it wrote."""
        process, self._process = self._process, None
        if process is None:
            return ""
        self._requests.close()  # a server in bubblewrap ends with its input
        process.kill()
        process.wait()
        with self._said as said:
            said.seek(0)
            return "".join(said.read(10_000).decode("utf-8", "replace").strip().splitlines()[-1:])

    def run(self, job: Job) -> Outcome:
        """Run one program; a second time where its server died, or where it waited too long with CPU time to spare."""
        if self._process is None:
            self.backend = find_backend(self.backend)
        with suppress(Lost):
            outcome = self.ask(job)
            if outcome.end is not End.TIMEOUT or outcome.cpu_s > self.limits.cpu_s - 0.2:
                return outcome
        return self.ask(job)

    def ask(self, job: Job) -> Outcome:
        """Run one program in a backend that is known. Raises Lost when the server died, SandboxError when it made no box."""
        request, most = {**job._asdict(), "limits": self.limits._asdict()}, self.limits.output_kb * 2**10
        with open(os.memfd_create("request"), "w+b") as asked, open(os.memfd_create("results"), "w+b") as results:
            asked.write(json.dumps(request).encode())
            asked.flush()
            try:
                if self._process is None:
                    self._start()
                self._requests.settimeout(self.limits.wall_s + GRACE_S)
                wall_ms = str(max(1, int(self.limits.wall_s * 1000))).encode()
                socket.send_fds(self._requests, [wall_ms], [asked.fileno(), results.fileno()])
                said = self._requests.recv(10_000)
            except OSError as error:
                said = f"{type(error).__name__}: {error}".encode()
            if not said.startswith(b"{"):
                raise Lost(f"sandbox {self.backend}: {said.decode() or 'its server ended'}: {self.close()}")
            report, output = json.loads(said), os.pread(results.fileno(), most + 1, 0)
        if report["setup"] is not None:
            self.close()
            raise SandboxError(f"sandbox {self.backend}: {report['setup']}")
        return _outcome(report, output, self.limits)


def _outcome(report: dict[str, Any], output: bytes, limits: Limits) -> Outcome:
    """The reading of a report and of the lines that a program sent. A line that is none of ours is left out."""
    status, cpu_s = int(report["status"]), float(report["cpu_s"])
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    spent = number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_s > limits.cpu_s - 0.2)
    if report["timed_out"] or spent:
        detail = f"over {limits.cpu_s} s of CPU" if spent else f"over {limits.wall_s:g} s, with {cpu_s:.1f} s of CPU"
        return Outcome(End.TIMEOUT, detail=detail, cpu_s=cpu_s)
    if number or len(output) > limits.output_kb * 2**10:
        why = f"ended by {signal.Signals(number).name}" if number else f"more than {limits.output_kb} kB of results"
        return Outcome(End.KILLED, detail=why, cpu_s=cpu_s)
    answers, detail = dict[int, Any](), ""
    for line in output.split(b"\n"):
        with suppress(ValueError, RecursionError):
            match json.loads(line):
                case [index, value] if type(index) is int:
                    answers.setdefault(index, value)
                case [str() as why]:
                    detail = detail or why[:200].encode("utf-8", "replace").decode()
    return Outcome(End.DONE, answers, detail, cpu_s)


def _trial(backend: str) -> str:
    """Why a backend cannot be used here; "" when a program in it is as locked in as it should be."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux, this is {sys.platform}"
    try:
        with Sandbox(Limits(), backend) as sandbox:
            outcome = sandbox.ask(Job(BOX["trial"]["program"], "probe", "[((), {})]"))
    except (UserError, OSError) as error:
        return str(error)
    answer, expected = outcome.answers.get(0), BOX["trial"]["expected"]
    return "" if answer == expected else f"the trial gave {answer or outcome.detail}, expected {expected}"


@cache
def find_backend(wanted: str = "auto") -> str:
    """The first of BACKENDS, or the one wanted, that passes a trial here. Raises SandboxError with their reasons."""
    if wanted not in ("auto", *BACKENDS):
        raise SandboxError(f"sandbox {wanted!r}: expected auto, {', '.join(BACKENDS)}")
    listed = ""
    for backend in BACKENDS if wanted == "auto" else (wanted,):
        if not (reason := _trial(backend)):
            return backend
        listed += f"\n  {backend}: {reason}"
    raise SandboxError(f"no sandbox works on this machine, so no program is run.{listed}\n{BOX['install']}")
