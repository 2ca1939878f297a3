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


def repeated(cases: int, seed: int) -> None:
    """So many pairs of pieces, and every piece alone, each with something before or behind it."""
    pairs = random.Random(seed).sample([a + b for a in PIECES for b in PIECES], min(cases, len(PIECES) ** 2))
    slowest, worst = 0.0, ""
    for unit in [*PIECES, *pairs]:
        for before, behind in (("", ""), ("5", ""), ("", "5"), ("x ", "\\in")):
            text = before + unit * ((MAX_ANSWER_CHARS - 5) // len(unit)) + behind
            start = time.process_time()
            compare_math(text, "5")
            seconds = time.process_time() - start
            if seconds > slowest:
                slowest, worst = seconds, text
    tried = 4 * (len(pairs) + len(PIECES))
    print(f"{tried:,} answers; the slowest took {slowest * 1000:.0f} ms CPU: {worst!r:.60}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeated", action="store_true")
    arguments = parser.parse_args()
    if arguments.repeated:
        return repeated(arguments.cases, arguments.seed)
    rng = random.Random(arguments.seed)
    failures, accepted, slowest, worst = 0, 0, 0.0, ""
    begin = time.perf_counter()
    for case in range(arguments.cases):
        text, other = make_text(rng), make_text(rng, most=3)
        start = time.process_time()
        try:
            accepted += check_text(text, other)
        except Exception:
            failures += 1
            if failures <= 5:
                print(f"case {case}: {text!r} against {other!r}")
                traceback.print_exc()
        seconds = time.process_time() - start
        if seconds > slowest:
            slowest, worst = seconds, text
    seconds = time.perf_counter() - begin
    print(f"{arguments.cases:,} cases in {seconds:.0f} s, {failures} failures, {accepted:,} problems accepted")
    print(f"the slowest took {slowest * 1000:.1f} ms CPU: {worst!r:.100}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
