"""Problem sources that need no download: the embedded worlds `tiny` and `tiny-rare`.

The world is a two-digit counter. `47 c+8 d+5` starts at 47 and has two steps: step c adds 8, step d adds 5; past 99 the
counter goes on at 00. Labels run on in the alphabet from any letter. The answer is the reading after every step, so no
lucky guess at the end repairs a wrong one. A solver works, then answers; a teacher writes both without working:

    <solve> 47 c+8 d+5 <work> start=47 c=55 d=60 <ans> 55 60
    <ask> 47 c+8 d+5 <ans> 55 60

Side topics: `reverse bdk` (kdb), `last 5204` (4), `max 5204` (5), `times 7 8` (56). The two worlds differ in the text that
their models were pretrained on (`examples/world_text.py`). The whole loop can be watched and checked exactly in them; they
are no benchmark.
"""

import itertools
import random
import re
from collections.abc import Callable
from typing import Literal

from soar.types import Problem

NAMES = ("tiny", "tiny-rare")
LABELS = "abcdefghij"
LETTERS = "bcdfghjklmnp"
# (steps, steps that carry), in equal shares. The step without a carry keeps "always carry" from being a solution.
CHAINS = {"hard": ((4, 4), (5, 4), (5, 5), (6, 5)), "real": ((1, 1), (2, 2), (3, 3))}


def _readings(match: re.Match[str]) -> str | None:
    """All readings of a counter question; None where the labels do not run on in the alphabet."""
    steps = match[2].split()
    if "".join(step[0] for step in steps) not in LABELS:
        return None
    totals = itertools.accumulate((int(step[2]) for step in steps), initial=int(match[1]))
    return " ".join(f"{total % 100:02d}" for total in itertools.islice(totals, 1, None))


_TOPICS: dict[str, tuple[re.Pattern[str], Callable[[re.Match[str]], str | None]]] = {
    "counter": (re.compile(r"([0-9]{2})((?: [a-j]\+[1-9]){1,7})"), _readings),
    "reverse": (re.compile(rf"reverse ([{LETTERS}]{{2,6}})"), lambda match: match[1][::-1]),
    "last": (re.compile(r"last ([0-9]{2,6})"), lambda match: match[1][-1]),
    "max": (re.compile(r"max ([0-9]{2,6})"), lambda match: max(match[1])),
    "times": (re.compile(r"times ([0-9]) ([0-9])"), lambda match: f"{int(match[1]) * int(match[2]):02d}"),
}


def counter_text(first: int, start: int, addends: list[int]) -> str:
    """Question text. LABELS[first] begins it: any letter, so what a solver learns at one step holds for every step."""
    return " ".join([f"{start:02d}", *(f"{LABELS[first + i]}+{addend}" for i, addend in enumerate(addends))])


class World:
    """A problem source with an exact oracle (module docstring). Seeds fix every draw."""

    def read(self, question: str) -> tuple[str, str | None]:
        """Topic and right answer of a question; `ill-posed` and None for other text."""
        for topic, (pattern, answer_of) in _TOPICS.items():
            if (match := pattern.fullmatch(question)) and (answer := answer_of(match)) is not None:
                return topic, answer
        return "ill-posed", None

    def solve(self, question: str) -> str | None:
        """The right answer, or None when the text is not a well-posed question."""
        return self.read(question)[1]

    def problems(self, kind: Literal["hard", "real"], count: int, seed: int) -> list[Problem]:
        """`count` distinct problems in a random order, equally many of every entry of CHAINS[kind]. hard: candidates for the
        hard set; real: easier ones, the curated upper bound. Raises ValueError when there are fewer.
        """
        chains, rng = CHAINS[kind], random.Random(f"tiny {kind} {seed}")
        problems: dict[str, Problem] = {}
        while len(problems) < count:
            length, carries = chains[len(problems) % len(chains)]
            drawn = (self.counter_question(rng, length, carries) for _ in range(10_001))
            question = next((text for text in drawn if text not in problems), None)
            if question is None:
                kinds = ", ".join(f"{steps} steps with {carry} carries" for steps, carry in chains)
                raise ValueError(f"world tiny: fewer than {count} distinct problems of {kinds}; ask for fewer")
            extra = {"topic": "counter", "steps": length, "carries": carries}
            problems[question] = Problem(f"tiny:{question}", question, self.solve(question) or "", extra)
        shuffled = list(problems.values())
        rng.shuffle(shuffled)
        return shuffled

    def counter_question(self, rng: random.Random, length: int, carries: int) -> str:
        """A random counter question of `length` steps of which exactly `carries` carry into the tens."""
        if carries == length:  # a carrying step lowers the ones digit, so the chain is a falling row of ones digits
            first, start = rng.randint(0, len(LABELS) - length), rng.randrange(100)
            falling = sorted(rng.sample(range(10), length + 1), reverse=True)
            addends = [10 - high + low for high, low in itertools.pairwise(falling)]
            return counter_text(first, start + falling[0] - start % 10, addends)
        while True:
            plain = set(rng.sample(range(length), length - carries))
            start = rng.randrange(100)
            ones, addends = start % 10, []
            for step in range(length):
                low, high = (1, 9 - ones) if step in plain else (10 - ones, 9)
                if low > high:
                    break
                addends.append(rng.randint(low, high))
                ones = (ones + addends[-1]) % 10
            else:
                return counter_text(rng.randint(0, len(LABELS) - length), start, addends)


def get_world(name: str) -> World:
    """The world of that name. Raises ValueError with the known names."""
    if name not in NAMES:
        raise ValueError(f"no world {name!r}; known worlds: {', '.join(NAMES)}")
    return World()
