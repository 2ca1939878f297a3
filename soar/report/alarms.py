"""Figures of an outer step's questions, and alarms, decided from the events of a run alone. Pure.

An alarm is what a reader of the results must know; it is told when its condition begins, not again while it lasts. The
thresholds are ours; the paper names none. The Vendi score (Friedman and Dieng 2023, arXiv 2210.02410) of n texts is the
exponential of the entropy of the eigenvalues of K / n, K their cosine similarities: 1 for n equal texts, n for n unrelated
ones. Their vectors see wording, not meaning.
"""

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from soar.files import Row, asset
from soar.loop.evaluate import sign_flip_p

DISTINCT_SHARE = 0.5  # fewer different questions than this share of all
DIVERSITY_SHARE = 0.5  # a smaller Vendi score of the questions than this share of the first step's
MOST_SHARE = 0.5  # more completions cut off, or attempts without a verdict, than this share
LOGPROB_GAP = 0.1  # nats per token; rounding of bfloat16 gives up to about 0.03
CORRECT_SHARE = 0.1  # fewer correct answers than this share, though the step was rewarded
LOST = 0.05  # p of an arm's fall
STILL_STEPS = 3  # steps in a row without a teacher gradient
DIMENSIONS = 1024
TEXTS = asset("alarms")
WORD = re.compile(r"\w+|[^\w\s]")


def hashed_ngrams(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [n, DIMENSIONS] of counts of words, word pairs and character triples, hashed with signs."""
    vectors_n_d = np.zeros((len(texts), DIMENSIONS))
    for row, text in enumerate(texts):
        text = text[:4000].casefold()
        words = WORD.findall(text)
        grams = [*words, *map(" ".join, itertools.pairwise(words))]
        grams += [text[i : i + 3] for i in range(len(text) - 2)]
        for gram, count in Counter(grams).items():
            code = zlib.crc32(gram.encode("utf-8", "surrogatepass"))
            vectors_n_d[row, code % DIMENSIONS] += count if code >> 31 else -count
    vectors_n_d[~vectors_n_d.any(axis=1), 0] = 1.0
    return vectors_n_d / np.linalg.norm(vectors_n_d, axis=1, keepdims=True)


def vendi_score(vectors_n_d: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues of the similarities / n. vectors: rows of unit length, at least one."""
    small_first = vectors_n_d if vectors_n_d.shape[0] <= vectors_n_d.shape[1] else vectors_n_d.T
    values = np.linalg.eigvalsh(small_first @ small_first.T / vectors_n_d.shape[0])
    values = values[values > 1e-12]
    return float(np.exp(-np.sum(values * np.log(values))))


def step_vendi(texts: Sequence[str]) -> float:
    """Vendi score of at least one text, rounded: the last bits of a sum in another order (other threads) change no metric."""
    return round(vendi_score(hashed_ngrams(texts)), 6)


def alarm(kind: str, message: str, step: int | None = None) -> Row:
    """An `alarm` event."""
    return {"event": "alarm", "step": step, "kind": kind, "message": message}


def screen_alarms(event: Row) -> list[Row]:
    """Alarms of the `screen` event."""
    share = event.get("truncated_share") or 0.0
    return [alarm("truncation", TEXTS["screening"].format(share))] if share > MOST_SHARE else []


def lost_alarms(curve: Sequence[Row], end: Row) -> list[Row]:
    """The alarm of an arm that ends below its best reading on the way by more than chance.

    curve: its `curve` events. end: its `evaluation`. Chance: the sign-flip test of the problems' right answers has p > LOST
    over the number of readings, of which the best was picked (Bonferroni).
    """
    best = max(curve, key=lambda row: sum(row["correct"]), default=end)
    lost_H = [then - now for then, now in zip(best["correct"], end["correct"], strict=True)]
    if sum(lost_H) <= 0 or sign_flip_p(lost_H) > LOST / len(curve):
        return []
    trials = len(lost_H) * end["attempts"]
    at = [f"{sum(row['correct']) / trials:.2%} at {row['total_tokens']:,} tokens" for row in (best, end)]
    return [alarm("arm fell", TEXTS["fell"].format(end["arm"], *at)) | {"arm": end["arm"]}]


def step_alarms(event: Row, questions: Sequence[Row], before: Sequence[Row], learns: bool = True) -> list[Row]:
    """Alarms of the outer step `event` with these rows of questions.jsonl. before: the events of the steps before it, oldest
    first. learns: whether datasets are paid by `reward_G`.
    """
    step, steps = event["step"], [*before, event]
    then = dict(_conditions(before[-1], steps[0])) if before else {}
    alarms = [alarm(kind, message, step) for kind, message in _conditions(event, steps[0]) if kind not in then]
    still = [_no_gradient(row) for row in steps[-STILL_STEPS - 1 :]]
    if learns and still in ([True] * STILL_STEPS, [False, *[True] * STILL_STEPS]):
        alarms.append(alarm("no teacher gradient", TEXTS["still"].format(STILL_STEPS), step))
    marks = [row["correct"] for row in questions if isinstance(row.get("correct"), bool)]
    mean = event.get("reward_mean")
    if marks and mean is not None and mean > 0 and sum(marks) < CORRECT_SHARE * len(marks):
        text = TEXTS["wrong"].format(mean, sum(marks), len(marks))
        alarms.append(alarm("reward without correctness", text, step))
    return alarms


def _conditions(event: Row, first: Row) -> Iterator[tuple[str, str]]:
    """(kind, message) of what holds at one step. first: the event of the run's first step."""
    distinct = event.get("distinct_share")
    if distinct is not None and distinct < DISTINCT_SHARE:
        yield "teacher collapse", TEXTS["collapse"].format(distinct)
    vendi, start = event.get("vendi"), first.get("vendi")
    if vendi is not None and start is not None and vendi < DIVERSITY_SHARE * start:
        yield "teacher diversity", TEXTS["diversity"].format(vendi, start)
    cut = event.get("rejected", {}).get("truncated", 0) / max(1, event.get("sampled") or 1)
    if cut > MOST_SHARE:
        yield "teacher truncation", TEXTS["teacher_texts"].format(cut)
    students = event.get("student_last") or {}
    shares = (("truncation", "completions", "completions/clipped_ratio"), ("not judged", "lost", "not_judged"))
    for kind, text, key in shares:
        if (share := students.get(key) or 0.0) > MOST_SHARE:
            yield kind, TEXTS[text].format(share)
    for who, gap in (("teacher", event.get("teacher_logprob_gap")), ("students", students.get("logprob_gap"))):
        if gap is not None and gap > LOGPROB_GAP:
            yield f"log-prob gap of the {who}", TEXTS["gap"].format(gap)


def _no_gradient(event: Row) -> bool:
    rewards = {*(event.get("teacher_reward_G") or event.get("reward_G") or [])} - {None}
    return len(rewards) < 2 or event.get("teacher_grad_norm") == 0.0
