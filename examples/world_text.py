"""The text that the models of the embedded worlds were pretrained on: solvers that forget carries, and written questions.

The solvers forget most carries (47 c+8 gives c=45), so a model trained on this text solves a chain of L carrying steps
with probability about p^L: long chains are out of reach, one-step questions are not. The questions in the text are wide:
four easy side topics, and text that is no question at all. What this leaves out: natural language, and errors that
depend on each other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from soar.domains import world as worlds
from soar.problems.prompts import FORMATS

TINY = FORMATS["tiny"]
TEACHER_PROMPT, STUDENT_TEMPLATE, (ANSWER_MARK,) = TINY.teacher_template, TINY.student_template, TINY.answer_marks
MOST_STEPS = 7
START = "start"
DIGITS = "0123456789"
VERBS = ("reverse", "last", "max", "times")


@dataclass(frozen=True)
class Shares:
    """Shares and error rates of the text; docs/log.md has the measurements behind them. steps: of the pretraining."""

    steps: int = 4000
    forget_carry: float = 0.94
    wrong_times: float = 0.4
    wrong_written: float = 0.05
    ask_share: float = 0.35
    ask_ill_posed: float = 0.15
    ask_counter: float = 0.50
    ask_lengths: tuple[int, ...] = (1, 1, 1, 2, 2, 2, 3)
    ask_all_carry: float = 0.8


SHARES = {"tiny": Shares(), "tiny-rare": Shares(steps=5000, ask_share=0.5, ask_counter=0.15)}
"""In `tiny-rare` the teacher seldom asks a useful question (13 % of its texts in place of 42 %), so its own questions are too
few for a fresh student, right ones are not, and a better teacher has room (docs/log.md)."""


class WorldText:
    """Documents of one world."""

    def __init__(self, name: str) -> None:
        self.world, self.shares = worlds.get_world(name), SHARES[name]

    def _side_question(self, rng: random.Random) -> str:
        verb = rng.choice(VERBS)
        if verb == "times":
            return f"times {rng.randrange(10)} {rng.randrange(10)}"
        symbols, longest = (worlds.LETTERS, 3) if verb == "reverse" else (DIGITS, 4)
        return f"{verb} {''.join(rng.choice(symbols) for _ in range(rng.randint(2, longest)))}"

    def _ill_posed(self, rng: random.Random) -> str:
        """Text of the world's own words that is no question: a damaged question or words at random."""
        while True:
            kind = rng.randrange(3)
            if kind == 0:
                words = [
                    rng.choice(
                        (
                            f"{rng.choice(worlds.LABELS)}+{rng.randint(1, 9)}",
                            rng.choice(VERBS),
                            f"{rng.randrange(100):02d}",
                            rng.choice(DIGITS),
                            "".join(rng.choice(worlds.LETTERS) for _ in range(rng.randint(2, 4))),
                        )
                    )
                    for _ in range(rng.randint(2, 5))
                ]
            else:
                counter = self._counter(rng, rng.randint(2, 4), False)
                words = (counter if kind == 1 else self._side_question(rng)).split()
                if rng.random() < 0.5:
                    rng.shuffle(words)
                else:
                    words.pop(rng.randrange(len(words)))
            question = " ".join(words)
            if question and self.world.solve(question) is None:
                return question

    def _counter(self, rng: random.Random, length: int, all_carry: bool) -> str:
        """A random counter question; with `all_carry` every step carries into the tens."""
        if all_carry:
            return self.world.counter_question(rng, length, length)
        first, start = rng.randint(0, len(worlds.LABELS) - length), rng.randrange(100)
        return worlds.counter_text(first, start, [rng.randint(1, 9) for _ in range(length)])

    def _wrong(self, rng: random.Random, answer: str) -> str:
        """A random answer of the same shape, not the right one."""
        symbols = DIGITS if answer[0] in DIGITS else worlds.LETTERS
        while True:
            wrong = "".join(" " if symbol == " " else rng.choice(symbols) for symbol in answer)
            if wrong != answer:
                return wrong

    def _asked(self, rng: random.Random) -> tuple[str, str]:
        """A question with a written answer, as in the teacher's role."""
        kind = rng.random()
        if kind < self.shares.ask_ill_posed:
            return self._ill_posed(rng), rng.choice(DIGITS)
        if kind < self.shares.ask_ill_posed + self.shares.ask_counter:
            question = self._counter(rng, rng.choice(self.shares.ask_lengths), rng.random() < self.shares.ask_all_carry)
        else:
            question = self._side_question(rng)
        answer = self.world.solve(question) or ""
        return question, self._wrong(rng, answer) if rng.random() < self.shares.wrong_written else answer

    def _answered(self, rng: random.Random, question: str) -> str:
        """Working, where there are steps, and answer of a pupil who forgets carries."""
        topic, answer = self.world.read(question)
        if answer is None:
            return f" {ANSWER_MARK} {rng.choice(DIGITS)}"
        if topic != "counter":
            wrong = rng.random() < (self.shares.wrong_times if topic == "times" else 0.0)
            return f" {ANSWER_MARK} {self._wrong(rng, answer) if wrong else answer}"
        start, *steps = question.split()
        total, readings = int(start), []
        for addend in (int(step[2]) for step in steps):
            carries = total % 10 + addend >= 10
            total = (total + addend - (10 if carries and rng.random() < self.shares.forget_carry else 0)) % 100
            readings.append(f"{total:02d}")
        work = [f"{step[0]}={reading}" for step, reading in zip(steps, readings, strict=True)]
        return " ".join(["", f"{START}={start}", *work, ANSWER_MARK, *readings])

    def document(self, rng: random.Random, progress: float = 1.0) -> tuple[str, str]:
        """One document (prompt, completion); together they are the text, without <bos> and <eos>.

        progress: share of pretraining done, 0..1; texts grow longer early on.
        """
        if rng.random() < self.shares.ask_share:
            question, answer = self._asked(rng)
            return TEACHER_PROMPT, f" {question} {ANSWER_MARK} {answer}"
        kind = rng.random()
        if kind < 0.05:
            question = self._ill_posed(rng)
        elif kind < 0.25:
            question = self._side_question(rng)
        else:
            longest = min(MOST_STEPS, 1 + int(4 * progress * MOST_STEPS))
            question = self._counter(rng, rng.randint(1, longest), rng.random() < 0.3)
        return STUDENT_TEMPLATE.format(question=question), self._answered(rng, question)
