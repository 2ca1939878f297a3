"""Every prompt, and its way to token ids; the words are in assets/prompts.toml.

Two rules hold for every tokenizer. A prompt starts with exactly one BOS if the tokenizer puts one before plain text, and
with none else. And text that somebody else wrote (a question, a subject) never yields control ids: `<|im_end|>` in a
question reaches the model as the characters it is made of.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from soar.files import asset

WORDS = asset("prompts")
PLAIN_TURNS = "User: {content}\n\nAssistant:"
SENTINEL = "QUESTIONSENTINEL"
WORD_MARKS = " \u0120\u2581"  # how vocabularies write the space before a word


@dataclass(frozen=True)
class PromptFormat:
    """How teacher and student are asked, and how their answers are marked (docs/domains.md)."""

    name: str
    answer_style: Literal["boxed", "marker"]  # where a student's answer stands (`answers.extract`)
    teacher_template: str  # holds `{subject}`, or nothing to fill in
    student_template: str  # holds `{question}`
    default_subject: str = ""
    turns: bool = True  # the prompt is a user turn (chat template, or `User:/Assistant:` without one); else raw text
    teacher_prefill: str = ""  # beginning of the teacher's own turn, in the prompt; `domain.Grader` puts it back
    answer_marks: tuple[str, ...] = ()  # of answers: those that `extract` knows; the first of `marked` is the teacher's
    control_words: tuple[str, ...] = ()  # words of the vocabulary that steer the model
    placeholders: tuple[str, ...] = tuple(WORDS["placeholders"])  # of question and answer in the teacher prompt
    text_answers: bool = False  # words can be answers
    # How a teacher text holds question and answer. tags: question tags, and the boxed answer in answer tags; labels:
    # `Question: ... Answer: ...`; marked: before and behind the first answer mark; "": tags for boxed answers, else labels
    pair_style: Literal["", "tags", "labels", "marked"] = ""

    def student_text(self, question: str) -> str:
        """What the student is asked."""
        return self.student_template.replace("{question}", question)

    def teacher_ids(self, tokenizer: Any, subject: str = "") -> list[int]:
        """Token ids of the teacher prompt; the subject is encoded as plain text. Ends inside the assistant turn."""
        subject = subject or self.default_subject
        return _encode_prompt(tokenizer, self, self.teacher_template, "{subject}", subject, self.teacher_prefill)

    def student_ids(self, tokenizer: Any, question: str) -> list[int]:
        """Token ids of the student prompt; the question is encoded as plain text."""
        return _encode_prompt(tokenizer, self, self.student_template, "{question}", question, "")

    def fingerprint(self) -> str:
        """sha256 of everything in this format that shapes a prompt or the reading of an answer."""
        return hashlib.sha256(json.dumps([asdict(self), PLAIN_TURNS]).encode()).hexdigest()


def tagged(name: str, teacher: str, subject: str, text_answers: bool = True, **words: str) -> PromptFormat:
    """A format for instruction-tuned models: question tags and boxes.

    teacher: what is asked for, with the last blank. words: `question`, `answer` and `noun` of the form, students' `end`.
    """
    words = {**WORDS["form_words"], **words}
    form, student = (WORDS[key].format(**words) for key in ("form", "student"))
    return PromptFormat(name, "boxed", teacher + form, student, default_subject=subject, text_answers=text_answers)


def frozen(words: dict[str, Any]) -> dict[str, Any]:
    """Fields of a format from its table in TOML, lists as tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in words.items()}


FORMATS = {"tags": tagged("tags", **WORDS["tags"], text_answers=False)}
FORMATS |= {words["name"]: PromptFormat(**frozen(words)) for words in WORDS["format"]}


def _control_ids(tokenizer: Any, fmt: PromptFormat) -> set[int]:
    """Ids that steer the model: added tokens (special or not) and the format's control words."""
    words = tokenizer.get_vocab().items() if fmt.control_words else ()
    ids = {i for word, i in words if word.strip(WORD_MARKS) in fmt.control_words}
    ids |= {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return ids - {getattr(tokenizer, "unk_token_id", None)}


def turn_end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the control tokens that end an assistant's turn in the chat template, in the middle and at the end of a chat."""
    added, ends = _control_ids(tokenizer, FORMATS["tags"]), set[int]()
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}]
    for turns in (chat, chat + chat[:1]) if getattr(tokenizer, "chat_template", None) else ():
        text = ""
        with suppress(Exception):  # a template may refuse such a chat, in any way
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        _, there, behind = text.rpartition(SENTINEL)
        ends |= added & set(_ids(tokenizer, behind.lstrip())[:1] if there else [])
    return frozenset(ends)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode(text, add_special_tokens=False)] if text else []


def encode_plain(tokenizer: Any, text: str, control: set[int]) -> list[int]:
    """Ids of `text` with none of `control`. A character that the tokenizer knows only as a control id is left out.

    The text is halved until no piece holds a control text: that works for slow and fast tokenizers and all added tokens.
    """
    ids = _ids(tokenizer, text)
    if not control & set(ids):
        return ids
    if len(text) < 2:
        return [i for i in ids if i not in control]
    half = len(text) // 2
    return [i for piece in (text[:half], text[half:]) for i in encode_plain(tokenizer, piece, control)]


def _encode_prompt(tokenizer: Any, fmt: PromptFormat, template: str, slot: str, text: str, prefill: str) -> list[int]:
    """Ids of the prompt with `text` in the place of `slot`.

    Rendered and encoded in one piece, as the model was trained; in three, the middle one as plain text, only where `text`
    changes the control ids, or the template alters it.
    """
    text = text.encode("utf-8", "replace").decode()  # no tokenizer takes a lone surrogate, half of a character
    frame, control = template.replace(slot, SENTINEL), _control_ids(tokenizer, fmt)
    if fmt.turns and getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": frame}]
        frame = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    elif fmt.turns:
        frame = PLAIN_TURNS.replace("{content}", frame) + " " * bool(prefill)
    before, slotted, after = (frame + prefill).partition(SENTINEL)
    ids = _ids(tokenizer, before + (text if slotted else "") + after)
    wanted = [i for i in _ids(tokenizer, before + "x" + after) if i in control]
    if slotted and [i for i in ids if i in control] != wanted:
        stem = before.rstrip(" ")
        middle = before[len(stem) :] + text
        ids = _ids(tokenizer, stem) + encode_plain(tokenizer, middle, control) + _ids(tokenizer, after)
    bos: Any = getattr(tokenizer, "bos_token_id", None)
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    adds_bos = bos is not None and list(tokenizer.encode("a"))[:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else ids
