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
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soar.files import Row, read_jsonl, visible, write_atomic
from soar.report import text as wording
from soar.report.charts import Chart, Series
from soar.report.questions import label_share
from soar.report.runs import Run, count, mean, number, numbers, read_run, standard_error
from soar.types import VERSION

TEMPLATES = Path(__file__).parent.parent / "templates"
MAX_QUESTIONS = 600  # of each of the two files
MAX_ALARMS = 200
MAX_TEXT = 1000  # characters of one question or answer
MAX_STEPS_SHOWN = 500
MAX_GROUPS = 12  # of outer steps whose questions are compared
MAX_BINS = 12  # bars of a chart
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
    return Series(label, column(whole, x), column(whole, key), low, high, style)


def arm_styles(run: Run) -> dict[str, int]:
    """Style of every arm in all charts of a page, in the order of the paper, arms that it does not have last."""
    there = {*run.arms, *(str(event.get("arm")) for event in run.events.get("arm_step", []))}
    order = [*filter(there.__contains__, wording.ARMS), *sorted(there.difference(wording.ARMS))]
    return {name: style for style, name in enumerate(order)}


def arms_section(run: Run) -> dict[str, Any]:
    """Table rows, the chart of pass@k for every arm, and pass@k against the tokens that an arm took."""
    arms, styles = run.arms, arm_styles(run)
    ks = sorted({k for arm in arms.values() for k in arm.pass_at})
    rows, series = [], []
    for name, arm in ((name, arms[name]) for name in styles if name in arms):
        cells = [wording.with_interval(arm, k) if k in arm.pass_at else wording.DASH for k in ks]
        rows.append({"arm": arm, "cells": [cell.partition(" [") for cell in cells]})
        bands = [arm.interval.get(k) for k in arm.pass_at]
        low, high = ([pair[side] for pair in bands if pair] if all(bands) else [] for side in (0, 1))
        shares = list(arm.pass_at.values())
        series.append(Series(wording.arm_name(name), list(arm.pass_at), shares, low, high, styles[name]))
    text = "Share of held-out problems solved by one of k attempts, per arm, with 95 % bands; see the table."
    title, y_label = "pass@k on the held-out problems", "problems solved"
    chart = Chart("pass-at-k", title, text, "attempts per problem (k)", y_label, series, True, ticks=ks)
    ends = dict.fromkeys([*ks[:1], *ks[-1:]])
    return {"rows": rows, "ks": ks, "chart": chart, "tokens": [token_chart(run, k) for k in ends]}


def token_chart(run: Run, k: int) -> Chart:
    """pass@k against the tokens generated for an arm, its search included: `curve` events, then the evaluation."""
    events = [event for kind in ("curve", "evaluation") for event in run.events.get(kind, [])]
    points = [
        {"arm": event.get("arm"), "tokens": tokens / 1e6, "share": event["pass_at"].get(str(k))}
        for event in events
        if isinstance(event.get("pass_at"), dict) and (tokens := number(event.get("total_tokens"))) is not None
    ]
    series = [
        line(wording.arm_name(name), [point for point in points if point["arm"] == name], "share", style, "tokens")
        for name, style in arm_styles(run).items()
    ]
    text = "The last point of an arm is its result; tokens include the search for its questions."
    title = f"pass@{k} against generated tokens"
    return Chart(f"tokens-{k}", title, text, "million tokens", "problems solved", [s for s in series if len(s.x)], True)


def step_rows(run: Run) -> list[Row]:
    """One row per outer step with the figures of its table and charts. Shares and rewards as in metrics.jsonl."""
    rows = []
    for event in run.steps:
        rewards = numbers(event.get("reward_G"))
        centre, error = number(event.get("reward_mean")), standard_error(rewards)
        centre = mean(rewards) if centre is None else centre
        ends = (None, None) if centre is None else (centre - (error or 0), centre + (error or 0))
        names = (
            "window_mean",
            "baseline_pass_rate",
            "best_pass_rate",
            "accepted",
            "sampled",
            "failed_students",
            "seconds",
        )
        row: Row = {key: number(event.get(key)) for key in names}
        row |= {"step": count(event.get("step")), "mean": centre, "error": error, "low": ends[0], "high": ends[1]}
        row |= {"best": max(rewards, default=centre), "worst": min(rewards, default=centre)}
        row |= {"repeat_error": mean(numbers(event.get("reward_se_G"))), "kl": number(event.get("teacher_kl"))}
        rows.append({**row, "promoted": event.get("promoted") is True, "reason": event.get("reason") or ""})
    return rows


def loop_section(run: Run) -> dict[str, Any]:
    """The outer loop: teacher reward, promotions and pass rates over steps."""
    rows, tau = step_rows(run), run.setting("promotion", "tau")
    marks: dict[str, Any] = {
        "marks": [float(row["step"]) for row in rows if row["promoted"]],
        "mark_label": "promotion",
    }
    rejected: Counter[str] = Counter()
    for event in run.steps:
        reasons = event.get("rejected")
        for reason, n in reasons.items() if isinstance(reasons, dict) else ():
            rejected[str(reason)] += max(0, count(n) or 0)
    reward = line("mean of the datasets, \u00b1 standard error", rows, "mean", 2, band=("low", "high"))
    window = line("mean of the window", rows, "window_mean", 1)
    text = (
        "Improvement of students on hard training problems: mean over the datasets of a step with its standard error."
    )
    rules = [] if tau is None else [(tau, f"\u03c4 = {tau:g}")]
    rates = [line("baseline student", rows, "baseline_pass_rate", 0), line("best student", rows, "best_pass_rate", 2)]
    text_rates = "Share of the reward questions solved by the baseline student and by the best student of a step."
    title, x = "Teacher reward over outer steps", "outer step"
    return {
        "rows": rows[-MAX_STEPS_SHOWN:],
        "left_out": max(0, len(rows) - MAX_STEPS_SHOWN),
        "reward": Chart("reward", title, text, x, "reward", [reward, window], rules=rules, **marks),
        "rates": Chart("rates", "Pass rates on the reward questions", text_rates, x, "solved", rates, True, **marks),
        "rejected": [(reason, n) for reason, n in rejected.most_common() if n],
        "accepted": int(sum(column(rows, "accepted"))),
        "sampled": int(sum(column(rows, "sampled"))),
    }


def screening_section(run: Run) -> dict[str, Any]:
    """Histogram of successes per candidate problem, and the evidence of the kept hard problems."""
    event = (run.events.get("screen") or [{}])[-1]
    histogram, attempts, rows = event.get("histogram"), count(event.get("attempts")), run.hard_train + run.hard_test
    bins = [(str(k), max(0, count(n) or 0)) for k, n in histogram.items()] if isinstance(histogram, dict) else []
    bins = bins[:MAX_BINS]
    x_label = f"correct attempts of {attempts}" if attempts else "correct attempts"
    title, text = (
        "Screening: how often the base model solved the candidates",
        f"Candidates by {x_label}; see the table.",
    )
    series, names = [Series("", range(len(bins)), [float(n) for _, n in bins], style=2)], [name for name, _ in bins]
    return {
        "event": event,
        "bins": bins,
        "chart": Chart("screening", title, text, x_label, "problems", series, names=names),
        "taken": len(rows) if rows and (count(event.get("hard")) or 0) > len(rows) else None,
        "train": len(run.hard_train),
        "test": len(run.hard_test),
        "truncated": sum(count(r.get("truncated")) or 0 for r in rows),
        "evidence": sum(count(r.get("attempts")) or 0 for r in rows),
        "examples": run.hard_train[:MAX_HARD_EXAMPLES],
    }


def signal_section(run: Run) -> dict[str, Any]:
    """Share of groups with a learning signal (some right, some wrong) over the steps of every trained arm."""
    rows, series, styles = [], [], arm_styles(run)
    by_arm: dict[str, list[Row]] = {}
    for event in run.events.get("arm_step", []):
        by_arm.setdefault(str(event.get("arm")), []).append(event)
    size = math.ceil(max(map(len, by_arm.values()), default=0) / MAX_SIGNAL_POINTS)  # steps a point, for all arms
    for arm, events in by_arm.items():
        blocks = [events[i : i + size] for i in range(0, len(events), size)]
        means = [{key: mean(column(block, key)) for key in ("step", "frac_mixed")} for block in blocks]
        series.append(line(wording.arm_name(arm), means, "frac_mixed", styles[arm]))
        shares = {key: mean(column(events, f"frac_{key}")) for key in ("all_wrong", "mixed", "all_right")}
        rows.append({"name": wording.arm_name(arm), "steps": len(events), **shares})
    title, text = "Groups with a learning signal", "Share of groups with right and wrong attempts, per step of an arm."
    return {"rows": rows, "chart": Chart("signal", title, text, "training step", "mixed groups", series, True)}


def change_section(run: Run) -> dict[str, Any]:
    """How the accepted questions changed: rows and charts over at most MAX_GROUPS groups of outer steps.

    A row has questions, length (mean characters), vendi and distinct (means over its steps of what the run recorded), and the
    shares well_posed and correct; None where unknown.
    """
    steps = sorted({s for row in run.questions if (s := count(row.get("step"))) is not None})
    size = max(1, math.ceil(len(steps) / MAX_GROUPS))
    rows: list[Row] = []
    for block in (steps[i : i + size] for i in range(0, len(steps), size)):
        group = [row for row in run.questions if count(row.get("step")) in block]
        events = [event for event in run.steps if count(event.get("step")) in block]
        name = str(block[0]) if len(block) == 1 else f"{block[0]}\u2013{block[-1]}"
        row: Row = {"name": name, "middle": (block[0] + block[-1]) / 2, "questions": len(group)}
        row["length"] = mean([float(len(str(q.get("question", "")))) for q in group])
        row |= {"distinct": mean(column(events, "distinct_share")), "vendi": mean(column(events, "vendi"))}
        rows.append({**row, **{key: label_share(group, key) for key in ("well_posed", "correct")}})
    right = [line("well-posed", rows, "well_posed", 2, "middle"), line("correct", rows, "correct", 3, "middle")]
    vendi = [line("", rows, "vendi", 4, "middle")]
    title, x = "Well-posed and correctly answered questions over outer steps", "outer step"
    title_vendi, text = "Vendi score of the questions of a step", "See the table."
    return {
        "rows": rows,
        "quality": Chart("quality", title, text, x, "questions", right, True),
        "vendi": Chart("vendi", title_vendi, text, x, "Vendi score", vendi),
    }


def transcript_section(run: Run) -> dict[str, Any] | None:
    """One held-out problem with a completion of the base model and one of SOAR's best output that was right; None without.

    Rows of transcripts.jsonl: id, question, answer, arm, completion, correct.
    """
    ours, _, _ = wording.rivals(run)
    by_problem: dict[str, dict[str, Row]] = {}
    for row in read_jsonl(run.path / "transcripts.jsonl")[0]:
        by_problem.setdefault(str(row.get("id")), {})[str(row.get("arm"))] = row
    pairs = [(arms.get("base"), arms.get(ours.name) if ours else None) for arms in by_problem.values()]
    both = [(base, own) for base, own in pairs if base is not None and own is not None]
    if not both:
        return None
    sides = max(both, key=lambda pair: (pair[1].get("correct") is True, pair[0].get("correct") is not True))
    return {"question": sides[0].get("question", ""), "answer": sides[0].get("answer", ""), "sides": sides}


def questions_section(rows: list[Row]) -> dict[str, Any]:
    """The embedded rows of a question file, with equal gaps between them, and what the page can say and filter about them."""
    shown = rows[:: max(1, math.ceil(len(rows) / MAX_QUESTIONS))]
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
    command, alarms = run.manifest.get("command"), run.events.get("alarm", [])
    return {
        "run": run,
        "asked": wording.asked(run),
        "headline": wording.headline(run),
        "reasons": wording.why_nothing(run),
        "paused": wording.paused(run),
        "remarks": wording.remarks(run),
        "arms": arms_section(run),
        "outer": loop_section(run),
        "screening": screening_section(run),
        "signal": signal_section(run),
        "change": change_section(run),
        "transcript": transcript_section(run),
        "questions": questions_section(run.questions),
        "pq": questions_section(run.pq),
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
    shown = (wording.percent, wording.whole, wording.decimal, wording.duration, wording.arm_name, wording.tokens)
    environment.filters |= {f.__name__: f for f in (*shown, shorten, attribute, verdict)}
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    environment.globals |= {"arm_meanings": wording.ARM_MEANINGS, "glossary": wording.GLOSSARY, "version": VERSION}
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


def write_pictures(run_dir: Path, out: Path) -> list[Path]:
    """Write every chart of a run's report into the folder `out` as SVG; returns the files. Raises ReportError for no run."""
    sections = [section for section in content(read_run(run_dir)).values() if isinstance(section, dict)]
    values = [
        v for section in sections for value in section.values() for v in (value if type(value) is list else [value])
    ]
    charts = {out / f"{chart.key}.svg": chart for chart in values if isinstance(chart, Chart) and chart}
    for path, chart in charts.items():
        write_atomic(path, chart.drawn())
    return list(charts)


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
