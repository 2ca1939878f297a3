"""Several runs on one page: what differs between them, and what holds over seeds. Needs no torch.

Runs whose configs differ in nothing but the seed (and in keys that decide no result) form a group. Over the runs of a
group a mean with a t interval is given, which a single run cannot give. Left out: tests between groups; with a handful of
runs each, the table says as much.
"""

from __future__ import annotations

import json
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soar import __version__
from soar.config import HARMLESS
from soar.files import write_atomic
from soar.loop.statistics import t_interval
from soar.report import sections
from soar.report import text as wording
from soar.report.figures import STYLES, Axes, Series, line_chart
from soar.report.page import page
from soar.report.runs import Run, count, numbers, read_run


@dataclass(frozen=True)
class Entry:
    """One run of the comparison. label: its folder's name, made unique; group: A, B, ... by configuration."""

    label: str
    group: str
    run: Run

    @property
    def seed(self) -> str:
        return str(self.run.manifest.get("seed", wording.DASH))


def flat(config: object, prefix: str = "") -> dict[str, Any]:
    """A config's keys, dotted."""
    if not isinstance(config, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def entries(runs: Sequence[Run]) -> list[Entry]:
    """The runs with labels and groups, in the order given."""
    names = [run.path.resolve().name for run in runs]
    groups: dict[str, str] = {}
    found = []
    for i, run in enumerate(runs):
        label = names[i] if names.count(names[i]) == 1 else str(run.path)
        decisive = {k: v for k, v in flat(run.config).items() if k not in HARMLESS and k != "seed"}
        key = json.dumps(decisive, sort_keys=True)
        number = len(groups)
        letter = string.ascii_uppercase[number % 26] + (str(number // 26) if number >= 26 else "")
        found.append(Entry(label, groups.setdefault(key, letter), run))
    return found


def differences(found: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Config keys that are not the same in all runs, with the value of each run."""
    configs = [flat(entry.run.config) for entry in found]
    keys = sorted({key for config in configs for key in config if key not in ("seed", "name")})
    rows = []
    for key in keys:
        values = [json.dumps(c[key], ensure_ascii=False) if key in c else wording.DASH for c in configs]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def verdicts(found: Sequence[Entry]) -> list[str]:
    """One sentence per group: SOAR's promoted student against Hard-Only, over its runs."""
    lines = []
    for group in dict.fromkeys(entry.group for entry in found):
        mine = [entry for entry in found if entry.group == group]
        measured = [e.run.arms for e in mine if {"ps", "hard_only"} <= e.run.arms.keys()]
        ks = sorted(
            set.intersection(*(set(a["ps"].pass_at) & set(a["hard_only"].pass_at) for a in measured))
            if measured
            else []
        )
        seeds = ", ".join(entry.seed for entry in mine)
        who = f"{group}: {wording.plural(len(mine), 'run')} (seed {seeds})"
        if not ks:
            lines.append(f"{who}: PS and Hard-Only have not both been measured.")
            continue
        gains = [arms["ps"].pass_at[ks[0]] - arms["hard_only"].pass_at[ks[0]] for arms in measured]
        ratios = [wording.budget_ratio(arms["ps"], arms["hard_only"]) for arms in measured]
        lines.append(f"{who}: PS minus Hard-Only at pass@{ks[0]}, {_spread(gains, ratios)}.")
        if len({entry.seed for entry in mine}) < len(mine):
            lines.append(f"{group} holds a seed more than once: those runs are no independent evidence.")
    return lines


def _spread(gains: Sequence[float], ratios: Sequence[float | None]) -> str:
    """Mean gain with its interval, and what it says; ratios: student budgets of PS over Hard-Only, run by run."""
    centre, interval = statistics.fmean(gains), t_interval(gains)
    digits = wording.percent_digits(centre)
    points = f"{100 * centre:+.{digits}f} percentage points".replace("-", wording.MINUS)
    if interval is None:
        return f"{points} in one run, which says nothing about other seeds"
    said = "no difference is shown"
    if interval[0] > 0 or interval[1] < 0:
        ahead = interval[0] > 0
        known = [ratio for ratio in ratios if ratio is not None]
        pick = max if ahead else min  # the run whose budget explains most
        caveat = wording.budget_caveat(pick(known) if len(known) == len(ratios) else None, ahead)
        said = f"SOAR is {'ahead' if ahead else 'behind'}{caveat}"
        if caveat and len(set(ratios)) > 1:
            said += " (in the run where they differ most)"
    return f"mean of {len(gains)} runs {points} {wording.bounds(interval, digits)} (95\u00a0% t interval over runs): {said}"


def result_tables(found: Sequence[Entry]) -> list[dict[str, Any]]:
    """pass@k of every arm and run for the smallest and the largest k that any run has, and each group's mean."""
    ks = sorted({k for entry in found for arm in entry.run.arms.values() for k in arm.pass_at})
    known = list(wording.ARM_NAMES)
    names = sorted({n for e in found for n in e.run.arms}, key=lambda n: (known.index(n) if n in known else 99, n))
    tables: list[dict[str, Any]] = []
    for k in sorted({*ks[:1], *ks[-1:]}):
        rows: list[dict[str, Any]] = []
        for entry in found:
            arms = entry.run.arms
            cells = [
                wording.with_interval(arms[n], k) if n in arms and k in arms[n].pass_at else wording.DASH for n in names
            ]
            rows.append({"label": entry.label, "group": entry.group, "seed": entry.seed, "cells": cells, "mean": False})
        for group in dict.fromkeys(entry.group for entry in found):
            mine = [entry.run.arms for entry in found if entry.group == group]
            shares = [[arms[n].pass_at[k] for arms in mine if n in arms and k in arms[n].pass_at] for n in names]
            if len(mine) > 1:
                cells = [_mean_cell(values) for values in shares]
                rows.append({"label": f"mean of {group}", "group": group, "seed": "", "cells": cells, "mean": True})
        tables.append({"k": k, "rows": [{**row, "cells": [c.partition(" [") for c in row["cells"]]} for row in rows]})
    return [{**table, "arms": names} for table in tables]


def _mean_cell(values: Sequence[float]) -> str:
    if not values:
        return wording.DASH
    centre, interval = statistics.fmean(values), t_interval(values)
    interval = interval and (max(0.0, interval[0]), min(1.0, interval[1]))
    digits = wording.percent_digits(centre, interval)
    return f"{wording.percent(centre, digits)} {wording.bounds(interval, digits)}".strip()


def charts(found: Sequence[Entry]) -> dict[str, Any]:
    """Teacher reward over steps, and pass@k of PS, Hard-Only and PQ, one line a run."""
    rewards = []
    for i, entry in enumerate(found):
        rows = [row for row in sections.step_rows(entry.run) if row["mean"] is not None]
        points = [float(row["step"]) for row in rows], [row["mean"] for row in rows]
        rewards.append(Series(entry.label, *points, style=i % STYLES))
    reward = Axes(
        key="rewards",
        title="Teacher reward over outer steps",
        description="Mean reward of the datasets of an outer step, one line for each run.",
        x_label="outer step",
        y_label="reward",
    )
    return {
        "reward": line_chart(reward, rewards),
        **{arm: _pass_chart(found, arm) for arm in ("ps", "hard_only", "pq")},
    }


def _pass_chart(found: Sequence[Entry], arm: str) -> Any:
    measured = [(i, e.label, e.run.arms[arm].pass_at) for i, e in enumerate(found) if arm in e.run.arms]
    series = [Series(label, list(shares), list(shares.values()), style=i % STYLES) for i, label, shares in measured]
    ks = sorted({k for _, _, shares in measured for k in shares})
    title = f"pass@k of {wording.arm_name(arm)}"
    return line_chart(sections.pass_axes(f"pass-{arm}", title, "one line for each run", ks), series)


def content(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that the page of a comparison shows."""
    found = entries(runs)
    rows = []
    for entry in found:
        run = entry.run
        steps = numbers([step.get("student_rollouts") for step in run.steps])
        seconds = sections.phases(run)[1]
        promotions = run.summary.get("promotions", len(run.promotions))
        rows.append(
            {
                "entry": entry,
                "steps": len(run.steps),
                "promotions": count(promotions),
                "rollouts": max(steps, default=None),
                "seconds": seconds,
                "alarms": len(run.events.get("alarm", [])),
                "notes": len(run.notes),
            }
        )
    return {
        "rows": rows,
        "verdicts": verdicts(found),
        "tables": result_tables(found),
        "differences": differences(found),
        "charts": charts(found),
        "labels": [entry.label for entry in found],
        "version": __version__,
    }


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page about several run folders to the file `out`; returns it. Raises ReportError for no run folder."""
    html = page("compare.html", content([read_run(path) for path in run_dirs]))
    write_atomic(out, html.encode())
    return out
