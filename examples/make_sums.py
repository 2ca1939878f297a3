"""Write sums with many terms as a problem file: easy to check, hard for a small language model.

python examples/make_sums.py sums.jsonl --terms 4 5 6 --digits 2 --count 64
python examples/make_sums.py sums.jsonl --terms 8 --digits 1 --signs + --bare     (for problems.format = "sums")
python examples/make_sums.py sums.jsonl --terms 8 --digits 1 --signs + --bare --totals     (for problems.format = "totals")
"""

import argparse
import json
import random
from itertools import accumulate


def running_totals(numbers: list[int]) -> list[str]:
    """What each step of adding the numbers comes to; a lone number is its own total."""
    totals = [str(total) for total in accumulate(numbers)]
    return totals[1:] or totals


def sums(
    terms: list[int],
    digits: int,
    count: int,
    seed: int,
    signs: str = "+-",
    bare: bool = False,
    totals: bool = False,
) -> list[dict[str, str]]:
    """Distinct questions like `What is 27 + 31 - 45 + 12?` with their answers; bare: only `27 + 31 - 45 + 12`.

    totals: the answer is every running total (`58, 13, 25`), which no guess hits.

    Raises ValueError when 50 draws a question do not find enough distinct ones.
    """
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    for _ in range(50 * count):
        numbers = [rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(rng.choice(terms))]
        between = [rng.choice(signs) for _ in numbers[1:]]
        text = str(numbers[0]) + "".join(f" {sign} {n}" for sign, n in zip(between, numbers[1:], strict=True))
        signed = [numbers[0], *(n if sign == "+" else -n for sign, n in zip(between, numbers[1:], strict=True))]
        answers = running_totals(signed)
        rows[text if bare else f"What is {text}?"] = ", ".join(answers) if totals else answers[-1]
        if len(rows) == count:
            return [{"question": question, "answer": answer} for question, answer in rows.items()]
    raise ValueError(f"only {len(rows)} distinct sums of {terms} terms with {digits} digits were found, not {count}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--terms", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signs", default="+-", help="a choice of + and -")
    parser.add_argument("--bare", action="store_true", help="the sum alone, without words")
    parser.add_argument("--totals", action="store_true", help="every running total is the answer")
    arguments = vars(parser.parse_args())
    path = arguments.pop("file")
    rows = sums(**arguments)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
