"""How the teacher's questions changed over outer steps: topics, quality, difficulty, length, diversity. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from soar.files import Row
from soar.report.figures import Axes, Series, bar_chart, line_chart
from soar.report.runs import Run, count
from soar.report.sections import MAX_BINS, column, line, mean

TOPIC_STYLES = (2, 1, 3, 4, 5, 6, 7, 0)
MAX_TOPICS = len(TOPIC_STYLES) - 1  # the last style is for all other topics
FEWEST = 8  # questions below which a group of steps gets no Vendi score
MAX_CHARACTERS = 1000  # of a question that are read for its diversity


def change_section(run: Run) -> dict[str, Any]:
    """Rows and charts of the accepted questions, in at most MAX_BINS groups of outer steps.

    A row has questions, length (mean characters) with its tenth and ninetieth percentile, shares (distinct, vendi_share,
    well_posed, correct; None where unknown), vendi, the score of `vendi_of` questions, and vendi_all, the mean over its
    steps of what the run recorded of all questions of a step.
    """
    steps = sorted({s for row in run.questions if (s := count(row.get("step"))) is not None})
    size = max(1, math.ceil(len(steps) / MAX_BINS))
    bins = [steps[i : i + size] for i in range(0, len(steps), size)]
    names = [str(b[0]) if len(b) == 1 else f"{b[0]}\u2013{b[-1]}" for b in bins]
    of_step = {step: i for i, b in enumerate(bins) for step in b}
    grouped: list[list[Row]] = [[] for _ in bins]
    for row in run.questions:
        if (place := of_step.get(count(row.get("step")) or 0)) is not None:
            grouped[place].append(row)
    events_of: dict[int, list[Row]] = {}
    for event in run.steps:
        events_of.setdefault(of_step.get(count(event.get("step")) or 0, -1), []).append(event)
    drawn, scores = _vendi(grouped)
    rows = []
    for i, group in enumerate(grouped):
        known = scores[i]
        rows.append(
            {
                "name": names[i],
                "middle": (bins[i][0] + bins[i][-1]) / 2,
                "questions": len(group),
                **_lengths(group),
                "distinct": mean(column(events_of.get(i, []), "distinct_share")),
                "vendi": known,
                "vendi_all": mean(column(events_of.get(i, []), "vendi")),
                "vendi_share": None if known is None else known / drawn,
                "well_posed": _share(group, "well_posed"),
                "correct": _share(group, "correct"),
            }
        )
    charts = {"quality": _quality(rows), "difficulty": _difficulty(run), "length": _length(rows)}
    return {"rows": rows, "vendi_of": drawn, **charts, "diversity": _diversity(rows, drawn), **_topics(names, grouped)}


def _share(rows: Sequence[Row], key: str) -> float | None:
    known = [row[key] for row in rows if isinstance(row.get(key), bool)]
    return mean([float(value) for value in known])


def _lengths(rows: Sequence[Row]) -> Row:
    """Mean, tenth and ninetieth percentile of the questions' characters."""
    lengths = [float(len(str(row.get("question", "")))) for row in rows]
    tenths = statistics.quantiles(lengths, n=10, method="inclusive") if len(lengths) > 1 else lengths
    return {"length": mean(lengths), "shortest": min(tenths, default=None), "longest": max(tenths, default=None)}


def _vendi(grouped: Sequence[Sequence[Row]]) -> tuple[int, list[float | None]]:
    """How many questions a score was taken of, and the Vendi score of every group (None of fewer than FEWEST).

    All scores are of the same number of questions, evenly spaced in their group, since others could not be compared.
    """
    if all(len(group) < FEWEST for group in grouped):
        return 0, [None] * len(grouped)
    from soar.report.questions import SAMPLE, hashed_ngrams, vendi_score  # numpy, which no other part of the page needs

    texts = [[str(row.get("question", ""))[:MAX_CHARACTERS] for row in group] for group in grouped]
    drawn = min([SAMPLE, *(len(group) for group in texts if len(group) >= FEWEST)])
    scores: list[float | None] = []
    for group in texts:
        sample = [group[i * len(group) // drawn] for i in range(drawn)] if len(group) >= FEWEST else []
        scores.append(vendi_score(hashed_ngrams(sample)) if sample else None)
    return drawn, scores


def _over_steps(key: str, title: str, description: str, y_label: str, percent: bool = True) -> Axes:
    return Axes(key, f"{title} over outer steps", description, "outer step", y_label, percent)


def _quality(rows: Sequence[Row]) -> Any:
    """Chart of the shares of well-posed and of correctly answered questions."""
    axes = _over_steps(
        "quality",
        "Quality of the questions",
        "Chunk of questions that are well-posed, and that have a correct answer; see the table.",
        "questions",
    )
    return line_chart(
        axes,
        [line("well-posed", rows, "well_posed", 2, "middle"), line("correct answer", rows, "correct", 3, "middle")],
    )


def _length(rows: Sequence[Row]) -> Any:
    """Chart of the questions' mean length with a band from the tenth to the ninetieth percentile."""
    known = [row for row in rows if row["length"] is not None]
    series = Series(
        "mean, 10 to 90 % of the questions",
        [row["middle"] for row in known],
        [row["length"] for row in known],
        low=[row["shortest"] for row in known],
        high=[row["longest"] for row in known],
        style=2,
    )
    axes = _over_steps(
        "length",
        "Length of the questions",
        "Mean number of characters of a question, with a band from the tenth to the ninetieth percentile; see the table.",
        "characters",
        percent=False,
    )
    return line_chart(axes, [series])


def _diversity(rows: Sequence[Row], drawn: int) -> Any:
    """Chart of the share of distinct questions, and of the Vendi score as a part of its largest value."""
    axes = _over_steps(
        "diversity",
        "Diversity of the questions",
        f"Chunk of distinct questions, and the Vendi score of {drawn} questions in per cent of {drawn}, which unrelated "
        "questions would have; see the table.",
        "questions",
    )
    return line_chart(
        axes, [line("distinct", rows, "distinct", 0, "middle"), line("Vendi score", rows, "vendi_share", 4, "middle")]
    )


def _difficulty(run: Run) -> Any:
    """Chart of how often students solved the questions they were trained on, in their first and their last step."""
    rows = []
    for event in run.steps:
        inner = {key: event[key] for key in ("student_first", "student_last") if isinstance(event.get(key), dict)}
        rows.append({"step": event.get("step"), **{key: part.get("pass_rate") for key, part in inner.items()}})
    axes = Axes(
        key="difficulty",
        title="Difficulty of the questions over outer steps",
        description="Chunk of attempts at the teacher's questions that gave the teacher's answer: mean over the students of "
        "a step in their first and in their last training step.",
        x_label="outer step",
        y_label="attempts right",
        percent=True,
    )
    lines = [
        line("first training step", rows, "student_first", 0),
        line("last training step", rows, "student_last", 2),
    ]
    return line_chart(axes, lines)


def _topics(names: list[str], grouped: list[list[Row]]) -> dict[str, Any]:
    counted = [Counter(str(row["topic"]) for row in group if row.get("topic")) for group in grouped]
    total = sum(counted, Counter())
    topics = [topic for topic, _ in total.most_common(MAX_TOPICS)]
    other = len(total) > MAX_TOPICS
    table: list[tuple[str, list[float]]] = []
    for topic in topics:
        table.append((topic, [c[topic] / (c.total() or 1) for c in counted]))
    if other:
        rest = [sum(n for t, n in c.items() if t not in topics) / (c.total() or 1) for c in counted]
        table.append(("all other", rest))
    axes = Axes(
        key="topics",
        title="Topics of the questions over outer steps",
        description="Chunk of each topic among the accepted questions; see the table.",
        x_label="outer step",
        y_label="questions",
        percent=True,
    )
    stacks = [
        Series(topic, range(len(names)), shares, style=style)
        for style, (topic, shares) in zip(TOPIC_STYLES, table, strict=False)
    ]
    return {"topic_names": names, "topic_rows": table, "topics": bar_chart(axes, names, stacks if total else [])}
