"""The parts of the report: from a run folder to the rows and charts that the page shows. Needs no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from soar.files import Row
from soar.report import text as wording
from soar.report.figures import STYLES, Axes, Series, bar_chart, line_chart
from soar.report.runs import Run, count, natural, number, numbers

MAX_STEPS_SHOWN = 500
MAX_NAMED_BINS = 40
MAX_BINS = 12  # bars of a chart
MAX_TOPIC_CHOICES = 60
MAX_HARD_EXAMPLES = 10
MAX_SIGNAL_POINTS = 40


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, sample standard deviation over sqrt(n); None of fewer than two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    variance = math.fsum((x - centre) ** 2 for x in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def evenly(rows: Sequence[Row], limit: int, keys: Sequence[str] = ("step", "dataset")) -> list[Row]:
    """At most `limit` rows, the same number from the front of every dataset, in file order.

    With more datasets than `limit`, evenly spaced datasets are kept, one row of each.
    """
    if len(rows) <= limit:
        return list(rows)
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(tuple(str(row.get(key)) for key in keys), []).append(i)
    kept = list(groups.values())
    if len(kept) > limit:
        kept = [kept[i * len(kept) // limit] for i in range(limit)]
    share = limit // len(kept)
    return [rows[i] for i in sorted(i for group in kept for i in group[:share])]


def arm_styles(run: Run) -> dict[str, int]:
    """Style of every arm in all charts of a page: its own where no arm before it has that, else the first that is free."""
    known = list(wording.ARM_NAMES)
    there = {*run.arms, *(str(event.get("arm")) for event in run.events.get("arm_step", []))}
    found: dict[str, int] = {}
    for name in [*filter(there.__contains__, known), *sorted(there.difference(known))]:
        own = known.index(name) % STYLES if name in known else STYLES // 2
        free = [style for style in range(STYLES) if style not in found.values()]
        found[name] = own if own in free or not free else free[0]
    return found


def line(label: str, rows: Sequence[Row], key: str, style: int, x: str = "step") -> Series:
    """A chart's line through the rows that have a number under `key` and one under `x`."""
    points = [(number(row.get(x)), number(row.get(key))) for row in rows]
    known = [(a, b) for a, b in points if a is not None and b is not None]
    return Series(label, [a for a, _ in known], [b for _, b in known], style=style)


def pass_axes(key: str, title: str, parts: str, ks: Sequence[int]) -> Axes:
    """Axes of a chart of pass@k over k. parts: what its lines are, for the description."""
    return Axes(
        key=key,
        title=title,
        description=f"Chunk of held-out problems solved by one of k attempts, {parts}; see the table.",
        x_label="attempts per problem (k)",
        y_label="problems solved",
        percent=True,
        log2=bool(ks) and ks[0] > 0,
        x_ticks=ks,
    )


def arms_section(run: Run) -> dict[str, Any]:
    """Table rows and chart of pass@k for every arm."""
    known = list(wording.ARM_NAMES)
    names = [n for n in known if n in run.arms] + [n for n in run.arms if n not in known]
    arms = [run.arms[name] for name in names]
    ks = sorted({k for arm in arms for k in arm.pass_at})
    rows, series, styles = [], [], arm_styles(run)
    for arm in arms:
        x = list(arm.pass_at)
        banded = all(k in arm.interval for k in x)
        cells = [wording.with_interval(arm, k) if k in arm.pass_at else wording.DASH for k in ks]
        rows.append({"arm": arm, "cells": [cell.partition(" [") for cell in cells]})
        series.append(
            Series(
                label=wording.arm_name(arm.name),
                x=x,
                y=[arm.pass_at[k] for k in x],
                low=[arm.interval[k][0] for k in x] if banded else (),
                high=[arm.interval[k][1] for k in x] if banded else (),
                style=styles[arm.name],
                notes=[f"{wording.arm_name(arm.name)}, pass@{k}: {wording.with_interval(arm, k)}" for k in x],
            )
        )
    axes = pass_axes("pass-at-k", "pass@k on the held-out problems", "per arm, with 95 % bands", ks)
    return {"rows": rows, "ks": ks, "chart": line_chart(axes, series)}


def step_rows(run: Run) -> list[Row]:
    """One row per outer step with the figures of its table and charts. Shares and rewards as in metrics.jsonl."""
    rows = []
    for event in run.steps:
        rewards = numbers(event.get("reward_G"))
        stated = number(event.get("reward_mean"))
        row: Row = {key: number(event.get(key)) for key in ("window_mean", "baseline_pass_rate", "best_pass_rate")}
        row["kl"] = number(event.get("teacher_kl"))
        row |= {
            key: event.get(key) for key in ("accepted", "sampled", "failed_students", "student_rollouts", "seconds")
        }
        row |= {
            "step": count(event.get("step")),
            "mean": stated if stated is not None else mean(rewards),
            "error": standard_error(rewards),
            "best": max(rewards, default=None),
            "worst": min(rewards, default=None),
            "repeat_error": mean(numbers(event.get("reward_se_G"))),
            "distinct_share": number(event.get("distinct_share")),
            "promoted": event.get("promoted") is True,
            "reason": event.get("reason") or "",
        }
        rows.append(row)
    return rows


def loop_section(run: Run) -> dict[str, Any]:
    """The outer loop: teacher reward, promotions and pass rates over steps."""
    rows = step_rows(run)
    drawn = [r for r in rows if r["mean"] is not None]
    steps = [float(r["step"]) for r in drawn]
    promotion = run.config.get("promotion")
    tau = number(promotion.get("tau")) if isinstance(promotion, dict) else None
    marks = [(float(r["step"]), f"promotion after step {r['step']}") for r in rows if r["promoted"]]
    reward = Series(
        label="mean of the datasets, \u00b1 standard error",
        x=steps,
        y=[r["mean"] for r in drawn],
        low=[r["mean"] if r["worst"] is None else r["worst"] for r in drawn],
        high=[r["mean"] if r["best"] is None else r["best"] for r in drawn],
        error=[r["error"] or 0.0 for r in drawn],
        style=2,
        notes=[
            f"step {r['step']}: mean {wording.decimal(r['mean'])} \u00b1 {wording.decimal(r['error'])}, "
            f"best {wording.decimal(r['best'])}, worst {wording.decimal(r['worst'])}"
            for r in drawn
        ],
    )
    axes = Axes(
        key="reward",
        title="Teacher reward over outer steps",
        description="Improvement of the students on hard training problems: mean over the datasets of a step with its "
        "standard error, a band from the worst to the best dataset, promotions as vertical lines; see the table.",
        y_label="reward",
        lines=[(tau, f"\u03c4 = {tau:g}")] if tau is not None else (),
        x_label="outer step",
        marks=marks,
        mark_label="promotion",
    )
    rates = Axes(
        key="rates",
        title="Pass rates on the reward questions",
        description="Chunk of the reward questions solved by the baseline student and by the best student of a step.",
        y_label="solved",
        percent=True,
        x_label="outer step",
        marks=marks,
        mark_label="promotion",
    )
    window = line("mean of the window", rows, "window_mean", 1)
    lines = [line("baseline student", rows, "baseline_pass_rate", 0), line("best student", rows, "best_pass_rate", 2)]
    return {
        "rows": rows[-MAX_STEPS_SHOWN:],
        "left_out": max(0, len(rows) - MAX_STEPS_SHOWN),
        "reward": line_chart(axes, [reward, window]),
        "rates": line_chart(rates, lines),
        "rejected": sum((_counts(e.get("rejected")) for e in run.steps), Counter()).most_common(),
        "accepted": sum(count(r["accepted"]) or 0 for r in rows),
        "sampled": sum(count(r["sampled"]) or 0 for r in rows),
    }


def _counts(value: object) -> Counter[str]:
    items = value.items() if isinstance(value, dict) else ()
    return Counter({str(key): n for key, v in items if (n := count(v) or 0) > 0})


def screening_section(run: Run) -> dict[str, Any]:
    """Histogram of successes per candidate problem, and the evidence of the kept hard problems."""
    screens = run.events.get("screen", [])
    event = screens[-1] if screens else {}
    bins = _histogram(event.get("histogram"))
    attempts = count(event.get("attempts"))
    of = f" of {attempts}" if attempts else ""
    axes = Axes(
        key="screening",
        title="Screening: how often the base model solved the candidates",
        description=f"Number of candidate problems by correct attempts{of}; see the table.",
        x_label=f"correct attempts{of}",
        y_label="problems",
    )
    names = [b["name"] for b in bins]
    notes = [f"{b['name']} correct: {wording.plural(b['problems'], 'problem')}" for b in bins]
    bars = Series("problems", range(len(bins)), [float(b["problems"]) for b in bins], style=2, notes=notes)
    rows = run.hard_train + run.hard_test
    return {
        "event": event,
        "bins": bins,
        "chart": bar_chart(axes, names, [bars]),
        "taken": len(rows) if rows and (count(event.get("hard")) or 0) > len(rows) else None,
        "train": len(run.hard_train),
        "test": len(run.hard_test),
        "truncated": sum(count(r.get("truncated")) or 0 for r in rows),
        "evidence": sum(count(r.get("attempts")) or 0 for r in rows),
        "examples": evenly(run.hard_train, MAX_HARD_EXAMPLES, ("id",)),
    }


def _histogram(histogram: object) -> list[dict[str, Any]]:
    """Bars as recorded when they are named ranges; counts of successes are put into at most MAX_BINS equal ranges.

    No success at all keeps a bar of its own.
    """
    named = {str(k): count(n) or 0 for k, n in histogram.items()} if isinstance(histogram, dict) else {}
    if not named or None in map(natural, named):
        return [{"name": name, "problems": max(0, n)} for name, n in list(named.items())[:MAX_NAMED_BINS]]
    by_successes = Counter({natural(name) or 0: n for name, n in named.items() if n > 0})
    highest = max(by_successes, default=0)
    width = max(1, math.ceil(highest / (MAX_BINS - 1)))
    bins = [{"name": "0", "problems": by_successes[0]}]
    for start in range(1, highest + 1, width):
        end = min(start + width - 1, highest)
        name = str(start) if start == end else f"{start}\u2013{end}"
        bins.append({"name": name, "problems": sum(n for s, n in by_successes.items() if start <= s <= end)})
    return bins


def signal_section(run: Run) -> dict[str, Any]:
    """Chunk of groups with a learning signal (some right, some wrong) over the steps of every trained arm."""
    rows, series = [], []
    by_arm: dict[str, list[Row]] = {}
    for event in run.events.get("arm_step", []):
        by_arm.setdefault(str(event.get("arm")), []).append(event)
    longest = max(map(len, by_arm.values()), default=0)
    size = math.ceil(longest / MAX_SIGNAL_POINTS)  # steps a point, the same for all arms
    styles = arm_styles(run)
    for name, events in by_arm.items():
        blocks = [events[j : j + size] for j in range(0, len(events), size)]
        x, y = [], []
        for block in blocks:
            step, share = mean(column(block, "step")), mean(column(block, "frac_mixed"))
            if step is not None and share is not None:
                x.append(step)
                y.append(share)
        series.append(Series(wording.arm_name(name), x, y, style=styles[name]))
        shares = {key: mean(column(events, f"frac_{key}")) for key in ("all_wrong", "mixed", "all_right")}
        rows.append({"name": wording.arm_name(name), "steps": len(events), **shares})
    axes = Axes(
        key="signal",
        title="Groups with a learning signal",
        description="Chunk of groups of attempts in which some are right and some wrong, per training step of an arm.",
        x_label="training step",
        y_label="mixed groups",
        percent=True,
    )
    return {"rows": rows, "chart": line_chart(axes, series)}


def column(rows: Sequence[Row], key: str) -> list[float]:
    """The numbers under a key."""
    return numbers([row.get(key) for row in rows])


def questions_section(rows: list[Row], limit: int) -> dict[str, Any]:
    """The embedded rows of a question file, and what the page can say and filter about them."""
    shown = evenly(rows, limit)
    fields = ("topic", "well_posed", "correct")
    topics = Counter(str(row["topic"]) for row in shown if row.get("topic"))
    return {
        "rows": shown,
        "total": len(rows),
        "steps": sorted({s for row in shown if (s := count(row.get("step"))) is not None}),
        "topics": sorted(topic for topic, _ in topics.most_common(MAX_TOPIC_CHOICES)),
        "fields": [key for key in fields if any(row.get(key) is not None for row in shown)],
    }


def phases(run: Run) -> tuple[list[tuple[str, float]], float | None]:
    """Wall seconds per phase and in all; while the run is unfinished, what the outer steps have taken so far."""
    wall = run.summary.get("wall_seconds")
    if isinstance(wall, dict):
        rows = [(str(name), seconds) for name, v in wall.items() if (seconds := number(v)) is not None]
        total = dict(rows).get("total")
        rows = [(name, seconds) for name, seconds in rows if name != "total"]
        return rows, total if total is not None else math.fsum(seconds for _, seconds in rows)
    taken = column(run.steps, "seconds")
    return ([("outer loop so far", math.fsum(taken))], math.fsum(taken)) if taken else ([], None)
