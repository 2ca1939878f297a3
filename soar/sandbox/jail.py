"""What runs inside the sandbox: a small server that makes a fresh box for every program and runs it there.

This file is a script. `sandbox.py` starts it with an empty environment; no other file imports it, and it uses nothing
but the standard library. It is the one place of the package where text written by a model is executed.

One request is a header on fd 0 (length of the payload, wall time in milliseconds) and the payload, JSON. The server
reads the header only. A forked child reads the payload, locks itself in, says so, and runs the program, whose values
go down a pipe that only the child writes and only the parent of all this reads. So nothing of one check, neither
program nor results, is ever in the memory from which the next check is forked. The server says on fd 1 how the child
ended. No expected value comes here at all: what a program can forge is its own answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import platform
import random
import resource
import select
import signal
import struct
import sys
from typing import Any

WARM = (
    "bisect collections copy dataclasses datetime decimal fractions functools heapq io itertools math operator queue re "
    "statistics string textwrap typing"
)
HEADER = struct.Struct(">II")
RESULTS, SETUP = 3, 4  # file descriptors of the child
NEW_EVERYTHING = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # user mnt pid net ipc uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
READ_ONLY = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, _NOSUID, _NODEV
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442  # the same on every machine
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CALLS = {  # clone, pivot_root, seccomp, capset
    "x86_64": (56, 155, 317, 126),
    "aarch64": (220, 41, 277, 91),
}
BASE, SCRATCH = "/tmp", "/scratch"

libc = ctypes.PyDLL(None, use_errno=True)


def must(result: int, what: str) -> int:
    """The result of a libc call. Raises OSError when it is -1."""
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def read_exactly(fd: int, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the stream."""
    data = b""
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            break
        data += piece
    return data


# ---- the box, made by the child itself ----


def write_file(path: str, text: str) -> None:
    """Write to a file of /proc in one call."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def make_root(settings: dict[str, Any], scratch_kb: int) -> None:
    """A new root with read-only system libraries, an empty scratch folder in memory, and nothing else; no /proc, /etc."""
    pivot_root = CALLS[platform.machine()][1]
    user, group = settings["owner"]
    write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"65534 {user} 1")
    write_file("/proc/self/gid_map", f"65534 {group} 1")
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    mount_memory(BASE, MS_NOSUID | MS_NODEV, "size=64k,nr_inodes=128,mode=755")
    for source in settings["binds"]:
        target = BASE + source
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        must(libc.mount(source.encode(), target.encode(), None, MS_BIND | MS_REC, None), f"bind {source}")
        set_read_only(target, AT_RECURSIVE)
    for hidden in settings["hidden"]:
        mount_memory(BASE + hidden, MS_RDONLY, "size=4k,nr_inodes=1")
    for link, goal in settings["links"].items():
        os.symlink(goal, BASE + link)
    os.mkdir(BASE + SCRATCH)
    mount_memory(BASE + SCRATCH, MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={scratch_kb}k,nr_inodes=256,mode=700")
    set_read_only(BASE, 0)
    os.chdir(BASE)
    must(libc.syscall(pivot_root, b".", b"."), "pivot_root")
    must(libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/")


def mount_memory(path: str, flags: int, options: str) -> None:
    """An empty file system in memory."""
    must(libc.mount(b"box", path.encode(), b"tmpfs", flags, options.encode()), f"tmpfs on {path}")


def set_read_only(path: str, flags: int) -> None:
    """Make a mount read-only, whatever other flags it must keep."""
    attributes = struct.pack("=QQQQ", READ_ONLY, 0, 0, 0)
    must(libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, len(attributes)), f"read-only {path}")


def set_limits(limits: dict[str, int]) -> None:
    """Resource limits that the program cannot raise again. CPU in seconds, memory in MB, the rest in kB or pieces."""
    values = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_mb"] * 2**20,
        resource.RLIMIT_FSIZE: limits["file_kb"] * 2**10,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 8 * 2**20,
    }
    for kind, value in values.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def give_up_rights(program: bytes) -> None:
    """No capability, no way to gain one, and no system call but those that `program` (seccomp) allows."""
    _, _, seccomp, capset = CALLS[platform.machine()]
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    must(libc.syscall(capset, struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
    must(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    must(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    steps = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.addressof(steps)
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, pointer))
    must(libc.syscall(seccomp, 1, 0, whole), "seccomp")


# ---- the program ----


def encode(value: object) -> object:
    """A value of a built-in type as JSON that keeps its type. Raises TypeError for any other value."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value if type(value) in (type(None), bool, int, float, str) else _base(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    for name, kind in (("tuple", tuple), ("set", set), ("frozenset", frozenset)):
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__} cannot be compared")


def _base(value: Any) -> object:
    """A value of a subclass of a plain type as one of that type."""
    return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))


def send(line: object) -> None:
    """One line of results."""
    data = json.dumps(line).encode() + b"\n"
    while data:
        data = data[os.write(RESULTS, data) :]


def answer_calls(source: str, entry: str, calls: str) -> None:
    """Load the program, call its function with each of the arguments, and send [index, value] or [index, null, why]."""
    scope: dict[str, Any] = {"__name__": "solution"}
    exec(compile(source, "solution.py", "exec"), scope)
    function: Any = scope.get(entry)
    for index, (arguments, keywords) in enumerate(eval(calls)):
        try:
            send([index, encode(function(*arguments, **keywords))])
        except BaseException as error:
            send([index, None, f"{type(error).__name__}: {error}"[:200]])


def run_program(source: str, inputs: list[str], output_kb: int) -> None:
    """Run the program once for each input and send [index, what it printed] or [index, null, why]."""
    code = compile(source, "solution.py", "exec")
    for index, text in enumerate(inputs):
        for fd, name, data in ((0, "in", text.encode("utf-8", "replace")), (1, "out", b"")):
            file = os.open(f"{SCRATCH}/{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.write(file, data)
            os.lseek(file, 0, os.SEEK_SET)
            if file != fd:  # the last program may have closed it
                os.dup2(file, fd)
                os.close(file)
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="replace")
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="replace"
        )
        random.seed(0)
        try:
            with contextlib.suppress(SystemExit):
                exec(code, {"__name__": "__main__"})
            sys.stdout.flush()
            os.lseek(1, 0, os.SEEK_SET)
            send([index, os.read(1, output_kb * 2**10).decode("utf-8", "replace")])
        except BaseException as error:
            send([index, None, f"{type(error).__name__}: {error}"[:200]])


def run(request: dict[str, Any]) -> None:
    """Run what was asked for; the process ends here."""
    try:
        os.chdir(SCRATCH)
        random.seed(0)
        if "inputs" in request:
            run_program(request["source"], request["inputs"], request["limits"]["output_kb"])
        else:
            answer_calls(request["source"], request["entry"], request["calls"])
    except BaseException as error:
        send([-1, None, f"{type(error).__name__}: {error}"[:200]])


def child(settings: dict[str, Any], length: int, results: int, setup: int, null: int) -> None:
    """The forked child: read the request, lock this process in, say so, run. Never returns."""
    say = setup
    try:
        request = json.loads(read_exactly(0, length))
        moved = [os.dup(fd) for fd in (null, null, null, results, setup)]
        for target, fd in enumerate(moved):
            os.dup2(fd, target)
        say = SETUP
        os.closerange(SETUP + 1, 4096)
        if settings["namespaces"]:
            os.setsid()
            must(libc.sethostname(b"box", 3), "host name")
            make_root(settings, request["limits"]["scratch_kb"])
        set_limits(request["limits"])
        give_up_rights(bytes.fromhex(settings["filter"]))
    except BaseException as error:
        os.write(say, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(SETUP, b"\0")
    os.close(SETUP)
    try:
        run(request)
    finally:
        os._exit(0)


# ---- the server ----


def fork(namespaces: bool) -> int:
    """Fork, into new namespaces if so wished. Python's own fork cannot do that; this process has one thread."""
    if not namespaces:
        return os.fork()
    pid = must(libc.syscall(CALLS[platform.machine()][0], NEW_EVERYTHING | signal.SIGCHLD, 0, 0, 0, 0), "clone")
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    return pid


def serve(settings: dict[str, Any], results: int, null: int) -> bool:
    """One request: fork, wait for the child or for its time to be over, report. False at the end of the stream."""
    header = read_exactly(0, HEADER.size)
    if len(header) < HEADER.size:
        return False
    length, wall_ms = HEADER.unpack(header)
    heard, setup = os.pipe()
    pid = fork(bool(settings["namespaces"]))
    if pid == 0:
        child(settings, length, results, setup, null)
    os.close(setup)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, 0)  # only the hang-up of the other side
    events = dict(poll.poll(wall_ms))
    if ended not in events:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    said = os.read(heard, 1000)
    os.close(heard)
    os.close(ended)
    report = {
        "setup": None if said == b"\0" else said.decode("utf-8", "replace") or "the child died before it was locked in",
        "status": status,
        "timed_out": not events,
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
    }
    data = json.dumps(report).encode()
    os.write(1, struct.pack(">I", len(data)) + data)
    return 0 not in events


def main() -> None:
    """Read the settings, import what programs often import, and serve."""
    os.environ.clear()
    results = int(sys.argv[1])
    length, _ = HEADER.unpack(read_exactly(0, HEADER.size))
    settings = json.loads(read_exactly(0, length))
    for name in WARM.split():
        __import__(name)
    null = os.open("/dev/null", os.O_RDWR)
    gc.collect()
    gc.freeze()
    while serve(settings, results, null) and settings["namespaces"]:
        pass


if __name__ == "__main__":
    main()
