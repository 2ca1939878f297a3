"""Speed, containment and agreement of the verifiers.

    python benchmarks/verify.py throughput            checks a second, one paper-size outer step (41,000 checks)
    python benchmarks/verify.py bombs                 seconds until each bomb is contained, with other checks going on
    python benchmarks/verify.py agreement DATA        share of gold answers that grade as correct, for each file in DATA

DATA defaults to the folder in the environment variable SOAR_DATA.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from test_verify import BOMBS, HARMLESS

from soar.problems.load import load_problems
from soar.problems.pool import VerifierPool
from soar.problems.verify import is_parsable
from soar.types import Verdict

CHECKS = 41_000
ATTEMPTS = 32
EXPRESSIONS = (
    "x^2+{a}x+{b}", "\\frac{{{a}}}{{{b}}}\\sqrt{{{c}}}", "{a}\\pi", "({a},{b})", "\\{{{a},{b}\\}}", "{a}+{b}i",
    "[{a},{b})", "x={a}", "\\frac{{{a}x+{b}}}{{{c}}}", "{a}^{{{b}}}", "\\begin{{pmatrix}}{a}\\\\{b}\\end{{pmatrix}}",
)  # fmt: skip


def wrong_answer(gold: str, rng: random.Random) -> str:
    """A wrong answer as models give them: mostly another number, sometimes an expression."""
    if rng.random() < 0.75:
        return (
            str(rng.randint(-50, 500))
            if rng.random() < 0.8
            else f"\\frac{{{rng.randint(1, 30)}}}{{{rng.randint(2, 30)}}}"
        )
    a, b, c = (rng.randint(2, 30) for _ in range(3))
    return rng.choice(EXPRESSIONS).format(a=a, b=b, c=c)


def ordinary(golds: list[str], rng: random.Random, different: bool) -> tuple[list[str], list[str]]:
    """CHECKS completions, 32 attempts a gold answer. different: no (answer, gold) pair occurs twice."""
    completions, answers = [], []
    seen: set[tuple[str, str]] = set()
    while len(completions) < CHECKS:
        gold = rng.choice(golds)
        for _ in range(ATTEMPTS):
            answer = gold if rng.random() < 0.2 else wrong_answer(gold, rng)
            if different:
                for _ in range(50):
                    if (answer, gold) not in seen:
                        break
                    answer = wrong_answer(gold, rng)
                if (answer, gold) in seen:
                    continue
                seen.add((answer, gold))
            completions.append(f"Some reasoning first. The answer is $\\boxed{{{answer}}}$.")
            answers.append(gold)
    return completions[:CHECKS], answers[:CHECKS]


def generated_golds(rng: random.Random) -> list[str]:
    """Gold answers in the proportions of MATH: two thirds numbers, the rest fractions and expressions."""
    golds = []
    for _ in range(1300):
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        shape = rng.random()
        if shape < 0.65:
            golds.append(str(rng.randint(-20, 400)))
        elif shape < 0.8:
            golds.append(f"\\frac{{{a}}}{{{b}}}")
        else:
            golds.append(rng.choice(EXPRESSIONS).format(a=a, b=b, c=c))
    return golds


def cpu_seconds() -> float:
    """CPU time of this process and of its ended workers (a pool's start-up included)."""
    return sum(
        r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def throughput(data: Path | None, workers: int) -> None:
    rng = random.Random(0)
    golds = generated_golds(rng)
    source = "generated gold answers"
    if data is not None and (data / "math_pool.jsonl").exists():
        golds = [problem.answer for problem in load_problems(str(data / "math_pool.jsonl"))[0]]
        source = "gold answers of MATH"
    for name, different in (("as in a run (answers repeat)", False), ("all pairs different", True)):
        completions, answers = ordinary(golds, rng, different)
        with VerifierPool("math", workers=workers) as pool:
            pool.check([r"\boxed{x+1}"] * 2, ["1+x", "y"])
            before = cpu_seconds()
            begin = time.perf_counter()
            verdicts = pool.check(completions, answers)
            seconds = time.perf_counter() - begin
        cpu = cpu_seconds() - before
        counts = dict(Counter(verdict.value for verdict in verdicts).most_common())
        print(f"math, {source}, {name}: {CHECKS / seconds:,.0f} checks/s")
        print(f"    {seconds:.1f} s and {cpu:.1f} CPU seconds for {CHECKS:,} checks, {counts}")
    for name in ("number", "exact", "choice"):
        completions, answers = ordinary([str(i) for i in range(500)], rng, False)
        with VerifierPool(name) as pool:
            begin = time.perf_counter()
            pool.check(completions, answers)
            seconds = time.perf_counter() - begin
        print(f"{name}: {CHECKS / seconds:,.0f} checks/s (in the calling process)")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"largest worker: {peak:.0f} MB")


def bombs(workers: int, timeout_s: float) -> None:
    late = []
    with VerifierPool("math", workers=workers, timeout_s=timeout_s) as pool:
        pool.check([r"\boxed{x+1}"] * 2, ["1+x", "y"])
        for number, (name, answer) in enumerate({**BOMBS, **HARMLESS}.items()):
            others = [rf"\boxed{{x+{i}+{number}y}}" for i in range(40)]
            golds = [other[7:-1].replace("x+", "", 1) + "+x" for other in others]
            time.sleep(1.5)  # the worker that the last bomb cost is started again meanwhile
            begin = time.perf_counter()
            verdicts = pool.check(
                [*others[:20], rf"\boxed{{{answer}}}", *others[20:]], [*golds[:20], "42", *golds[20:]]
            )
            seconds = time.perf_counter() - begin
            bad = sum(v is not Verdict.CORRECT for i, v in enumerate(verdicts) if i != 20)
            late += [name] if seconds > timeout_s + 1 else []
            print(f"{name:32s} {verdicts[20].value:10s} {seconds:6.2f} s, others not correct: {bad}")
    print(f"timeout {timeout_s} s, {workers} workers; later than timeout + 1 s: {', '.join(late) or 'none'}")


def agreement(data: Path, workers: int) -> None:
    with VerifierPool("math", workers=workers) as pool:
        for file in sorted(data.glob("*.jsonl")):
            problems, _ = load_problems(str(file))
            golds = [problem.answer for problem in problems]
            verdicts = pool.check_golds(golds)
            values = [is_parsable(gold, "math") for gold in golds]
            correct = sum(verdict.solved for verdict in verdicts)
            print(f"{file.name}: {correct} of {len(golds)} = {correct / len(golds):.2%} grade as correct, "
                  f"{sum(values)} of them as values, {correct - sum(values)} as words")  # fmt: skip
            for problem, verdict in zip(problems, verdicts, strict=True):
                if not verdict.solved:
                    print(f"    {problem.id}: {verdict.value}: {problem.answer!r:.150}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "bombs", "agreement"))
    parser.add_argument("data", nargs="?", type=Path, default=os.environ.get("SOAR_DATA"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=2.0)
    arguments = parser.parse_args()
    data = Path(arguments.data) if arguments.data else None
    if arguments.what == "throughput":
        throughput(data, arguments.workers)
    elif arguments.what == "bombs":
        bombs(arguments.workers, arguments.timeout)
    elif data is None:
        parser.error("agreement needs the folder of the JSONL files, or SOAR_DATA")
    else:
        agreement(data, arguments.workers)


if __name__ == "__main__":
    main()
