"""What runs inside the sandbox: a small server that makes a fresh box for every program and runs it there.

This file is a script. `run.py` starts it with an empty environment; it uses nothing but the standard library, and is the
one place of the package where text written by a model is executed. One request, on the socket fd 0, is the wall time in
milliseconds with two files in memory, one with the request and one for the results. The server reads neither. A forked
child reads its request, locks itself in, says so, and runs the program. So nothing of one check is ever in the memory
from which the next is forked, and no file that a program can change is another's. No expected value comes here.
"""

import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from typing import Any

RESULTS, SETUP = 3, 4  # file descriptors of the child
SCRATCH_KB, FILE_KB, OPEN_FILES = 4096, 1024, 32  # what every program may use
NEW_EVERYTHING = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # user mnt pid net ipc uts
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_SETATTR = 442  # the same on every machine
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
BASE, SCRATCH = "/tmp", "/scratch"

libc = ctypes.PyDLL(None, use_errno=True)


def must(result: int, what: str) -> int:
    """The result of a libc call. Raises OSError when it is -1."""
    if result == -1:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def make_root(settings: dict[str, Any]) -> int:
    """A new root: read-only system libraries, an empty scratch folder in memory, and nothing else, no /proc, no /etc.

    Returns a descriptor of the null device, opened through a read-only mount: the host's cannot be changed.
    """
    user, group = settings["owner"]
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    must(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    mount_memory(BASE, MS_NOSUID | MS_NODEV, "size=64k,nr_inodes=128,mode=755")
    for source in ("/dev/null", *settings["binds"]):
        target = BASE + source
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        must(libc.mount(source.encode(), target.encode(), None, MS_BIND | MS_REC, None), f"bind {source}")
        set_read_only(target, AT_RECURSIVE, MS_NOSUID if source == "/dev/null" else MS_NOSUID | MS_NODEV)
    for hidden in settings["hidden"]:
        mount_memory(BASE + hidden, MS_RDONLY, "size=4k,nr_inodes=1")
    for link, goal in settings["links"].items():
        os.symlink(goal, BASE + link)
    os.mkdir(BASE + SCRATCH)
    mount_memory(BASE + SCRATCH, MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={SCRATCH_KB}k,nr_inodes=256,mode=700")
    set_read_only(BASE, 0)
    null = os.open(BASE + "/dev/null", os.O_RDWR)
    os.chdir(BASE)
    must(libc.pivot_root(b".", b"."), "pivot_root")
    must(libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/")
    return null


def mount_memory(path: str, flags: int, options: str) -> None:
    """An empty file system in memory."""
    must(libc.mount(b"box", path.encode(), b"tmpfs", flags, options.encode()), f"tmpfs on {path}")


def set_read_only(path: str, flags: int, further: int = MS_NOSUID | MS_NODEV) -> None:
    """Make a mount read-only, whatever other flags it must keep: MOUNT_ATTR_ of these names have the same values."""
    attributes = struct.pack("=QQQQ", MS_RDONLY | further, 0, 0, 0)
    must(libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, len(attributes)), f"read-only {path}")


def set_limits(limits: dict[str, int]) -> None:
    """Resource limits that the program cannot raise again."""
    values = {
        "CPU": limits["cpu_s"], "AS": limits["memory_mb"] * 2**20, "FSIZE": FILE_KB * 2**10, "NOFILE": OPEN_FILES,
        "NPROC": 1, "CORE": 0, "MEMLOCK": 0, "MSGQUEUE": 0, "STACK": 8 * 2**20,
    }  # fmt: skip
    for name, value in values.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def give_up_rights(program: bytes) -> None:
    """No capability, no way to gain one, and no system call but those that `program` (seccomp) allows."""
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    must(libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)), "capset")
    must(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    must(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "death signal")
    steps = ctypes.create_string_buffer(program, len(program))
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(steps)))
    must(libc.prctl(PR_SET_SECCOMP, 2, whole, 0, 0), "seccomp")


def encode(value: object) -> object:
    """A value of a built-in type as JSON that keeps its type. Raises TypeError for any other value."""
    if value is None or isinstance(value, bool):
        return value
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            items = [encode(item) for item in value]
            return items if kind is list else {kind.__name__: items}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a {type(value).__name__} cannot be compared")


def send(*line: object) -> None:
    """One line of results; an error is sent as the text that says why there is no value."""
    text = json.dumps(line, default=lambda error: f"{type(error).__name__}: {error}"[:200])
    os.write(RESULTS, text.encode() + b"\n")


def answer_calls(source: str, entry: str, calls: str) -> None:
    """Send [index, value] of the program's function, or of the whole program, for each of the arguments, or [why not]."""
    code = compile(source, "solution.py", "exec")
    scope: dict[str, Any] = {"__name__": "solution"}
    if entry:
        exec(code, scope)
    function: Any = scope.get(entry) if entry else lambda text: printed(code, text)
    for index, (arguments, keywords) in enumerate(eval(calls)):
        try:
            send(index, encode(function(*arguments, **keywords)))
        except BaseException as error:
            send(error)


def printed(code: Any, text: str) -> str:
    """What a program prints that reads `text`."""
    for fd, name, data in ((0, "in", text.encode("utf-8", "replace")), (1, "out", b"")):
        file = os.open(f"{SCRATCH}/{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.pwrite(file, data, 0)
        if file != fd:  # the last program may have closed it
            os.dup2(file, fd)
            os.close(file)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    random.seed(0)
    with contextlib.suppress(SystemExit):
        exec(code, {"__name__": "__main__"})
    sys.stdout.flush()
    return os.pread(1, FILE_KB * 2**10, 0).decode("utf-8", "replace")


def child(settings: dict[str, Any], asked: int, results: int, setup: int) -> None:
    """The forked child: read the request, lock this process in, say so, run. Never returns."""
    say = setup
    try:
        request = json.loads(os.pread(asked, os.fstat(asked).st_size, 0))
        os.setsid()
        must(libc.sethostname(b"box", 3), "host name")
        null = make_root(settings)
        moved = [os.dup(fd) for fd in (null, null, null, results, setup)]
        for target, fd in enumerate(moved):
            os.dup2(fd, target)
        say = SETUP
        os.closerange(SETUP + 1, 4096)
        set_limits(request["limits"])
        give_up_rights(bytes.fromhex(settings["filter"]))
    except BaseException as error:
        os.write(say, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(SETUP, b"\0")
    os.close(SETUP)
    try:
        os.chdir(SCRATCH)
        random.seed(0)
        answer_calls(request["source"], request["entry"], request["calls"])
    except BaseException as error:
        send(error)
    finally:
        os._exit(0)


def serve(settings: dict[str, Any], requests: socket.socket) -> bool:
    """One request: fork, wait for the child or for its time to be over, report. False at the end of the stream."""
    wall_ms, files, _, _ = socket.recv_fds(requests, 100, 2)
    if len(files) < 2:
        return False
    heard, setup = os.pipe()
    pid = must(libc.syscall(settings["clone"], NEW_EVERYTHING | signal.SIGCHLD, 0, 0, 0, 0), "clone")
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        child(settings, files[0], files[1], setup)
    ended = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(requests, 0)  # only the hang-up of the other side
    events = dict(poll.poll(int(wall_ms)))
    if ended not in events:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    os.close(setup)
    said = os.read(heard, 1000)
    for fd in (*files, heard, ended):
        os.close(fd)
    why = None if said == b"\0" else said.decode("utf-8", "replace") or "the child died before it was locked in"
    report = {"setup": why, "status": status, "timed_out": not events, "cpu_s": usage.ru_utime + usage.ru_stime}
    requests.send(json.dumps(report).encode())
    return requests.fileno() not in events


def main() -> None:
    """Import what programs often import, and serve."""
    os.environ.clear()
    settings = json.loads(sys.argv[1])
    for name in settings["warm"]:
        __import__(name)
    requests = socket.socket(fileno=0)
    gc.collect()
    gc.freeze()
    while serve(settings, requests):
        pass


if __name__ == "__main__":
    main()
