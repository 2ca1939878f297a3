"""Multiple choice: options read from a question, shuffled so that position cannot be learned, and answers by letter or text.

The order of the options is drawn from the question itself, so it is the same wherever the problem appears, and no teacher
can make the right answer always the first. Pure string functions, bounded in length.

    soar check small-1gpu --model MODEL --problems choices.jsonl --set problems.domain=examples/multiple_choice.py:DOMAIN
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from soar.problems.answers import extract, normalize
from soar.problems.domain import Domain
from soar.problems.prompts import PromptFormat
from soar.types import Problem, Verdict

LETTERS = "ABCDEFGHIJ"
MAX_ANSWER = 500
OPTION = re.compile(r"(?m)^[ \t]{0,9}[*_]{0,2}\(?([A-J])[).:][*_]{0,2}[ \t]{1,9}(\S[^\n]{0,500})$")
PINNED = re.compile(r"(?i)(?:all|none|any)\s(?:of\s)?(?:the\s)?(?:above|these|them|others?)\b")  # stays last
REFERS = re.compile(  # speaks of letters
    r"\b(?:both|either|neither|options?|choices?|answers?)\s\(?[A-J]\b|\b[A-J]\)?\s(?:and|or)\s\(?[A-J]\b"
)
LETTER = re.compile(r"(?<![A-Za-z0-9'])\(?([A-J])(?![A-Za-z0-9']|\s?[-+=*/^])")  # in a sentence
ALONE = re.compile(r"\(?([A-Ja-j])[).:]?")
LEAD = re.compile(  # stands before the answer
    r"(?i)^(?:(?:so|thus|hence|therefore),?\s)?(?:the\s)?(?:correct\s|right\s|best\s|final\s)?"
    r"(?:answer|option|choice)\s?(?:is|:)?\s?(?:option\s|choice\s)?"
)
SAID = re.compile(
    r"(?i)(?:answer|option|choice)\s(?:is\s?:?|:)\s{0,3}([^\n]{1,200})"
)  # what a completion says that it is
REFUSED = re.compile(r"(?i)\b(?:not|neither|nor|except|isn't|cannot)\b")
ARTICLE = re.compile(r"(?<![A-Za-z(])(?:A|I)\s(?!and\b|or\b)[a-z]")  # no letters: `A gas`, `I think`

PROMPTS = PromptFormat(
    name="multiple_choice",
    answer_style="boxed",
    teacher_template="""Write one new, original and challenging multiple-choice question from {subject}.
It should have four options, one of them right, and take reasoning to answer.
You may think first. Then write exactly one question, in this form:

<question>
the question
(A) first option
(B) second option
(C) third option
(D) fourth option
</question>
<answer>
\\boxed{letter}
</answer>

Put nothing but the question between the question tags, and nothing but the boxed answer between the answer tags.
Reasoning belongs outside of the tags.""",
    student_template="{question}\n\nReason step by step, and end with the letter of the right option in \\boxed{}.",
    default_subject="mechanics, electricity, heat, waves, chemistry, or radioactivity",
    text_answers=True,
)


class Choices(NamedTuple):
    """A question taken apart: stem without options, options in their order."""

    stem: str
    options: tuple[str, ...]


def read_choices(question: str) -> Choices | str:
    """Stem and options of a question, one option a line (`A) ...`, `(A) ...`, `A. ...`), or what is wrong with them.

    `no_options`: fewer than two. `options_out_of_order`: their letters are not A, B, C ... `duplicate_options`: two that
    differ in case and spacing at most. `no_stem`: nothing before them.
    """
    lines = list(OPTION.finditer(question))
    if len(lines) > 1 and "".join(match[1] for match in lines) != LETTERS[: len(lines)]:
        return "options_out_of_order"
    stem = question[: lines[0].start()] if lines else question
    return _choices(stem, [match[2].strip().rstrip("*_") for match in lines])


def _choices(stem: str, texts: Sequence[str]) -> Choices | str:
    options = tuple(" ".join(text.split()) for text in texts)
    if not 2 <= len(options) <= len(LETTERS) or not all(options):
        return "no_options"
    if len({_key(option) for option in options}) < len(options):
        return "duplicate_options"
    return Choices(stem.strip(), options) if stem.strip() else "no_stem"


def arrange(problem: Problem) -> Problem | str:
    """The problem with shuffled options and the letter of the right one as gold answer; or the name of what is wrong.

    Options stand in the question, or in a column `options` or `choices` (a list of texts, or ARC's object of `text` and
    `label`). The gold answer is a letter or label, the number of an option from 0 (with a column of options), or the text of
    one. `all of the above` and `none of the above` stay last. Doing it twice changes nothing. Names beside those of
    `read_choices`: `options_are_no_texts`, `answer_not_an_option`, `refers_to_letters` (an option that speaks of another by
    its letter).
    """
    read, number = read_choices(problem.question), ""
    given = problem.extra.get("options", problem.extra.get("choices"))
    if given is not None and isinstance(read, str):
        if isinstance(given, dict):
            labels, given = given.get("label") or [], given.get("text")
            number = str(labels.index(problem.answer)) if problem.answer in labels else ""
        if not isinstance(given, list | tuple) or not all(isinstance(option, str) for option in given):
            return "options_are_no_texts"
        read = _choices(problem.question, given)
        if not number and re.fullmatch(r"\s*\d\s*", problem.answer) and _key(problem.answer) not in map(_key, given):
            number = problem.answer
    if isinstance(read, str):
        return read
    right = LETTERS[int(number)] if number else read_letter(problem.answer, read)
    if right is None or LETTERS.index(right) >= len(read.options):
        return "answer_not_an_option"
    if any(REFERS.search(option) for option in read.options):
        return "refers_to_letters"
    order = shuffled(read)
    lines = [f"({letter}) {read.options[i]}" for letter, i in zip(LETTERS, order, strict=False)]
    extra = {key: value for key, value in problem.extra.items() if key not in ("options", "choices")}
    return Problem(problem.id, "\n".join([read.stem, *lines]), LETTERS[order.index(LETTERS.index(right))], extra)


def shuffled(read: Choices) -> list[int]:
    """Places of the options in their new order, drawn from the question alone; pinned ones last.

    Options are sorted before they are drawn, so the order that somebody wrote them in leaves no trace.
    """
    order = sorted(range(len(read.options)), key=lambda i: _key(read.options[i]))
    last = [i for i in order if PINNED.search(read.options[i])]
    order = [i for i in order if i not in last]
    text = "\n".join([_key(read.stem), *sorted(map(_key, read.options))])
    random.Random(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()).shuffle(order)
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
    letters = {_key(option): letter for letter, option in zip(LETTERS, read.options, strict=False)}
    bare = LEAD.sub("", text).strip(" *_\"'.:")
    alone, labelled = ALONE.fullmatch(bare), re.match(r"\(?([A-J])[).:]\s+(.+)", bare, re.DOTALL)
    if _key(text) in letters:
        return letters[_key(text)]
    if alone is not None:
        return alone[1].upper() if alone[1].upper() in letters.values() else None
    if _key(bare) in letters:
        return letters[_key(bare)]
    if labelled is not None and _key(labelled[2]) in letters:
        return labelled[1] if labelled[1] == letters[_key(labelled[2])] else None
    named = set(LETTER.findall(bare)) - ({"A", "I"} if labelled is None and ARTICLE.search(bare) else set())
    return named.pop() if len(named) == 1 and named <= {*letters.values()} and not REFUSED.search(bare) else None


def verify(answer: str, problem: Problem) -> Verdict:
    """The option that an answer names against the gold letter. NO_ANSWER where it names none, or more than one."""
    read = read_choices(problem.question)
    right = None if isinstance(read, str) else read_letter(problem.answer, read)
    if isinstance(read, str) or right is None:
        return Verdict.UNSCORABLE
    letter = read_letter(answer, read)
    if letter is None:
        return Verdict.NO_ANSWER
    return Verdict.CORRECT if letter == right else Verdict.WRONG


DOMAIN = Domain(
    "multiple_choice",
    PROMPTS,
    read_answer=read_answer,
    verify=verify,
    arrange=arrange,
    examples=(Problem("metal", "Which of these conducts best?\n(A) glass\n(B) copper\n(C) wood\n(D) air", "B"),),
)
