"""The result of a study as Markdown tables and as one self-contained HTML page. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from soar.files import Row, visible
from soar.report.charts import STYLES, Chart, Series
from soar.report.page import line, render
from soar.report.runs import mean
from soar.report.text import DASH, MINUS, arm_name, bounds, duration, percent, percent_digits, whole


@dataclass(frozen=True)
class Table:
    """One table for both forms. rows: cells as text, as many as the header."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(results: Row) -> list[Table]:
    """Every table of the study, empty ones left out."""
    ks = _ks(results)
    teachers = ["accepted", "distinct", "Vendi", "topics,\xa0bits", "well-posed", "correct", "KL", "collapsed"]
    every = [
        Table(
            "Held-out problems",
            "Mean over seeds, with a 95 % bootstrap interval over seeds and problems; sd: standard deviation of the seeds' "
            "means; [0, 0]: no success at all, so nothing to resample. Student rollouts: completions sampled to train the "
            "arm, mean over seeds.",
            [
                "arm",
                "seeds",
                *(f"pass@{k}" for k in ks),
                *(f"sd over seeds, pass@{k}" for k in ks[:1]),
                "student rollouts",
            ],
            _arm_rows(results, ks),
        ),
        Table(
            "Paired comparisons",
            "Difference of pass@k on the same problems of the same seeds, in percentage points. Intervals: bootstrap over "
            "seeds and problems, and Student's t over seeds. p: two-sided sign flips of the seeds' differences (five seeds "
            "cannot go below 0.0625); p of problems: sign flips of single problems, which says nothing about other seeds.",
            ["comparison", "seeds", "k", "difference", "t interval", "ratio", "p", "p of problems"],
            _comparison_rows(results),
        ),
        Table(
            "Promotions",
            "Share of the decisions with a full window that promoted, with a 95 % Wilson interval in which overlapping "
            "windows of w steps count 1 / w each. With teacher.reward = shuffled it is the false-promotion rate at tau.",
            ["variant", "windows", "promotions", "share", "per seed"],
            [_promotion_row(row) for row in results["promotions"]],
        ),
        Table(
            "Teachers",
            "First against last outer steps, mean over seeds; Vendi score of the wording. Collapsed: seeds whose "
            "share of distinct or of accepted questions, or Vendi score, fell below half of its start.",
            ["variant", "reward", *teachers],
            [_teacher_row(row) for row in results["teachers"] if row["cells"]],
        ),
        Table(
            "Promotion questions",
            "Shares of the promotion questions that are well-posed and that have a correct answer, by the judge named.",
            ["cell", "questions", "distinct", "well-posed", "correct", "judge"],
            [_pq_row(row["variant"], cell) for row in results["pq"] for cell in row["cells"]],
        ),
        Table(
            "Cells",
            "Every cell is a run folder with its own report.",
            ["cell", "state", "promotions", "time"],
            [_cell_row(cell) for cell in results["cells"]],
        ),
    ]
    return [table for table in every if table.rows]


def label(results: Row, variant: str, arm: str) -> str:
    """`PS`, or `grounded: PS` in a study of several variants."""
    return arm_name(arm) if len(results["curves"]) == 1 else f"{variant}: {arm_name(arm)}"


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
        spread = [percent((row["pass_at"].get(k) or {}).get("seed_sd")) for k in ks[:1]]
        name = label(results, row["variant"], row["arm"])
        rows.append([name, str(len(row["seeds"])), *shares, *spread, whole(row["student_rollouts"])])
    return rows


def _comparison_rows(results: Row) -> list[list[str]]:
    rows = []
    for row in results["comparisons"]:
        a, b = (label(results, *row[side].split(":", 1)) for side in "ab")
        for k, entry in row["pass_at"].items():
            t, ratio = entry["t_interval_95"], entry["ratio"]
            digits = percent_digits(entry["difference"], tuple(entry["interval_95"]))
            shown = [_share(entry, "difference"), DASH if t is None else bounds((t[0], t[1]), digits)]
            shown.append(DASH if ratio is None else f"{ratio:.2f}")
            chances = [f"{entry[key]:.4f}" for key in ("p_seeds", "p_problems")]
            rows.append([f"{a} - {b}", str(len(row["seeds"])), k, *shown, *chances])
    return rows


def _promotion_row(row: Row) -> list[str]:
    share = f"{percent(row['share'])} {bounds(tuple(row['interval_95']), 1)}"
    per_seed = " ".join(str(entry["promotions"]) for entry in row["per_seed"])
    return [row["variant"], whole(row["windows"]), whole(row["promotions"]), share, per_seed]


def _teacher_row(row: Row) -> list[str]:
    """Changes such as `0.98 -> 0.41`: means over seeds of the first and the last outer steps."""
    cells = [row["variant"]]
    figures = "reward_mean accepted_share distinct_share vendi topic_entropy well_posed correct teacher_kl"
    for key in figures.split():
        means = [mean([c[part][key] for c in row["cells"] if c[part][key] is not None]) for part in ("first", "last")]
        ends = [DASH if value is None else f"{value:.3g}".replace("-", MINUS) for value in means]
        cells.append(DASH if ends == [DASH, DASH] else " \u2192 ".join(ends))
    return [*cells, f"{row['collapsed']} of {len(row['cells'])}"]


def _pq_row(variant: str, cell: Row) -> list[str]:
    shares = [percent(cell[key]) for key in ("distinct_share", "well_posed", "correct")]
    return [f"{variant}, seed {cell['seed']}", whole(cell["questions"]), *shares, cell["judge"] or DASH]


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


def charts(results: Row) -> list[Chart]:
    """pass@k of the arms, reward and shares of the questions over outer steps; none without figures."""
    arms = []
    for i, row in enumerate(results["arms"]):
        entries = sorted((int(k), entry) for k, entry in row["pass_at"].items())
        low, high = ([entry["interval_95"][side] for _, entry in entries] for side in (0, 1))
        name = label(results, row["variant"], row["arm"])
        arms.append(Series(name, [k for k, _ in entries], [e["mean"] for _, e in entries], low, high, style=i))
    title, ks = "pass@k on the held-out problems, mean over seeds", [int(k) for k in _ks(results)]
    text = f"{title}, with 95 % intervals; see the table."
    shown = [Chart("pass", title, text, "k", "solved", arms, True, ks)] if len(arms) <= STYLES else []
    for key, what, y, share in (
        ("reward_mean", "Grounded reward", "reward", False),
        ("distinct_share", "Distinct questions", "distinct", True),
        ("well_posed", "Well-posed questions", "well-posed", True),
        ("correct", "Correct answers", "correct", True),
    ):
        curves = [line(variant, rows, key, i) for i, (variant, rows) in enumerate(results["curves"].items())]
        title = f"{what} over outer steps, mean over seeds"
        shown.append(
            Chart(key.replace("_", "-"), title, f"{title}, one line a variant.", "outer step", y, curves, share)
        )
    return [chart for chart in shown if chart]


def page(results: Row) -> str:
    """The HTML page. Every text in it is escaped, and characters that hide or reorder text are made visible."""
    unfinished = sum(cell["state"] != "finished" for cell in results["cells"])
    values = {"results": results, "tables": tables(results), "charts": charts(results), "unfinished": unfinished}
    return render("study.html", values)
