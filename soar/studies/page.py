"""The result of a study as Markdown tables and as one self-contained HTML page. Needs no torch."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from soar.files import Row, visible
from soar.report.page import render
from soar.report.runs import mean
from soar.report.text import DASH, MINUS, arm_name, bounds, duration, percent, percent_digits, whole
from soar.studies.results import CLIMB, TEACHER_FIGURES, TEACHER_STEPS


class Table(NamedTuple):
    """One table for both forms. rows: cells as text, as many as the header."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


WORDS = tomllib.loads((Path(__file__).parent.parent / "assets" / "study.toml").read_text("utf-8"))


def tables(results: Row) -> list[Table]:
    """Every table of the study, empty ones left out."""
    ks = _ks(results)
    rows_of = {
        "arms": _arm_rows(results, ks),
        "comparisons": [row for entry in results["comparisons"] for row in _comparison_rows(results, entry)],
        "loops": [_loop_row(row) for row in results["loops"] if row["cells"]],
        "cells": [_cell_row(cell) for cell in results["cells"]],
    }
    values = {"primary": primary_line(results), "climb": percent(CLIMB, 0), "steps": TEACHER_STEPS}
    every = []
    for key, words in WORDS.items():
        header = [
            name for word in words["header"] for name in ([f"pass@{k}" for k in ks] if word == "pass@k" else [word])
        ]
        every.append(Table(words["title"], words["note"].format(**values), header, rows_of[key]))
    return [table for table in every if table.rows]


def primary_line(results: Row) -> str:
    """Which comparison was named before the study ran, and the digest of the definition that names it."""
    if not results["primary"]:
        return "No primary comparison was named before the study ran, so all are adjusted."
    a, b, k = results["primary"]
    names = [label(results, *side.split(":", 1)) for side in (a, b)]
    return (
        f"Primary comparison, named in the study file before the first cell ran: {names[0]} - {names[1]} at pass@{k} "
        f"(sha256 of the definition: {results['definition_sha256'][:12]}); its p stands unadjusted."
    )


def label(results: Row, variant: str, arm: str) -> str:
    """`PS`, or `grounded: PS` in a study of several variants."""
    return arm_name(arm) if len(results["definition"]["variants"]) == 1 else f"{variant}: {arm_name(arm)}"


def _ks(results: Row) -> list[str]:
    return sorted({k for row in results["arms"] for k in row["pass_at"]}, key=int)


def _share(entry: Row | None, key: str) -> str:
    if entry is None:
        return DASH
    low, high = entry["interval_95"]
    digits = percent_digits(entry[key], (low, high))
    return f"{percent(entry[key], digits)} {bounds((low, high), digits)}"


def _arm_rows(results: Row, ks: Sequence[str]) -> list[list[str]]:
    rows = []
    for row in results["arms"]:
        shares = [_share(row["pass_at"].get(k), "mean") for k in ks]
        costs = [whole(row[key]) for key in ("total_tokens", "evaluation_tokens", "student_rollouts")]
        last, seeds = row["pass_at"].get(ks[-1]), len(row["seeds"])
        off = f"{last['climbed']} of {seeds} {bounds(tuple(last['climbed_95']), 0)}" if last else DASH
        rows.append([label(results, row["variant"], row["arm"]), str(seeds), *shares, off, *costs])
    return rows


def _comparison_rows(results: Row, row: Row) -> list[list[str]]:
    a, b = (label(results, *row[side].split(":", 1)) for side in "ab")
    rows = []
    for k, entry in row["pass_at"].items():
        digits = percent_digits(entry["difference"], tuple(entry["interval_95"]))
        adjusted = "primary" if entry["primary"] else f"{entry['p_adjusted']:.4f}"
        shown = [_share(entry, "difference"), bounds(tuple(entry["bootstrap_95"]), digits), f"{entry['p_seeds']:.4f}"]
        rows.append([f"{a} - {b}", str(len(row["seeds"])), k, *shown, adjusted])
    return rows


def _loop_row(row: Row) -> list[str]:
    """Changes such as `0.98 -> 0.41`: means over seeds of the first and the last outer steps."""
    cells = [row["variant"]]
    for key in TEACHER_FIGURES:
        means = [mean([c[part][key] for c in row["cells"] if c[part][key] is not None]) for part in ("first", "last")]
        ends = [DASH if value is None else f"{value:.3g}".replace("-", MINUS) for value in means]
        cells.append(DASH if ends == [DASH, DASH] else " \u2192 ".join(ends))
    share = f"{percent(row['share'])} {bounds(tuple(row['interval_95']), 1)} of {row['windows']:,}"
    return [*cells, f"{row['collapsed']} of {len(row['cells'])}", whole(row["promotions"]), share]


def _cell_row(cell: Row) -> list[str]:
    state = f"{cell['state']}: {cell['reason']}" if cell["reason"] else cell["state"]
    name = f"{cell['variant']}, seed {cell['seed']}"
    return [name, state, whole(cell["promotions"]), duration(cell["wall_seconds"])]


def markdown(results: Row) -> str:
    """The tables as Markdown."""
    lines = [f"# {results['name']}", "", *([results["question"], ""] if results["question"] else [])]
    lines += [f"Recipe `{results['recipe'].rpartition('/')[2]}`, seeds {', '.join(map(str, results['seeds']))}.", ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", table.note, ""]
        for row in (table.header, ["---"] * len(table.header), *table.rows):
            cells = [" ".join(visible(c).replace("|", "\\|").replace("\u00a0", " ").split()) for c in row]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def page(results: Row) -> str:
    """The HTML page. Every text in it is escaped, and characters that hide or reorder text are made visible."""
    unfinished = sum(cell["state"] != "finished" for cell in results["cells"])
    values = {"results": results, "tables": tables(results), "unfinished": unfinished}
    return render("study.html", values)
