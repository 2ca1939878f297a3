"""The result of a study as Markdown tables and as one self-contained HTML page. Needs no torch."""

import tomllib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from soar.files import Row, visible
from soar.report.page import render
from soar.report.runs import mean
from soar.report.text import DASH, MINUS, arm_name, bounds, duration, percent, percent_digits, share_within, whole
from soar.studies.results import CLIMB, TEACHER_FIGURES, TEACHER_STEPS

WORDS = tomllib.loads((Path(__file__).parent.parent / "assets" / "study.toml").read_text("utf-8"))


def tables(results: Row) -> list[Row]:
    """Every table of the study, empty ones left out: title, note, header, rows of as many cells, all of it text."""
    ks = sorted({k for row in results["arms"] for k in row["pass_at"]}, key=int)
    rows = {
        "arms": _arm_rows(results, ks),
        "comparisons": [row for entry in results["comparisons"] for row in _comparison_rows(results, entry)],
        "loops": [_loop_row(row) for row in results["loops"] if row["cells"]],
        "cells": [_cell_row(cell) for cell in results["cells"]],
    }
    values = {"primary": primary_line(results), "climb": percent(CLIMB, 0), "steps": TEACHER_STEPS}
    every = []
    for key, words in WORDS.items():
        parts = ([f"pass@{k}" for k in ks] if word == "pass@k" else [word] for word in words["header"])
        every.append({**words, "note": words["note"].format(**values), "header": [*chain(*parts)], "rows": rows[key]})
    return [table for table in every if table["rows"]]


def primary_line(results: Row) -> str:
    """Which comparison was named before the study ran, and the digest of the definition that names it."""
    if not results["primary"]:
        return "No primary comparison was named before the study ran, so all are adjusted."
    a, b, k = results["primary"]
    return (
        "Primary comparison, named in the study file before the first cell ran: "
        f"{label(results, a)} - {label(results, b)} at pass@{k} (sha256 of the definition: "
        f"{results['definition_sha256'][:12]}); its p stands unadjusted."
    )


def label(results: Row, result: str) -> str:
    """`grounded:ps` as `PS`, in a study of several variants as `grounded: PS`."""
    variant, _, arm = result.partition(":")
    return arm_name(arm) if len(results["definition"]["variants"]) == 1 else f"{variant}: {arm_name(arm)}"


def _arm_rows(results: Row, ks: Sequence[str]) -> list[list[str]]:
    rows = []
    for row in results["arms"]:
        spreads = [row["pass_at"].get(k) for k in ks]
        shares = [DASH if s is None else share_within(s["mean"], s["interval_95"]) for s in spreads]
        costs = [whole(row[key]) for key in ("total_tokens", "evaluation_tokens", "student_rollouts")]
        last, seeds = spreads[-1], len(row["seeds"])
        off = f"{last['climbed']} of {seeds} {bounds(last['climbed_95'], 0)}" if last else DASH
        rows.append([label(results, f"{row['variant']}:{row['arm']}"), str(seeds), *shares, off, *costs])
    return rows


def _comparison_rows(results: Row, row: Row) -> list[list[str]]:
    rows, name = [], f"{label(results, row['a'])} - {label(results, row['b'])}"
    for k, entry in row["pass_at"].items():
        digits = percent_digits(entry["difference"], entry["interval_95"])
        adjusted = "primary" if entry["primary"] else f"{entry['p_adjusted']:.4f}"
        gap = share_within(entry["difference"], entry["interval_95"])
        shown = [gap, bounds(entry["bootstrap_95"], digits), f"{entry['p_seeds']:.4f}"]
        rows.append([name, str(len(row["seeds"])), k, *shown, adjusted])
    return rows


def _loop_row(row: Row) -> list[str]:
    """Changes such as `0.98 -> 0.41`: means over seeds of the first and the last outer steps."""
    cells = [row["variant"]]
    for key in TEACHER_FIGURES:
        means = [mean([c[part][key] for c in row["cells"] if c[part][key] is not None]) for part in ("first", "last")]
        ends = [DASH if value is None else f"{value:.3g}".replace("-", MINUS) for value in means]
        cells.append(DASH if ends == [DASH, DASH] else " \u2192 ".join(ends))
    share = f"{percent(row['share'])} {bounds(row['interval_95'], 1)} of {row['windows']:,}"
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
        lines += [f"## {table['title']}", "", table["note"], ""]
        for row in (table["header"], ["---"] * len(table["header"]), *table["rows"]):
            cells = [" ".join(visible(c).replace("|", "\\|").replace("\u00a0", " ").split()) for c in row]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def page(results: Row) -> str:
    """The HTML page. Every text in it is escaped, and characters that hide or reorder text are made visible."""
    unfinished = sum(cell["state"] != "finished" for cell in results["cells"])
    return render("study.html", {"results": results, "tables": tables(results), "unfinished": unfinished})
