"""One self-contained HTML page about a run folder, finished or not. Needs no torch and no network.

The page holds its own style and a small script, and a content policy that allows nothing else, so text that a model
wrote can do nothing even if it were not escaped; it is escaped all the same (jinja2 autoescape), and characters that
hide or reorder text are made visible. Every figure can be recomputed from the files of the run folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soar.files import Row, visible, write_atomic
from soar.report import text as wording
from soar.report.charts import Chart, Series
from soar.report.questions import label_share
from soar.report.runs import Run, count, mean, natural, number, numbers, read_run, standard_error
from soar.types import VERSION

TEMPLATES = Path(__file__).parent.parent / "templates"
MAX_QUESTIONS = 600
MAX_PQ = 300
MAX_ALARMS = 200
MAX_TEXT = 1000  # characters of one question or answer
MAX_STEPS_SHOWN = 500
MAX_NAMED_BINS = 40
MAX_BINS = 12  # bars of a chart
MAX_TOPICS = 7
MAX_TOPIC_CHOICES = 60
MAX_HARD_EXAMPLES = 10
MAX_SIGNAL_POINTS = 40


def column(rows: Sequence[Row], key: str) -> list[float]:
    """The numbers under a key."""
    return numbers([row.get(key) for row in rows])


def line(label: str, rows: Sequence[Row], key: str, style: int, x: str = "step", band: Sequence[str] = ()) -> Series:
    """A chart's line through the rows that have a number under `key` and one under `x`; band: keys of low and high."""
    whole = [row for row in rows if None not in [number(row.get(name)) for name in (x, key, *band)]]
    low, high = (column(whole, name) for name in band) if band else ([], [])
    return Series(label, column(whole, x), column(whole, key), low, high, style=style)


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
    return [rows[i] for i in sorted(i for group in kept for i in group[: limit // len(kept)])]


def arm_styles(run: Run) -> dict[str, int]:
    """Style of every arm in all charts of a page, in the order of the paper, arms that it does not have last."""
    there = {*run.arms, *(str(event.get("arm")) for event in run.events.get("arm_step", []))}
    order = [*filter(there.__contains__, wording.ARM_NAMES), *sorted(there.difference(wording.ARM_NAMES))]
    return {name: style for style, name in enumerate(order)}


def arms_section(run: Run) -> dict[str, Any]:
    """Table rows and chart of pass@k for every arm."""
    arms, rows, series = run.arms, [], []
    ks = sorted({k for arm in arms.values() for k in arm.pass_at})
    for name, style in arm_styles(run).items():
        if name not in arms:
            continue
        arm = arms[name]
        cells = [wording.with_interval(arm, k) if k in arm.pass_at else wording.DASH for k in ks]
        rows.append({"arm": arm, "cells": [cell.partition(" [") for cell in cells]})
        bounds = list(zip(*(arm.interval.get(k, (None, None)) for k in arm.pass_at), strict=True))
        low, high = bounds if None not in bounds[0] else ((), ())
        shares = list(arm.pass_at.values())
        series.append(Series(wording.arm_name(name), list(arm.pass_at), shares, low, high, style=style))
    chart = Chart(
        "pass-at-k",
        "pass@k on the held-out problems",
        "Share of held-out problems solved by one of k attempts, per arm, with 95 % bands; see the table.",
        "attempts per problem (k)",
        "problems solved",
        series,
        percent=True,
        ticks=ks,
    )
    return {"rows": rows, "ks": ks, "chart": chart}


def step_rows(run: Run) -> list[Row]:
    """One row per outer step with the figures of its table and charts. Shares and rewards as in metrics.jsonl."""
    rows = []
    for event in run.steps:
        rewards = numbers(event.get("reward_G"))
        stated = number(event.get("reward_mean"))
        centre = stated if stated is not None else mean(rewards)
        row: Row = {key: number(event.get(key)) for key in ("window_mean", "baseline_pass_rate", "best_pass_rate")}
        for key in ("accepted", "sampled", "failed_students", "student_rollouts", "seconds"):
            row[key] = event.get(key)
        row |= {
            "step": count(event.get("step")),
            "mean": centre,
            "error": standard_error(rewards),
            "best": max(rewards, default=centre),
            "worst": min(rewards, default=centre),
            "repeat_error": mean(numbers(event.get("reward_se_G"))),
            "kl": number(event.get("teacher_kl")),
            "promoted": event.get("promoted") is True,
            "reason": event.get("reason") or "",
        }
        rows.append(row)
    return rows


def loop_section(run: Run) -> dict[str, Any]:
    """The outer loop: teacher reward, promotions and pass rates over steps."""
    rows = step_rows(run)
    drawn = [row for row in rows if row["mean"] is not None]
    promotion = run.config.get("promotion")
    tau = number(promotion.get("tau")) if isinstance(promotion, dict) else None
    x, centre, worst, best = (column(drawn, key) for key in ("step", "mean", "worst", "best"))
    error = [row["error"] or 0.0 for row in drawn]
    reward = Series("mean of the datasets, \u00b1 standard error", x, centre, worst, best, error, style=2)
    marks = [float(row["step"]) for row in rows if row["promoted"]]
    rejected: Counter[str] = Counter()
    for event in run.steps:
        reasons = event.get("rejected")
        for reason, n in reasons.items() if isinstance(reasons, dict) else ():
            rejected[str(reason)] += max(0, count(n) or 0)
    return {
        "rows": rows[-MAX_STEPS_SHOWN:],
        "left_out": max(0, len(rows) - MAX_STEPS_SHOWN),
        "reward": Chart(
            "reward",
            "Teacher reward over outer steps",
            "Improvement of the students on hard training problems: mean over the datasets of a step with its standard "
            "error, a band from the worst to the best dataset, promotions as vertical lines; see the table.",
            "outer step",
            "reward",
            [reward, line("mean of the window", rows, "window_mean", 1)] if drawn else [],
            rules=[] if tau is None else [(tau, f"\u03c4 = {tau:g}")],
            marks=marks,
            mark_label="promotion",
        ),
        "rates": Chart(
            "rates",
            "Pass rates on the reward questions",
            "Share of the reward questions solved by the baseline student and by the best student of a step.",
            "outer step",
            "solved",
            [line("baseline student", rows, "baseline_pass_rate", 0), line("best student", rows, "best_pass_rate", 2)],
            percent=True,
            marks=marks,
            mark_label="promotion",
        ),
        "rejected": [(reason, n) for reason, n in rejected.most_common() if n],
        "accepted": sum(count(row["accepted"]) or 0 for row in rows),
        "sampled": sum(count(row["sampled"]) or 0 for row in rows),
    }


def screening_section(run: Run) -> dict[str, Any]:
    """Histogram of successes per candidate problem, and the evidence of the kept hard problems."""
    event = (run.events.get("screen") or [{}])[-1]
    bins = _histogram(event.get("histogram"))
    attempts = count(event.get("attempts"))
    x_label = f"correct attempts of {attempts}" if attempts else "correct attempts"
    rows = run.hard_train + run.hard_test
    return {
        "event": event,
        "bins": bins,
        "chart": Chart(
            "screening",
            "Screening: how often the base model solved the candidates",
            f"Number of candidate problems by {x_label}; see the table.",
            x_label,
            "problems",
            [Series("", range(len(bins)), [float(n) for _, n in bins], style=2)],
            names=[name for name, _ in bins],
        ),
        "taken": len(rows) if rows and (count(event.get("hard")) or 0) > len(rows) else None,
        "train": len(run.hard_train),
        "test": len(run.hard_test),
        "truncated": sum(count(r.get("truncated")) or 0 for r in rows),
        "evidence": sum(count(r.get("attempts")) or 0 for r in rows),
        "examples": evenly(run.hard_train, MAX_HARD_EXAMPLES, ("id",)),
    }


def _histogram(histogram: object) -> list[tuple[str, int]]:
    """Bars as recorded when they are named ranges; counts of successes are put into at most MAX_BINS equal ranges.

    No success at all keeps a bar of its own.
    """
    named = {str(k): max(0, count(n) or 0) for k, n in histogram.items()} if isinstance(histogram, dict) else {}
    if not named or None in map(natural, named):
        return list(named.items())[:MAX_NAMED_BINS]
    problems_of = {natural(name) or 0: n for name, n in named.items() if n}
    highest = max(problems_of, default=0)
    width = max(1, math.ceil(highest / (MAX_BINS - 1)))
    bins = [("0", problems_of.get(0, 0))]
    for start in range(1, highest + 1, width):
        end = min(start + width - 1, highest)
        name = str(start) if start == end else f"{start}\u2013{end}"
        bins.append((name, sum(n for successes, n in problems_of.items() if start <= successes <= end)))
    return bins


def signal_section(run: Run) -> dict[str, Any]:
    """Share of groups with a learning signal (some right, some wrong) over the steps of every trained arm."""
    rows, series = [], []
    by_arm: dict[str, list[Row]] = {}
    for event in run.events.get("arm_step", []):
        by_arm.setdefault(str(event.get("arm")), []).append(event)
    size = math.ceil(max(map(len, by_arm.values()), default=0) / MAX_SIGNAL_POINTS)  # steps a point, for all arms
    styles = arm_styles(run)
    for arm, events in by_arm.items():
        blocks = [events[i : i + size] for i in range(0, len(events), size)]
        means = [{key: mean(column(block, key)) for key in ("step", "frac_mixed")} for block in blocks]
        series.append(line(wording.arm_name(arm), means, "frac_mixed", styles[arm]))
        shares = {key: mean(column(events, f"frac_{key}")) for key in ("all_wrong", "mixed", "all_right")}
        rows.append({"name": wording.arm_name(arm), "steps": len(events), **shares})
    chart = Chart(
        "signal",
        "Groups with a learning signal",
        "Share of groups of attempts in which some are right and some wrong, per training step of an arm.",
        "training step",
        "mixed groups",
        series,
        percent=True,
    )
    return {"rows": rows, "chart": chart}


def change_section(run: Run) -> dict[str, Any]:
    """How the accepted questions changed: rows and charts over at most MAX_BINS groups of outer steps.

    A row has questions, length (mean characters) with its tenth and ninetieth percentile, vendi and distinct (means over
    its steps of what the run recorded), and the shares well_posed and correct; None where unknown.
    """
    steps = sorted({s for row in run.questions if (s := count(row.get("step"))) is not None})
    size = max(1, math.ceil(len(steps) / MAX_BINS))
    rows: list[Row] = []
    groups: list[list[Row]] = []
    for i in range(0, len(steps), size):
        block = steps[i : i + size]
        group = [row for row in run.questions if count(row.get("step")) in block]
        events = [event for event in run.steps if count(event.get("step")) in block]
        lengths = [float(len(str(row.get("question", "")))) for row in group]
        tenths = statistics.quantiles(lengths, n=10, method="inclusive") if len(lengths) > 1 else lengths
        rows.append(
            {
                "name": str(block[0]) if len(block) == 1 else f"{block[0]}\u2013{block[-1]}",
                "middle": (block[0] + block[-1]) / 2,
                "questions": len(group),
                "length": mean(lengths),
                "shortest": min(tenths),
                "longest": max(tenths),
                "distinct": mean(column(events, "distinct_share")),
                "vendi": mean(column(events, "vendi")),
                "well_posed": label_share(group, "well_posed"),
                "correct": label_share(group, "correct"),
            }
        )
        groups.append(group)

    def over_steps(key: str, what: str, y_label: str, series: Sequence[Series], percent: bool = True) -> Chart:
        description = f"{what} over outer steps; see the table."
        return Chart(key, f"{what} over outer steps", description, "outer step", y_label, series, percent)

    posed, right = line("well-posed", rows, "well_posed", 2, "middle"), line("correct", rows, "correct", 3, "middle")
    length = line("mean, 10 to 90 % of the questions", rows, "length", 2, "middle", ("shortest", "longest"))
    distinct, vendi = line("", rows, "distinct", 0, "middle"), line("", rows, "vendi", 4, "middle")
    return {
        "rows": rows,
        "quality": over_steps("quality", "Well-posed and correctly answered questions", "questions", [posed, right]),
        "length": over_steps("length", "Length of the questions", "characters", [length], False),
        "distinct": over_steps("distinct", "Distinct questions", "questions", [distinct]),
        "vendi": over_steps("vendi", "Vendi score of the questions of a step", "Vendi score", [vendi], False),
        "difficulty": over_steps(
            "difficulty", "Attempts at the teacher's questions that gave its answer", "attempts right", _difficulty(run)
        ),
        **_topics([row["name"] for row in rows], groups),
    }


def _difficulty(run: Run) -> list[Series]:
    """How often students solved the questions they were trained on, in their first and their last step."""
    rows = []
    for event in run.steps:
        inner = {key: event[key] for key in ("student_first", "student_last") if isinstance(event.get(key), dict)}
        rows.append({"step": event.get("step"), **{key: part.get("pass_rate") for key, part in inner.items()}})
    first = line("first training step", rows, "student_first", 0)
    return [first, line("last training step", rows, "student_last", 2)]


def _topics(names: list[str], groups: list[list[Row]]) -> dict[str, Any]:
    counted = [Counter(str(row["topic"]) for row in group if row.get("topic")) for group in groups]
    total = sum(counted, Counter())
    topics = [topic for topic, _ in total.most_common(MAX_TOPICS)]
    shares = [{topic: n / counts.total() for topic, n in counts.items()} for counts in counted]
    table = [(topic, [share.get(topic, 0.0) for share in shares]) for topic in topics]
    if len(total) > MAX_TOPICS:
        rest = [sum(share for topic, share in part.items() if topic not in topics) for part in shares]
        table.append(("all other", rest))
    chart = Chart(
        "topics",
        "Topics of the questions over outer steps",
        "Share of each topic among the accepted questions; see the table.",
        "outer step",
        "questions",
        [Series(topic, range(len(names)), part, style=i) for i, (topic, part) in enumerate(table)],
        percent=True,
        names=names,
    )
    return {"topic_rows": table, "topics": chart}


def questions_section(rows: list[Row], limit: int) -> dict[str, Any]:
    """The embedded rows of a question file, and what the page can say and filter about them."""
    shown = evenly(rows, limit)
    topics = Counter(str(row["topic"]) for row in shown if row.get("topic"))
    return {
        "rows": shown,
        "total": len(rows),
        "steps": sorted({s for row in shown if (s := count(row.get("step"))) is not None}),
        "topics": sorted(topic for topic, _ in topics.most_common(MAX_TOPIC_CHOICES)),
        "fields": [k for k in ("topic", "well_posed", "correct") if any(row.get(k) is not None for row in shown)],
    }


def phases(run: Run) -> tuple[list[tuple[str, float]], float | None]:
    """Wall seconds per phase and in all; while the run is unfinished, what the outer steps have taken so far."""
    wall = run.summary.get("wall_seconds")
    if isinstance(wall, dict):
        seconds_of = {str(name): seconds for name, v in wall.items() if (seconds := number(v)) is not None}
        total = seconds_of.pop("total", math.fsum(seconds_of.values()))
        return list(seconds_of.items()), total
    taken = column(run.steps, "seconds")
    return ([("outer loop so far", math.fsum(taken))], math.fsum(taken)) if taken else ([], None)


def content(run: Run) -> dict[str, Any]:
    """Everything that the page shows, by section."""
    times, wall_seconds = phases(run)
    command = run.manifest.get("command")
    alarms = run.events.get("alarm", [])
    return {
        "run": run,
        "asked": wording.asked(run),
        "headline": wording.headline(run),
        "paused": wording.paused(run),
        "remarks": wording.remarks(run),
        "arms": arms_section(run),
        "outer": loop_section(run),
        "screening": screening_section(run),
        "signal": signal_section(run),
        "change": change_section(run),
        "questions": questions_section(run.questions, MAX_QUESTIONS),
        "pq": questions_section(run.pq, MAX_PQ),
        "alarms": alarms[:MAX_ALARMS],
        "alarm_total": len(alarms),
        "phases": times,
        "wall_seconds": wall_seconds,
        "command": shlex.join(map(str, command)) if isinstance(command, list) else command,
        "rollouts": max(column(run.steps, "student_rollouts"), default=None),
    }


def shorten(text: object) -> str:
    """At most MAX_TEXT characters of a text, and how many were left out."""
    shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    left_out = len(shown) - MAX_TEXT
    return shown if left_out <= 0 else f"{shown[:MAX_TEXT]} \u2026 ({left_out:,} more characters)"


def attribute(value: object) -> str:
    """A number for a `data-` attribute that the script compares; empty for anything else."""
    size = number(value)
    return "" if size is None else f"{size:.12g}"


def verdict(value: object) -> str:
    """`yes`, `no`, or a dash for anything that is no truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else wording.DASH


def render(template: str, values: dict[str, Any]) -> str:
    """A template of `templates` with these values, the style and the script in it, as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    shown = (wording.percent, wording.whole, wording.decimal, wording.duration, wording.arm_name, wording.moment)
    environment.filters |= {f.__name__: f for f in (*shown, shorten, attribute, verdict)}
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    environment.globals |= {"arm_meanings": wording.ARM_MEANINGS, "version": VERSION}
    for name, file in (("style", "report.css"), ("script", "report.js")):
        text = (TEMPLATES / file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        environment.globals |= {name: Markup(text), f"{name}_hash": f"sha256-{digest}"}
    return environment.get_template(template).render(values)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page to `out` (None: `report.html` in the run folder), replacing an older one in one step; returns its path.

    Raises ReportError when `run_dir` is no run folder, OSError when the page cannot be written.
    """
    html = render("report.html", content(read_run(run_dir)))
    target = out or run_dir / "report.html"
    write_atomic(target, html.encode())
    return target


def write_pictures(run_dir: Path, out: Path, png: bool = False) -> list[Path]:
    """Write every chart of a run's report into the folder `out`; returns the files. Raises ReportError for no run folder."""
    files: dict[Path, bytes] = {}
    for section in content(read_run(run_dir)).values():
        for chart in section.values() if isinstance(section, dict) else ():
            if isinstance(chart, Chart) and chart:
                files[out / f"{chart.key}.svg"] = chart.drawn("svg")
                if png:
                    files[out / f"{chart.key}.png"] = chart.drawn("png", dpi=216)
    for path, data in files.items():
        write_atomic(path, data)
    return list(files)


def report_at_the_end(run_dir: Path, say: Callable[[str], None]) -> None:
    """`write_report` of a run that ends: a page that cannot be made is told to `say`, and the run ends as it would.

    Hours of work must not end in a traceback because of a figure. Raises OSError as `write_report` does.
    """
    try:
        write_report(run_dir)
    except OSError:
        raise
    except Exception as error:  # whatever it is: the run's results are written and do not depend on the page
        say(
            f"report.html could not be made ({type(error).__name__}: {error}); everything else of the run is saved. "
            f"Another version may make it: soar report {shlex.quote(str(run_dir))}"
        )
