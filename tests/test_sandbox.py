"""No program leaves the sandbox, none passes without solving its task, none stops the run (`attacks.py`)."""

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from attacks import ATTACKS, SQUARES, Attack, fill
from tables import CASES, cases, ends

from soar.domains.code import decode, read_tests
from soar.sandbox import run as sandbox
from soar.sandbox.run import BACKENDS, End, Job, Limits, Outcome, Sandbox, SandboxError
from soar.types import Verdict

WHY_NOT = {name: sandbox._trial(name) for name in BACKENDS}
USABLE = [name for name in BACKENDS if not WHY_NOT[name] or name in os.environ.get("SOAR_SANDBOXES", "")]
"""Those that work here, and those that must: they are not skipped."""
LIMITS = Limits(cpu_s=1, wall_s=0.8, output_kb=64)
SERVERS = 4
TESTS = read_tests(SQUARES)


def backend(name: str) -> object:
    """A parameter that is skipped, with the reason, where the backend cannot be used."""
    return pytest.param(name, marks=pytest.mark.skipif(name not in USABLE, reason=f"{name}: {WHY_NOT[name]}"))


both = pytest.mark.parametrize("name", [backend(name) for name in BACKENDS])
needs_one = pytest.mark.skipif(not USABLE, reason=str(WHY_NOT))


@contextlib.contextmanager
def outside(folder: Path) -> Iterator[SimpleNamespace]:
    """Listening sockets, a file, a signal handler; `touched` grows when anything reaches them."""
    (folder / "secret.txt").write_text("the answer is 144")
    touched: list[str] = []
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "socket"))
    abstract.bind(f"\0soar-{os.getpid()}")
    for listening in (unix, abstract):
        listening.listen()
    before = signal.signal(signal.SIGUSR1, lambda *_: touched.append("signal"))
    places = {
        "port": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": str(folder / "socket"),
        "abstract": f"\0soar-{os.getpid()}", "secret": str(folder / "secret.txt"), "pid": os.getpid(),
    }  # fmt: skip
    try:
        yield SimpleNamespace(places=places, touched=touched)
        for name, listening in (("tcp", tcp), ("udp", udp), ("unix", unix), ("abstract", abstract)):
            listening.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                listening.recv(1) if name == "udp" else listening.accept()
                touched.append(name)
    finally:
        signal.signal(signal.SIGUSR1, before)
        for listening in (tcp, udp, unix, abstract):
            listening.close()


def hand_in(name: str, attacks: list[Attack], folder: Path) -> dict[str, Outcome]:
    """Run attacks: nothing outside is reached, none escapes or is graded correct, and the next checks work."""

    def share(first: int) -> list[tuple[str, Outcome]]:
        with Sandbox(LIMITS, name) as box:
            pairs = [
                (attack.name, box.run(TESTS.job(fill(attack.source, watched.places))))
                for attack in attacks[first::SERVERS]
                for _ in range(4 if attack.name.startswith("a bit") else 1)
            ]
            box.limits = Limits()
            assert TESTS.verdict(box.run(TESTS.job("def answer(x):\n    return x * x\n"))) is Verdict.CORRECT
        return pairs

    with outside(folder) as watched, ThreadPoolExecutor(SERVERS) as pool:
        pairs = [pair for shared in pool.map(share, range(SERVERS)) for pair in shared]
        assert (folder / "secret.txt").read_text() == "the answer is 144"
    assert watched.touched == []
    assert [attack for attack, outcome in pairs if TESTS.verdict(outcome) is Verdict.CORRECT] == []
    assert [attack for attack, outcome in pairs if "escaped" in outcome.answers.values()] == []
    return dict(pairs)


@both
def test_no_attack_escapes_and_none_is_graded_correct(name, tmp_path):
    outcomes = hand_in(name, [attack for attack in ATTACKS if attack.group != "exhaust"], tmp_path)
    calls = {attack: str(outcome.answers) for attack, outcome in outcomes.items() if attack.startswith("system call ")}
    assert [attack for attack, said in calls.items() if said.count("PermissionError") != 3] == []


@both
def test_no_attack_stops_the_run(name, tmp_path):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = hand_in(name, [attack for attack in ATTACKS if attack.group == "exhaust"], tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000  # kB
    for attack in ("infinite loop", "sleep", "huge integer"):
        assert outcomes[attack].end is End.TIMEOUT, attack
    for attack in ("results without end", "huge result"):
        assert outcomes[attack].end in (End.KILLED, End.TIMEOUT), attack
    assert outcomes["crash of the interpreter"].end is End.KILLED
    loops = {attack.name: attack.source for attack in ATTACKS if attack.name.startswith("infinite loop")}
    with Sandbox(Limits(cpu_s=1, wall_s=60), name) as box:
        assert box.run(TESTS.job(loops["infinite loop that ignores signals"])).detail == "over 1 s of CPU"


@both
def test_a_program_is_run_and_its_values_keep_their_types(name):
    source = (CASES / "values.txt").read_text(encoding="utf-8")
    calls = "[" + ", ".join(f"(({i},), {{'sign': 2}})" for i in range(11)) + "]"
    with Sandbox(Limits(), name) as box:
        outcome = box.run(Job(source, "pick", calls))
    assert outcome.end is End.DONE and set(outcome.answers) == set(range(10))
    found = [decode(outcome.answers[i]) for i in range(10)]
    assert found == [None, True, 3, -2.5, "é\ud800", [1, (2,)], {1, 2}, {(1, 2): "a"}, float("inf"), {"a": 2, "b": 1}]
    assert [type(value) for value in found[1:4]] == [bool, int, float]
    assert outcome.detail == "TypeError: a object cannot be compared"


@both
def test_programs_read_input_and_print(name):
    tests = read_tests("Input:\n3 4\nOutput:\n7\n\nInput:\n1 2\nOutput:\n3\n")
    rows = cases("coding", "reader")
    with Sandbox(Limits(), name) as box:
        assert [[source, tests.verdict(box.run(tests.job(source))).value] for source, _ in rows] == rows


def test_without_a_sandbox_nothing_runs_and_the_message_says_what_to_install(monkeypatch):
    sandbox.find_backend.cache_clear()
    monkeypatch.setattr(sandbox, "_trial", lambda name: f"{name} does not work")
    try:
        with pytest.raises(SandboxError, match=r"(?s)no program is run.*bwrap does not work.*apt install bubblewrap"):
            Sandbox().run(Job("print(1)"))
        with pytest.raises(SandboxError, match="expected auto, bwrap, namespaces"):
            Sandbox(backend="docker").run(Job("print(1)"))
    finally:
        sandbox.find_backend.cache_clear()


@pytest.mark.parametrize(("cpu_s", "end", "asked"), [(0.4, End.DONE, 2), (10.0, End.TIMEOUT, 1)])
def test_who_waited_too_long_for_a_core_is_tried_again_once(monkeypatch, cpu_s, end, asked):
    outcomes = [Outcome(End.TIMEOUT, cpu_s=cpu_s), Outcome(End.DONE)]
    monkeypatch.setattr(Sandbox, "ask", lambda box, job: outcomes.pop(0))
    monkeypatch.setattr(sandbox, "find_backend", lambda wanted: "namespaces")
    assert Sandbox().run(Job("")).end is end
    assert len(outcomes) == 2 - asked


@needs_one
def test_a_lost_server_is_replaced():
    with Sandbox(backend=USABLE[0]) as box:
        job = Job("def f():\n    return 1\n", "f", "[((), {})]")
        box.run(job)
        box._process.kill()  # type: ignore[union-attr]
        box._process.wait()  # type: ignore[union-attr]
        assert box.run(job).answers == {0: 1}


@needs_one
def test_servers_and_programs_end_with_the_process_that_started_them(tmp_path):
    script = (CASES / "orphan.txt").read_text().replace("BACKEND", repr(USABLE[-1]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ends(int(done.stdout)), "the server outlived its parent"


@needs_one
def test_a_box_that_cannot_be_made_is_an_error_and_not_a_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "build_filter", lambda machine: b"\0")
    with Sandbox(LIMITS, USABLE[0]) as box, pytest.raises(SandboxError, match="seccomp"):
        box.ask(Job("print(1)"))
    allows_every_call = b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    monkeypatch.setattr(sandbox, "build_filter", lambda machine: allows_every_call)
    assert "the trial gave ['possible', 'possible'" in sandbox._trial(USABLE[-1]), "a box that is not locked"


def test_the_filter_allows_no_call_that_leaves():
    forbidden = {
        "execve", "fork", "vfork", "clone", "clone3", "socket", "socketpair", "connect", "kill", "tgkill", "ptrace", "mount",
        "unshare", "setns", "chroot", "bpf", "keyctl", "userfaultfd", "io_uring_setup", "memfd_create", "prctl", "seccomp",
        "fchmod", "utimensat", "prlimit64",
    }  # fmt: skip
    for machine in sandbox.BOX["machines"]:
        calls = sandbox.calls(machine)
        assert not forbidden & calls.keys() and len(set(calls.values())) == len(calls)
    with pytest.raises(SandboxError, match="not of riscv64"):
        sandbox.build_filter("riscv64")
