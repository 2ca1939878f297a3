"""A verifier of your own: the answer counts when its last digit is right, so a forgotten carry does no harm.

python examples/custom_verifier.py
"""

from small import SMALL

import soar


def last_digit(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """1.0 for a completion that ends in the last digit of the gold answer. Runs in a process of its own."""
    return [float(text.strip().endswith(gold[-1])) for text, gold in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    problems = [{"question": f"{n:02d} a+{n % 9 + 1}", "answer": f"{(n + n % 9 + 1) % 100:02d}"} for n in range(10, 40)]
    screened = soar.screen("builtin:tiny", problems, recipe="tiny", verifier=last_digit, settings=SMALL)
    strict = soar.screen("builtin:tiny", problems, recipe="tiny", verifier="exact", settings=SMALL)
    for name, rows in (("last_digit", screened), ("exact", strict)):
        print(f"{name}: {sum(counts.successes for _, counts in rows)} of {sum(c.attempts for _, c in rows)} attempts")
