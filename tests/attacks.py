"""Programs that try to leave the sandbox, to pass without solving the task, or to stop the run.

They stand in `attacks.txt`. Each is handed in as a solution of one task, `answer(x)` = x squared, whose tests it is not
told. A program that gets what it wants from the system says so with the value `"escaped"`; it may lie, it must not be
right. `{port}`, `{udp}`, `{unix!r}`, `{abstract!r}`, `{secret!r}` and `{pid}` are things outside that the test watches:
listening sockets, a file, itself. A program marked `inside` is the body of the function.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

SQUARES = "assert answer(3) == 9\nassert answer(4) == 16\nassert answer(12) == 144"

NUMBERS = {  # system calls that have no function in Python's library
    "x86_64": {
        "ptrace": 101, "process_vm_readv": 310, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
        "unshare": 272, "setns": 308, "setuid": 105, "setresuid": 117, "add_key": 248, "keyctl": 250, "bpf": 321,
        "userfaultfd": 323, "io_uring_setup": 425, "perf_event_open": 298, "memfd_create": 319, "clone": 56, "clone3": 435,
        "tgkill": 234, "open_by_handle_at": 304, "name_to_handle_at": 303, "mknodat": 259, "pidfd_open": 434,
        "init_module": 175, "kexec_load": 246, "reboot": 169, "shmget": 29, "mq_open": 240, "personality": 135,
        "mount_setattr": 442, "open_tree": 428, "landlock_create_ruleset": 444, "inotify_init1": 294, "acct": 163,
        "rt_sigqueueinfo": 129, "pidfd_send_signal": 424, "pidfd_getfd": 438, "process_madvise": 440, "kcmp": 312,
        "get_robust_list": 274, "vmsplice": 278, "copy_file_range": 326, "timer_create": 222, "timerfd_create": 283,
        "eventfd2": 290, "epoll_create1": 291, "signalfd4": 289, "fanotify_init": 300, "memfd_secret": 447, "mlock": 149,
        "sched_setscheduler": 144, "setpriority": 141, "prctl": 157, "seccomp": 317, "syslog": 103, "clock_settime": 227,
        "modify_ldt": 154, "iopl": 172, "ioperm": 173,
    },
    "aarch64": {
        "ptrace": 117, "process_vm_readv": 270, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
        "unshare": 97, "setns": 268, "setuid": 146, "setresuid": 147, "add_key": 217, "keyctl": 219, "bpf": 280,
        "userfaultfd": 282, "io_uring_setup": 425, "perf_event_open": 241, "memfd_create": 279, "clone": 220, "clone3": 435,
        "tgkill": 131, "open_by_handle_at": 265, "name_to_handle_at": 264, "mknodat": 33, "pidfd_open": 434,
        "init_module": 105, "kexec_load": 104, "reboot": 142, "shmget": 194, "mq_open": 180, "personality": 92,
        "mount_setattr": 442, "open_tree": 428, "landlock_create_ruleset": 444, "inotify_init1": 26, "acct": 89,
        "rt_sigqueueinfo": 138, "pidfd_send_signal": 424, "pidfd_getfd": 438, "process_madvise": 440, "kcmp": 272,
        "get_robust_list": 100, "vmsplice": 75, "copy_file_range": 285, "timer_create": 107, "timerfd_create": 85,
        "eventfd2": 19, "epoll_create1": 20, "signalfd4": 74, "fanotify_init": 262, "memfd_secret": 447, "mlock": 228,
        "sched_setscheduler": 119, "setpriority": 140, "prctl": 167, "seccomp": 277, "syslog": 116, "clock_settime": 112,
    },
}.get(platform.machine(), {})  # fmt: skip

SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *rest):
    if libc.syscall(number, *rest) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "escaped"
"""
HEADING = re.compile(r"^=== (\w+)( \(inside(, with system calls)?\))?: (.+)\n", re.MULTILINE)


@dataclass(frozen=True)
class Attack:
    """name: what is tried. group: escape, forge or exhaust. source: the program."""

    name: str
    group: str
    source: str


def body(lines: str, before: str = "") -> str:
    """A program whose function runs `lines`, and returns the name of what stopped it."""
    inside = "\n".join("        " + line for line in lines.strip().split("\n"))
    return (
        f"{before}\ndef answer(x):\n    try:\n{inside}\n"
        "    except Exception as error:\n        return type(error).__name__ + ': ' + str(error)[:200]\n"
    )


def read_attacks() -> list[Attack]:
    """Those of attacks.txt, in order."""
    text = (Path(__file__).parent / "attacks.txt").read_text(encoding="utf-8")
    marks = list(HEADING.finditer(text))
    attacks = []
    for mark, end in zip(marks, [*(mark.start() for mark in marks[1:]), len(text)], strict=True):
        source = text[mark.end() : end].strip("\n") + "\n"
        attacks.append(Attack(mark[4], mark[1], body(source, SYSCALL if mark[3] else "") if mark[2] else source))
    return attacks


def raw(name: str, arguments: str = "0, 0, 0, 0, 0") -> Attack:
    """A system call that Python has no function for."""
    return Attack(f"system call {name}", "escape", body(f"return call({NUMBERS[name]}, {arguments})", SYSCALL))


ARGUMENTS = {"clone": "17, 0, 0, 0, 0", "personality": "0xffffffff", "memfd_create": "b'x', 0"}
ATTACKS = [
    *read_attacks(),
    *(raw(name, ARGUMENTS.get(name, "0, 0, 0, 0, 0")) for name in NUMBERS),
    Attack("source nested too deeply", "exhaust", "a = " + "(" * 5000 + ")" * 5000 + "\n"),
    Attack("long chain of operators", "exhaust", "a = " + "+".join(["1"] * 20000) + "\n"),
]
if platform.machine() != "x86_64":
    ATTACKS = [
        attack for attack in ATTACKS if attack.name not in ("32-bit system call in machine code", "x32 system call")
    ]


def fill(source: str, outside: dict[str, object]) -> str:
    """A program with the things outside that it is after."""
    for name, value in outside.items():
        source = source.replace("{" + name + "}", str(value)).replace("{" + name + "!r}", repr(value))
    return source
