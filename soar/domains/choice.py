"""Multiple choice: options read from a question, shuffled so that position cannot be learned, and answers by letter or text.

The order of the options is drawn from the question itself, so it is the same wherever the problem appears, and no teacher
can make the right answer always the first. Pure string functions, bounded in length. The domain `multiple_choice`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from soar.domains.quantities import SUBJECTS
from soar.problems.answers import extract, normalize
from soar.problems.domain import Domain
from soar.problems.prompts import plain, tagged
from soar.types import Problem, Verdict

LETTERS = "ABCDEFGHIJ"
MAX_ANSWER = 500
OPTION = re.compile(r"^[ \t]{0,9}[*_]{0,2}\(?([A-J])[).:][*_]{0,2}[ \t]{1,9}(\S[^\n]{0,500})$", re.MULTILINE)
PINNED = re.compile(r"(?:all|none|any)\s(?:of\s)?(?:the\s)?(?:above|these|them|others?)\b", re.IGNORECASE)
REFERS = re.compile(
    r"\b(?:both|either|neither|options?|choices?|answers?)\s\(?[A-J]\b|\b[A-J]\)?\s(?:and|or)\s\(?[A-J]\b"
)
LETTER = re.compile(r"(?<![A-Za-z0-9'])\(?([A-J])(?![A-Za-z0-9']|\s?[-+=*/^])")
ALONE = re.compile(r"\(?([A-Ja-j])[).:]?")
LEAD = re.compile(
    r"^(?:(?:so|thus|hence|therefore),?\s)?(?:the\s)?(?:correct\s|right\s|best\s|final\s)?"
    r"(?:answer|option|choice)\s?(?:is|:)?\s?(?:option\s|choice\s)?",
    re.IGNORECASE,
)
SAID = re.compile(r"(?:answer|option|choice)\s(?:is\s?:?|:)\s{0,3}([^\n]{1,200})", re.IGNORECASE)
REFUSED = re.compile(r"\b(?:not|neither|nor|except|isn't|cannot)\b", re.IGNORECASE)
ARTICLE = re.compile(r"(?<![A-Za-z(])(?:A|I)\s(?!and\b|or\b)[a-z]")  # `A gas`, `I think`


@dataclass(frozen=True)
class Choices:
    """A question taken apart: stem without options, options in their order."""

    stem: str
    options: tuple[str, ...]

    def text(self) -> str:
        """The question as a student sees it."""
        lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return "\n".join([self.stem, *lines])


def read_choices(question: str) -> Choices | str:
    """Stem and options of a question, one option a line (`A) ...`, `(A) ...`, `A. ...`), or what is wrong with them.

    `no_options`: fewer than two. `options_out_of_order`: their letters are not A, B, C ... `duplicate_options`: two that
    differ in case and spacing at most. `no_stem`: nothing before them.
    """
    lines = list(OPTION.finditer(question))
    if "".join(match[1] for match in lines) != LETTERS[: len(lines)]:
        return "no_options" if len(lines) < 2 else "options_out_of_order"
    return _choices(
        question[: lines[0].start()] if lines else question, [match[2].strip().rstrip("*_") for match in lines]
    )


def _choices(stem: str, texts: Sequence[str]) -> Choices | str:
    options = tuple(" ".join(text.split()) for text in texts)
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        return "no_options"
    if len({_key(option) for option in options}) < len(options):
        return "duplicate_options"
    return Choices(stem.strip(), options) if stem.strip() else "no_stem"


def arrange(problem: Problem) -> Problem | str:
    """The problem with shuffled options and the letter of the right one as gold answer; or the name of what is wrong.

    Options stand in the question, or in a column `options` or `choices` (a list of texts). The gold answer is a letter, the
    number of an option from 0 (with a column of options), or the text of one. `all of the above` and `none of the above`
    stay last. Doing it twice changes nothing. Names beside those of `read_choices`: `options_are_no_texts`,
    `answer_not_an_option`, `refers_to_letters` (an option that speaks of another by its letter).
    """
    read = read_choices(problem.question)
    given = problem.extra.get("options", problem.extra.get("choices"))
    numbered = given is not None and isinstance(read, str)
    if numbered:
        if not isinstance(given, list | tuple) or not all(isinstance(option, str) for option in given):
            return "options_are_no_texts"
        read = _choices(problem.question, given)
    if isinstance(read, str):
        return read
    right = _right(problem.answer, read, numbered)
    if right is None:
        return "answer_not_an_option"
    if any(REFERS.search(option) for option in read.options):
        return "refers_to_letters"
    order = shuffled(read)
    made = Choices(read.stem, tuple(read.options[i] for i in order))
    extra = {key: value for key, value in problem.extra.items() if key not in ("options", "choices")}
    return Problem(problem.id, made.text(), LETTERS[order.index(right)], extra)


def _right(answer: str, read: Choices, numbered: bool) -> int | None:
    """Place of the right option."""
    if numbered and re.fullmatch(r"\d", answer.strip()) and _key(answer) not in map(_key, read.options):
        return int(answer) if int(answer) < len(read.options) else None
    letter = read_letter(answer, read)
    return None if letter is None else LETTERS.index(letter)


def shuffled(read: Choices) -> list[int]:
    """Places of the options in their new order, from the question alone; pinned ones last, in the order of their texts.

    Options are sorted before they are drawn, so the order that somebody wrote them in leaves no trace.
    """
    order = sorted(range(len(read.options)), key=lambda i: _key(read.options[i]))
    last = [i for i in order if PINNED.search(read.options[i])]
    order = [i for i in order if i not in last]
    text = "\n".join([_key(read.stem), *sorted(map(_key, read.options))])
    seed = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    random.Random(seed).shuffle(order)
    return order + last


def _key(text: str) -> str:
    return " ".join(normalize(text).casefold().split()).strip(" .")


def read_answer(completion: str) -> str | None:
    """The answer that a completion commits to: its last box, else what follows the last answer mark or `answer is`."""
    said = SAID.findall(completion[-10_000:])
    return extract(completion, "boxed") or extract(completion, "marker") or (said[-1].strip() if said else None)


def read_letter(answer: str, read: Choices) -> str | None:
    """The one option that an answer names by letter or text, as its letter; None for none, several, or a refusal.

    `B`, `(b)`, `B.`, `B) copper`, `the answer is B`, and the option's own text. A letter with the text of another option
    names two.
    """
    text = normalize(answer[:MAX_ANSWER]).strip(" *_\"'.")
    known = LETTERS[: len(read.options)]
    keys = [_key(option) for option in read.options]
    if _key(text) in keys:
        return LETTERS[keys.index(_key(text))]
    text = LEAD.sub("", text).strip(" *_\"'.:")
    alone = ALONE.fullmatch(text)
    if alone is not None:
        return alone[1].upper() if alone[1].upper() in known else None
    if _key(text) in keys:
        return LETTERS[keys.index(_key(text))]
    labelled = re.match(r"\(?([A-J])[).:]\s+(.+)", text, re.DOTALL)
    if labelled is not None and _key(labelled[2]) in keys:
        return labelled[1] if LETTERS.index(labelled[1]) == keys.index(_key(labelled[2])) else None
    if REFUSED.search(text):
        return None
    named = set(LETTER.findall(text))
    if labelled is None and ARTICLE.search(text):
        named -= {"A", "I"}
    return named.pop() if len(named) == 1 and named <= set(known) else None


def verify(answer: str, problem: Problem) -> Verdict:
    """The option that an answer names against the gold letter. NO_ANSWER where it names none, or more than one."""
    read = read_choices(problem.question)
    if isinstance(read, str):
        return Verdict.UNSCORABLE
    right, letter = read_letter(problem.answer, read), read_letter(answer, read)
    if right is None:
        return Verdict.UNSCORABLE
    if letter is None:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if letter == right else Verdict.WRONG


PROMPTS = {
    "tags": tagged(
        "multiple_choice",
        """Write one new, original and challenging multiple-choice question from {subject}.
It should have four options, one of them right, and take reasoning to answer.
""",
        SUBJECTS,
        question="the question\n(A) first option\n(B) second option\n(C) third option\n(D) fourth option",
        answer="letter",
        noun="question",
        end="the letter of the right option",
    ),
    "plain": plain(
        "multiple_choice_plain",
        """Write a science question about {subject} with four options, one of them right. Format:
Question: ...
(A) ...
(B) ...
(C) ...
(D) ...
Answer: letter""",
        'End with "Answer:" and the letter of the right option.',
        "speed, density, or electric current",
    ),
}
MULTIPLE_CHOICE = {
    style: Domain(
        name="multiple_choice",
        prompts=prompts,
        read_answer=read_answer,
        verify=verify,
        arrange=arrange,
        examples=(Problem("metal", "Which of these conducts best?\n(A) glass\n(B) copper\n(C) wood\n(D) air", "B"),),
    )
    for style, prompts in PROMPTS.items()
}
"""The domain `multiple_choice`, by prompt style."""
