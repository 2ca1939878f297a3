"""Speed and containment of the sandbox.

python benchmarks/sandbox.py speed                  checks a second, per backend, on as many cores as --workers
python benchmarks/sandbox.py attacks                the table of docs/results/sandbox.md
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from attacks import ATTACKS, SQUARES, fill
from code_exercises import code_exercises
from test_sandbox import outside

from soar.domains.code import read_tests
from soar.sandbox.run import BACKENDS, Job, Limits, Outcome, Sandbox, SandboxError, find_backend

GROUPS = {
    "escape": "leave the sandbox",
    "forge": "pass without solving the task",
    "exhaust": "use up the machine or stop the run",
}


def run_all(pool: ThreadPoolExecutor, servers: list[Sandbox], jobs: list[Job]) -> list[Outcome]:
    """The outcomes of all, shared out to the servers."""
    shares = [jobs[i :: len(servers)] for i in range(len(servers))]
    done = pool.map(lambda server, share: [server.run(job) for job in share], servers, shares)
    return [outcome for share in done for outcome in share]


def speed(workers: int, count: int) -> None:
    """Checks a second: a program that returns at once, and solutions of generated exercises against their tests."""
    rows = list(code_exercises([2, 4, 6], 30, seed=0))
    solutions = [read_tests(row["answer"]).job(row["solution"]) for row in rows]
    print(
        f"| backend | {workers} workers: empty program | exercise of 6 tests | CPU ms a check | one alone, ms (median) |"
    )
    print("|---|---|---|---|---|")
    for backend in BACKENDS:
        try:
            find_backend(backend)
        except SandboxError as error:
            print(f"| `{backend}` | not usable here: {str(error).splitlines()[1].strip()} | | | |")
            continue
        with ThreadPoolExecutor(workers) as pool, ExitStack() as stack:
            servers = [stack.enter_context(Sandbox(backend=backend)) for _ in range(workers)]
            run_all(pool, servers, [Job("")] * workers)
            rates = []
            for jobs in ([Job("")] * count, [solutions[i % len(solutions)] for i in range(count)]):
                start = time.perf_counter()
                outcomes = run_all(pool, servers, jobs)
                rates.append(count / (time.perf_counter() - start))
        cpu_ms = 1e3 * statistics.fmean(outcome.cpu_s for outcome in outcomes)  # of the box and the program in it
        with Sandbox(backend=backend) as sandbox:
            sandbox.run(solutions[0])
            single = []
            for job in solutions:
                start = time.perf_counter()
                sandbox.run(job)
                single.append(time.perf_counter() - start)
        alone = statistics.median(single) * 1e3
        print(f"| `{backend}` | {rates[0]:.0f}/s | {rates[1]:.0f}/s | {cpu_ms:.1f} | {alone:.1f} |")
    print(f"\n{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end")


def attack_table(backend: str) -> int:
    """Every attack with its verdict and what came of it. Returns how many succeeded or were graded correct."""
    tests = read_tests(SQUARES)
    with (
        tempfile.TemporaryDirectory() as folder,
        outside(Path(folder)) as watched,
        Sandbox(Limits(cpu_s=1, wall_s=2.0, output_kb=64), backend) as sandbox,
    ):
        outcomes = [sandbox.run(tests.job(fill(attack.source, watched.places))) for attack in ATTACKS]
        hidden = {folder: "FOLDER", sys.base_prefix: "PYTHON", f"/{os.getpid()}/": "/PID/"}
    print(f"backend `{sandbox.backend}`, {len(ATTACKS)} attacks")
    bad = list(watched.touched)
    for group, aim in GROUPS.items():
        print(f"\n## Attacks that try to {aim}\n\n| attack | verdict | what happened |\n|---|---|---|")
        for attack, outcome in zip(ATTACKS, outcomes, strict=True):
            if attack.group != group:
                continue
            verdict = tests.verdict(outcome)
            said = outcome.detail or f"returned {next(iter(outcome.answers.values()), 'nothing')}"
            for value, name in hidden.items():
                said = said.replace(value, name)
            said = " ".join(said.replace("|", "/").replace("`", "'").encode("utf-8", "replace").decode().split())
            print(f"| {attack.name} | {verdict.value} | `{said[:90]}` |")
            if verdict.solved or "escaped" in outcome.answers.values():
                bad.append(attack.name)
    print(f"\n{len(bad)} of {len(ATTACKS)} attacks succeeded or were graded correct {bad or ''}".rstrip())
    return len(bad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "attacks"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--backend", default="auto", help="of the attacks")
    arguments = parser.parse_args()
    if arguments.what == "speed":
        speed(arguments.workers, arguments.count)
    else:
        sys.exit(1 if attack_table(arguments.backend) else 0)


if __name__ == "__main__":
    main()
