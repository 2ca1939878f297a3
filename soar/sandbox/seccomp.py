"""The system calls that a program in the sandbox may make, as a seccomp filter (classic BPF). Pure; Linux only.

An allow-list: whatever is not named here fails with EPERM, so a call that a later kernel adds is refused, too. Left out
on purpose are all ways to start a process or a thread (fork, vfork, clone, clone3, execve), to reach another one
(kill, ptrace, process_vm_readv, pidfd_open), to reach a network (socket and its kin), to change what is mounted or who
one is, and the kernel's doors to itself (bpf, keyctl, userfaultfd, io_uring, perf_event_open, memfd_create).
`ioctl`, `fcntl` and `prlimit64` are allowed for harmless commands only. Numbers: the kernel's `asm/unistd.h`.
"""

from __future__ import annotations

import struct

from soar.types import UserError

X86_64 = """
read=0 write=1 readv=19 writev=20 pread64=17 pwrite64=18 open=2 openat=257 close=3 close_range=436 stat=4 fstat=5
lstat=6 newfstatat=262 statx=332 lseek=8 access=21 faccessat=269 faccessat2=439 mmap=9 mprotect=10 munmap=11
mremap=25 brk=12 madvise=28 mincore=27 rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127
rt_sigtimedwait=128 rt_sigsuspend=130 sigaltstack=131 setitimer=38 getitimer=36 alarm=37 pause=34
restart_syscall=219 dup=32 dup2=33 dup3=292 pipe=22 pipe2=293 poll=7 ppoll=271 select=23 pselect6=270 nanosleep=35
clock_nanosleep=230 clock_gettime=228 clock_getres=229 gettimeofday=96 time=201 times=100 getpid=39 getppid=110
gettid=186 getuid=102 geteuid=107 getgid=104 getegid=108 getgroups=115 getpgrp=111 getpgid=121 getsid=124
getresuid=118 getresgid=120 getrusage=98 getrlimit=97 getcpu=309 sched_getaffinity=204 sched_yield=24
getpriority=140 uname=63 sysinfo=99 getrandom=318 umask=95 getcwd=79 chdir=80 fchdir=81 getdents64=217 readlink=89
readlinkat=267 mkdir=83 mkdirat=258 rmdir=84 unlink=87 unlinkat=263 rename=82 renameat=264 renameat2=316 symlink=88
symlinkat=266 chmod=90 fchmod=91 fchmodat=268 ftruncate=77 truncate=76 fsync=74 fdatasync=75 utimensat=280
statfs=137 fstatfs=138 futex=202 set_robust_list=273 set_tid_address=218 rseq=334 arch_prctl=158 exit=60
exit_group=231 wait4=61 waitid=247
"""
AARCH64 = """
read=63 write=64 readv=65 writev=66 pread64=67 pwrite64=68 openat=56 close=57 close_range=436 fstat=80 newfstatat=79
statx=291 lseek=62 faccessat=48 faccessat2=439 mmap=222 mprotect=226 munmap=215 mremap=216 brk=214 madvise=233
mincore=232 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 rt_sigpending=136 rt_sigtimedwait=137
rt_sigsuspend=133 sigaltstack=132 setitimer=103 getitimer=102 restart_syscall=128 dup=23 dup3=24 pipe2=59 ppoll=73
pselect6=72 nanosleep=101 clock_nanosleep=115 clock_gettime=113 clock_getres=114 gettimeofday=169 times=153
getpid=172 getppid=173 gettid=178 getuid=174 geteuid=175 getgid=176 getegid=177 getgroups=158 getpgid=155 getsid=156
getresuid=148 getresgid=150 getrusage=165 getcpu=168 sched_getaffinity=123 sched_yield=124 getpriority=141 uname=160
sysinfo=179 getrandom=278 umask=166 getcwd=17 chdir=49 fchdir=50 getdents64=61 readlinkat=78 mkdirat=34 unlinkat=35
renameat=38 renameat2=276 symlinkat=36 fchmod=52 fchmodat=53 ftruncate=46 truncate=45 fsync=82 fdatasync=83
utimensat=88 statfs=43 fstatfs=44 futex=98 set_robust_list=99 set_tid_address=96 rseq=293 exit=93 exit_group=94
wait4=260 waitid=95
"""

# machine: (AUDIT_ARCH value, calls that are allowed, ioctl, fcntl, prlimit64)
MACHINES = {
    "x86_64": (0xC000003E, X86_64, 16, 72, 302),
    "aarch64": (0xC00000B7, AARCH64, 29, 25, 261),
}
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 5, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETLK, F_DUPFD_CLOEXEC

LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
KILL_PROCESS, ALLOW, NOT_PERMITTED = 0x80000000, 0x7FFF0000, 0x00050001  # the last is SECCOMP_RET_ERRNO | EPERM
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
X32_BIT = 0x40000000

Step = tuple[int, int, int, int]


def _argument(index: int, high: bool = False) -> int:
    """Offset of half an argument in struct seccomp_data, little-endian."""
    return 16 + 8 * index + (4 if high else 0)


def allowed(machine: str) -> dict[str, int]:
    """Name and number of every call that is allowed whatever its arguments."""
    return {name: int(number) for name, number in (pair.split("=") for pair in MACHINES[machine][1].split())}


def build_filter(machine: str) -> bytes:
    """The filter as an array of struct sock_filter. Raises UserError for a processor whose numbers are not known here."""
    if machine not in MACHINES:
        raise UserError(f"the sandbox knows the system calls of {', '.join(MACHINES)}, not of {machine}")
    architecture, _, ioctl, fcntl, prlimit = MACHINES[machine]
    steps: list[Step] = [
        (LOAD, 0, 0, ARCHITECTURE),
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":  # the x32 calls have numbers of their own
        steps += [(AT_LEAST, 0, 1, X32_BIT), (RETURN, 0, 0, KILL_PROCESS)]
    for number in allowed(machine).values():
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    for number, commands in ((ioctl, IOCTLS), (fcntl, FCNTLS)):
        steps.append((EQUAL, 0, 2 * len(commands) + 2, number))
        steps.append((LOAD, 0, 0, _argument(1)))
        for command in commands:
            steps += [(EQUAL, 0, 1, command), (RETURN, 0, 0, ALLOW)]
        steps.append((RETURN, 0, 0, NOT_PERMITTED))
    # prlimit64 may read limits (a null pointer for the new ones), not set them
    steps += [
        (EQUAL, 0, 5, prlimit),
        (LOAD, 0, 0, _argument(2)),
        (EQUAL, 0, 3, 0),
        (LOAD, 0, 0, _argument(2, high=True)),
        (EQUAL, 0, 1, 0),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, NOT_PERMITTED),
    ]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)
