"""Teacher text -> problem. `parse` is the only way from model-written text to a `Problem`; it says why when there is none."""

from __future__ import annotations

import re

from soar.problems.answers import END_OF_TURN, MAX_ANSWER_CHARS, extract, normalize
from soar.problems.load import fingerprint
from soar.problems.prompts import PromptFormat
from soar.problems.verify import gold_kind
from soar.types import Problem, Reason, Rejection

# Repeats are bounded: an unbounded one beside another makes a search over hostile text quadratic.
TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}(question|answer)\s{0,3}>", re.IGNORECASE)
QUESTION_LABEL = re.compile(
    r"(?:^|\n)[ \t>#*_]{0,9}question[ \t]{0,3}\d{0,3}[ \t]{0,3}[*_]{0,3}:[*_]{0,3}", re.IGNORECASE
)
ANSWER_LABEL = re.compile(
    r"(?:^|\n|[ \t])[>#*_]{0,9}(?:the )?(?:final |correct )?answer(?: is)?[ \t]{0,3}[*_]{0,3}:[*_]{0,3}", re.IGNORECASE
)
MAX_TEACHER_CHARS = 100_000
MAX_QUESTION_CHARS = 4_000

Fields = tuple[str, str]


def parse(
    text: str,
    fmt: PromptFormat,
    *,
    truncated: bool = False,
    max_answer_chars: int = MAX_ANSWER_CHARS,
    any_answer: bool = False,
) -> Problem | Rejection:
    """The problem in one teacher completion, or the reason why there is none.

    truncated: the completion hit its token budget. Whether the answer can be checked against is left to the caller
    (`VerifierPool.read_problems`).
    """
    if truncated:
        return Rejection(Reason.TRUNCATED, text)
    if not text.strip():
        return Rejection(Reason.EMPTY, text)
    pair_style = fmt.pair_style or ("tags" if fmt.answer_style == "boxed" else "labels")
    fields = READERS[pair_style](text[:MAX_TEACHER_CHARS], fmt)
    if isinstance(fields, Reason):
        return Rejection(fields, text)
    reason = judge_fields(*fields, fmt, max_answer_chars, any_answer)
    return Rejection(reason, text) if reason else make_problem(*fields)


def make_problem(question: str, answer: str) -> Problem:
    """A written problem; its id is the fingerprint of its question."""
    return Problem(fingerprint(question)[:16], question, answer)


def _read_pair(text: str, fmt: PromptFormat) -> Fields | Reason:
    """`question <ans> answer`, or the line `3 + 4 + 5: 3 + 4 = 7, 7 + 5 = 12`: the question, and the end of its working."""
    text, worked = END_OF_TURN.split(text, maxsplit=1)[0], fmt.pair_style == "worked"
    mark = ":" if worked else fmt.answer_marks[0]
    question, found, answer = (text.strip().split("\n", 1)[0] if worked else text).partition(mark)
    if not found:
        return Reason.NO_ANSWER
    if mark in answer:
        return Reason.TWO_PROBLEMS
    return question.strip(), (extract(answer, fmt.answer_style) or "") if worked else answer.strip()


def _read_tags(text: str, fmt: PromptFormat) -> Fields | Reason:
    """Contents of the question tags, and of the box in the answer tags.

    A second opening tag closes the first (the missing slash), upper case and the other order are accepted. A field inside
    another one, or one without an end, does not count; two of a kind are two problems.
    """
    tags = list(TAG.finditer(text))
    found: dict[str, list[str]] = {"question": [], "answer": []}
    position = 0
    while position + 1 < len(tags):
        begin, end = tags[position], tags[position + 1]
        kind = begin[2].lower()
        if begin[1] == "" and end[2].lower() == kind:
            found[kind].append(text[begin.end() : end.start()].strip())
            position += 2
        else:
            position += 1
    for kind, missing in (("question", Reason.NO_QUESTION), ("answer", Reason.NO_ANSWER)):
        if not found[kind]:
            return missing
    if len(found["question"]) > 1 or len(found["answer"]) > 1:
        return Reason.TWO_PROBLEMS
    question, boxed = found["question"][0], found["answer"][0]
    if not question or not boxed:
        return Reason.EMPTY
    answer = extract(boxed, fmt.answer_style)
    return Reason.NO_ANSWER if answer is None else (question, answer)


def _read_labels(text: str, fmt: PromptFormat) -> Fields | Reason:
    """`Question: ... Answer: ...`; text after the first answer line is ignored. Where the answer ends a line (`line`), it is
    what stands behind the last `=` there."""
    if not QUESTION_LABEL.match(text.lstrip()):
        text = f"{fmt.teacher_prefill} {text}"
    text = END_OF_TURN.split(text, maxsplit=1)[0]
    questions = list(QUESTION_LABEL.finditer(text))
    if not questions:
        return Reason.NO_QUESTION
    answer_label = ANSWER_LABEL.search(text, questions[0].end())
    if answer_label is None:
        return Reason.NO_ANSWER
    if len(questions) > 1 and questions[1].start() < answer_label.start():
        return Reason.TWO_PROBLEMS
    question = text[questions[0].end() : answer_label.start()].strip().strip("*_").strip()
    line = (text[answer_label.end() :].strip().split("\n", 1)[0]).strip().strip("*_").strip()
    if fmt.answer_style == "line":
        return question, extract(line, "line") or ""
    return question, line


READERS = {"marked": _read_pair, "tags": _read_tags, "labels": _read_labels, "worked": _read_pair}


def judge_fields(
    question: str, answer: str, fmt: PromptFormat, max_answer_chars: int, any_answer: bool
) -> Reason | None:
    """What is wrong with a complete pair. any_answer: words can be answers whatever the format says."""
    if not question or not answer:
        return Reason.EMPTY
    if any((" ".join(text.casefold().split()).rstrip(".:") or text) in fmt.placeholders for text in (question, answer)):
        return Reason.PLACEHOLDER
    if len(question) > MAX_QUESTION_CHARS or len(answer) > max_answer_chars:
        return Reason.TOO_LONG
    if not normalize(answer):
        return Reason.EMPTY
    if fmt.text_answers or any_answer or any(char.isdigit() for char in answer):
        return None
    return None if gold_kind(answer, "math") == "value" else Reason.UNPARSABLE_ANSWER
