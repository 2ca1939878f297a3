"""Write sums with many terms as a problem file: easy to check, hard for a small language model.

python examples/make_sums.py sums.jsonl --terms 4 5 6 --digits 2 --count 64
"""

import argparse
import json
import random


def sums(terms: list[int], digits: int, count: int, seed: int) -> list[dict[str, str]]:
    """Distinct questions like `What is 27 + 31 - 45 + 12?` with their answers."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        numbers = [rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(rng.choice(terms))]
        signs = [rng.choice("+-") for _ in numbers[1:]]
        text = str(numbers[0]) + "".join(f" {sign} {n}" for sign, n in zip(signs, numbers[1:], strict=True))
        total = numbers[0] + sum(n if sign == "+" else -n for sign, n in zip(signs, numbers[1:], strict=True))
        rows[f"What is {text}?"] = str(total)
    return [{"question": question, "answer": answer} for question, answer in rows.items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--terms", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with open(arguments.file, "w", encoding="utf-8") as file:
        for row in sums(arguments.terms, arguments.digits, arguments.count, arguments.seed):
            file.write(json.dumps(row) + "\n")
