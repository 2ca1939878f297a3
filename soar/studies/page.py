"""The result of a study as Markdown tables and as one self-contained HTML page. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
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


def tables(results: Row) -> list[Table]:
    """Every table of the study, empty ones left out."""
    ks = _ks(results)
    teachers = ["accepted", "distinct", "Vendi", "well-posed", "correct", "KL", "collapsed"]
    every = [
        Table(
            "Held-out problems",
            "Mean over seeds with its 95 % interval: Student's t over the seeds (of one seed: bootstrap over problems; where "
            "nothing was solved: Clopper-Pearson over problems). Tokens, rollouts: all that was generated for the arm, the "
            "search for its questions included, the evaluation apart; mean over seeds. Off zero: seeds with at least "
            f"{percent(CLIMB, 0)} at the largest k, and the Clopper-Pearson interval of their share.",
            ["arm", "seeds", *(f"pass@{k}" for k in ks), "off zero", "tokens", "evaluation tokens", "rollouts"],
            _arm_rows(results, ks),
        ),
        Table(
            "Paired comparisons",
            f"{primary_line(results)} Difference of pass@k on the same problems of the same seeds, in percentage points, "
            "with Student's t interval over seeds, and the bootstrap over seeds and problems beside it. p: two-sided sign "
            "flips of the seeds' differences (five seeds cannot go below 0.0625); adjusted: by Holm's method over all "
            "comparisons but the primary one.",
            ["comparison", "seeds", "k", "difference", "bootstrap", "p", "p adjusted"],
            [row for entry in results["comparisons"] for row in _comparison_rows(results, entry)],
        ),
        Table(
            "Outer loops",
            f"First against last {TEACHER_STEPS} outer steps, mean over seeds; Vendi score of a step's wording. Collapsed: "
            "seeds whose share of distinct or of accepted questions, or Vendi score, fell below half of its start. "
            "Promotions: share of the decisions with a full window, with a 95 % Clopper-Pearson interval in which "
            "overlapping windows of w steps count 1 / w each; with teacher.reward = shuffled the rate of false ones at tau.",
            ["variant", "reward", *teachers, "promotions", "of windows"],
            [_loop_row(row) for row in results["loops"] if row["cells"]],
        ),
        Table(
            "Cells",
            "Every cell is a run folder with its own report.",
            ["cell", "state", "promotions", "time"],
            [_cell_row(cell) for cell in results["cells"]],
        ),
    ]
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
