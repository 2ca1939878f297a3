"""A million hostile texts through parser, extraction and comparison; prints cases, seconds and failures.

python benchmarks/fuzz.py [--cases 1000000] [--seed 0]
python benchmarks/fuzz.py --repeated [--cases 7000]    answers of 2,000 characters made of one piece or two, again and again
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from test_verify import check_text, make_text

from soar.problems.answers import MAX_ANSWER_CHARS
from soar.problems.verify import compare_math

PIECES = [
    *" \n\t`~\\{}()[],;.-+*/^_=<>|&$%#@!?:'\"10axAei°√×½\u00a0",
    "\\frac", "\\sqrt", "\\text{", "\\text{a}", "\\in", "\\,", "\\ ", "\\left", "\\right", "\\begin{", "\\end{", "\\cdot",
    "\\pm", "\\ldots", "where ", "for ", "and ", "or ", "x\\in", "1,", "1.", "0.3", "x=", "\\boxed{", "{1}", "^{", "_{", "e^",
    "10^", "sqrt", "pi", "\\circ", "\\%", "\\$", "1/", "(1,", "1:",
]  # fmt: skip


class Slowest:
    """CPU seconds of the text that took longest."""

    seconds, text = 0.0, ""

    @contextmanager
    def clock(self, text: str) -> Iterator[None]:
        start = time.process_time()
        try:
            yield
        finally:
            if (seconds := time.process_time() - start) > self.seconds:
                self.seconds, self.text = seconds, text

    def __str__(self) -> str:
        return f"the slowest took {self.seconds * 1000:.1f} ms CPU: {self.text!r:.100}"


def repeated(cases: int, seed: int) -> None:
    """So many pairs of pieces, and every piece alone, each with something before or behind it."""
    pairs = random.Random(seed).sample([a + b for a in PIECES for b in PIECES], min(cases, len(PIECES) ** 2))
    slowest = Slowest()
    for unit in [*PIECES, *pairs]:
        for before, behind in (("", ""), ("5", ""), ("", "5"), ("x ", "\\in")):
            text = before + unit * ((MAX_ANSWER_CHARS - 5) // len(unit)) + behind
            with slowest.clock(text):
                compare_math(text, "5")
    print(f"{4 * (len(pairs) + len(PIECES)):,} answers; {slowest}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeated", action="store_true")
    arguments = parser.parse_args()
    if arguments.repeated:
        return repeated(arguments.cases, arguments.seed)
    rng = random.Random(arguments.seed)
    failures, accepted, slowest = 0, 0, Slowest()
    begin = time.perf_counter()
    for case in range(arguments.cases):
        text, other = make_text(rng), make_text(rng, most=3)
        try:
            with slowest.clock(text):
                accepted += check_text(text, other)
        except Exception:
            failures += 1
            if failures <= 5:
                print(f"case {case}: {text!r} against {other!r}")
                traceback.print_exc()
    seconds = time.perf_counter() - begin
    print(f"{arguments.cases:,} cases in {seconds:.0f} s, {failures} failures, {accepted:,} problems accepted")
    print(slowest)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
