"""A verifier of your own: the answer counts when it is right up to the last digit.

python examples/custom_verifier.py
"""

from small import SMALL

import soar


def nearly(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1.0 for a completion that ends in the gold answer but for its last character. Runs in a process of its own."""
    return [float(text.strip()[:-1].endswith(gold[:-1])) for text, gold in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    problems = [{"question": f"{n:02d} a+{n % 9 + 1}", "answer": f"{(n + n % 9 + 1) % 100:02d}"} for n in range(10, 40)]
    screened = soar.screen("builtin:tiny", problems, recipe="tiny", verifier=nearly, settings=SMALL)
    strict = soar.screen("builtin:tiny", problems, recipe="tiny", verifier="exact", settings=SMALL)
    for name, rows in (("nearly", screened), ("exact", strict)):
        print(f"{name}: {sum(counts.successes for _, counts in rows)} of {sum(c.attempts for _, c in rows)} attempts")
