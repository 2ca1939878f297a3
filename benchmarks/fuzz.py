"""A million hostile texts through parser, extraction and comparison; prints cases, seconds and failures.

python benchmarks/fuzz.py [--cases 1000000] [--seed 0]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
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
