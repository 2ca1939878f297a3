"""Write programming exercises as a problem file for the domain `code`: chains of simple steps on a list or a text.

python examples/code_exercises.py code.jsonl --levels 1 --count 192
python examples/code_exercises.py code.jsonl --levels 2 3 4 5

An exercise's level is the number of its steps. The task is told step by step, with one example; the tests are values that
a reference computed here from the same steps, so tests and reference solution (column `solution`) cannot disagree with it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

LEVELS = range(1, 9)
TESTS = 6


@dataclass(frozen=True)
class Step:
    """words: what is done, with `{k}`. code: the line that does it to `x`. run: the same, as a function of x and k.

    low, high: range of k.
    """

    words: str
    code: str
    run: Callable[[Any, int], Any]
    low: int = 2
    high: int = 9


NUMBER_STEPS = (
    Step("Keep only the even numbers.", "[v for v in x if v % 2 == 0]", lambda x, k: [v for v in x if v % 2 == 0]),
    Step("Keep only the odd numbers.", "[v for v in x if v % 2 == 1]", lambda x, k: [v for v in x if v % 2 == 1]),
    Step("Add {k} to every number.", "[v + {k} for v in x]", lambda x, k: [v + k for v in x]),
    Step("Multiply every number by {k}.", "[v * {k} for v in x]", lambda x, k: [v * k for v in x], 2, 5),
    Step("Subtract every number from {k}.", "[{k} - v for v in x]", lambda x, k: [k - v for v in x], 10, 50),
    Step("Reverse the order.", "x[::-1]", lambda x, k: x[::-1]),
    Step("Sort the numbers in ascending order.", "sorted(x)", lambda x, k: sorted(x)),
    Step("Remove every number that occurred before.", "list(dict.fromkeys(x))", lambda x, k: list(dict.fromkeys(x))),
    Step("Leave out the first number.", "x[1:]", lambda x, k: x[1:]),
    Step("Leave out the last number.", "x[:-1]", lambda x, k: x[:-1]),
    Step("Keep every second number, beginning with the first.", "x[::2]", lambda x, k: x[::2]),
    Step(
        "Replace every number by its remainder modulo {k}.", "[v % {k} for v in x]", lambda x, k: [v % k for v in x], 3
    ),
    Step(
        "Keep only the numbers greater than {k}.",
        "[v for v in x if v > {k}]",
        lambda x, k: [v for v in x if v > k],
        2,
        12,
    ),
    Step(
        "Replace every number by the sum of all numbers up to and including it.",
        "[sum(x[: i + 1]) for i in range(len(x))]",
        lambda x, k: list(accumulate(x)),
    ),
    Step(
        "Replace every number by its position (from 0) times itself.",
        "[i * v for i, v in enumerate(x)]",
        lambda x, k: [i * v for i, v in enumerate(x)],
    ),
)
NUMBER_ENDS = (
    Step("Return the list.", "x", lambda x, k: x),
    Step("Return the sum of the numbers.", "sum(x)", lambda x, k: sum(x)),
    Step("Return how many numbers there are.", "len(x)", lambda x, k: len(x)),
    Step("Return the largest number, or 0 if there is none.", "max(x, default=0)", lambda x, k: max(x, default=0)),
    Step(
        "Return the largest number minus the smallest, or 0 if there is none.",
        "max(x, default=0) - min(x, default=0)",
        lambda x, k: max(x, default=0) - min(x, default=0),
    ),
)


def _letters(x: str, k: int) -> str:
    return "".join(c for c in x if c.isalpha())


def _no_vowels(x: str, k: int) -> str:
    return "".join(c for c in x if c.lower() not in "aeiou")


TEXT_STEPS = (
    Step("Turn the text into lower case.", "x.lower()", lambda x, k: x.lower()),
    Step("Turn the text into upper case.", "x.upper()", lambda x, k: x.upper()),
    Step("Reverse the text.", "x[::-1]", lambda x, k: x[::-1]),
    Step(
        "Remove all vowels (a, e, i, o, u, in either case).",
        "''.join(c for c in x if c.lower() not in 'aeiou')",
        _no_vowels,
    ),
    Step("Replace every space by a hyphen.", "x.replace(' ', '-')", lambda x, k: x.replace(" ", "-")),
    Step("Double every character.", "''.join(c * 2 for c in x)", lambda x, k: "".join(c * 2 for c in x)),
    Step("Keep only the first {k} characters.", "x[:{k}]", lambda x, k: x[:k], 5, 12),
    Step("Leave out the first {k} characters.", "x[{k}:]", lambda x, k: x[k:], 1, 3),
    Step("Keep every second character, beginning with the first.", "x[::2]", lambda x, k: x[::2]),
    Step(
        "Put the words, separated by single spaces, in alphabetical order (upper case first).",
        "' '.join(sorted(x.split()))",
        lambda x, k: " ".join(sorted(x.split())),
    ),
    Step("Swap lower and upper case.", "x.swapcase()", lambda x, k: x.swapcase()),
    Step("Keep only the letters.", "''.join(c for c in x if c.isalpha())", _letters),
)
TEXT_ENDS = (
    Step("Return the text.", "x", lambda x, k: x),
    Step("Return the number of characters.", "len(x)", lambda x, k: len(x)),
    Step(
        "Return the number of vowels (a, e, i, o, u, in either case).",
        "sum(c.lower() in 'aeiou' for c in x)",
        lambda x, k: sum(c.lower() in "aeiou" for c in x),
    ),
    Step("Return whether it reads the same backwards.", "x == x[::-1]", lambda x, k: x == x[::-1]),
    Step("Return the set of its characters.", "set(x)", lambda x, k: set(x)),
)
WORDS = ("level", "Anna", "river", "Stone", "orange", "rotor", "Blue", "echo", "noon", "Igloo", "tree", "apple", "Mild")


def _number_input(rng: random.Random) -> list[int]:
    return [rng.randrange(0, 20) for _ in range(rng.randrange(4, 8))]


def _text_input(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randrange(1, 4))]
    return words[0] if rng.random() < 0.3 else " ".join(words)


KINDS = {
    "numbers": ("a list of whole numbers", NUMBER_STEPS, NUMBER_ENDS, _number_input),
    "text": ("a text", TEXT_STEPS, TEXT_ENDS, _text_input),
}


def code_exercises(levels: list[int], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` different exercises, levels in turn: columns question, answer (tests), level, kind, solution."""
    rng = random.Random(f"code/{seed}")
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        level = levels[len(seen) % len(levels)]
        row = _exercise(rng, level, rng.choice(list(KINDS)))
        if row is None or row["question"] in seen:
            misses += 1
            if misses > 1000 * (1 + count):
                raise ValueError(f"there are not {count} different exercises of levels {levels}")
            continue
        seen.add(row["question"])
        yield row


def _exercise(rng: random.Random, level: int, kind: str) -> dict[str, Any] | None:
    """One exercise, or None when its tests would say too little."""
    given, steps, ends, draw = KINDS[kind]
    chain = [(step, rng.randint(step.low, step.high)) for step in rng.sample(steps, level)] + [(rng.choice(ends), 0)]

    def run(value: Any, without: int | None = None) -> Any:
        for number, (step, k) in enumerate(chain):
            value = value if number == without else step.run(value, k)
        return value

    inputs = list({repr(value): value for value in (draw(rng) for _ in range(4 * TESTS))}.values())
    results = [run(value) for value in inputs]
    tests = {_shown(result): (value, result) for value, result in zip(inputs, results, strict=True)}
    chosen = list(tests.values())[: TESTS + 1]
    for value, result in zip(inputs, results, strict=True):
        if len(chosen) <= TESTS and (value, result) not in chosen:
            chosen.append((value, result))
    useful = [pair for pair in chosen if pair[0] != pair[1]]
    if len(tests) < 2 or len(useful) < 3 or len(chosen) <= TESTS:
        return None
    example, *rest = [useful[0], *(pair for pair in chosen if pair is not useful[0])]
    if len({_shown(result) for _, result in rest}) < 2:
        return None
    if any(all(run(value, without) == result for value, result in rest) for without in range(level)):
        return None  # one of the steps makes no difference to the tests
    name = f"change_{kind}"
    told = [f"{number}. {step.words.format(k=k)}" for number, (step, k) in enumerate(chain, start=1)]
    lines = [f"    x = {step.code.format(k=k)}" for step, k in chain[:-1]]
    return {
        "question": f"Write a Python function {name}(x). It is given {given}, x, and does these steps:\n"
        + "\n".join(told)
        + f"\nFor example, {name}({example[0]!r}) returns {_shown(example[1])}.",
        "answer": "\n".join(f"assert {name}({value!r}) == {_shown(result)}" for value, result in rest),
        "level": level,
        "kind": kind,
        "solution": "\n".join([f"def {name}(x):", *lines, f"    return {chain[-1][0].code}"]),
    }


def _shown(value: Any) -> str:
    """A literal that is the same in every process: sets are sorted."""
    if isinstance(value, set):
        return "{" + ", ".join(map(repr, sorted(value))) + "}" if value else "set()"
    return repr(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--levels", type=int, nargs="+", choices=LEVELS, default=[1], help="taken in turn")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    path = options.pop("file")
    try:
        lines = [json.dumps(row) + "\n" for row in code_exercises(**options)]
    except ValueError as error:
        parser.error(str(error))
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines)


if __name__ == "__main__":
    main()
