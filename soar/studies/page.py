"""The result of a study as Markdown tables and as one self-contained HTML page. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from soar.files import Row, visible
from soar.report.figures import STYLES, Axes, Series, line_chart
from soar.report.page import page as render
from soar.report.text import DASH, arm_name, bounds, duration, percent, percent_digits, whole
from soar.types import VERSION

MINUS = "\u2212"


@dataclass(frozen=True)
class Table:
    """One table for both forms. rows: cells as text, as many as the header."""

    title: str
    note: str
    header: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)


def label(variant: str, arm: str, single: bool) -> str:
    """`PS`, or `grounded: PS` in a study of several variants."""
    return arm_name(arm) if single else f"{variant}: {arm_name(arm)}"


def _label_of(name: str, single: bool) -> str:
    """`label` of a `variant:arm`."""
    variant, _, arm = name.partition(":")
    return label(variant, arm, single)


def tables(results: Row) -> list[Table]:
    """Every table of the study, empty ones left out."""
    every = [arms_table(results), comparison_table(results), promotion_table(results)]
    every += [teacher_table(results), pq_table(results), cell_table(results)]
    return [table for table in every if table.rows]


def arms_table(results: Row) -> Table:
    """pass@k of every arm: mean over seeds, hierarchical interval, standard deviation over seeds."""
    single = len(results["curves"]) == 1
    ks = _ks(results["arms"])
    header = ["arm", "seeds", *(f"pass@{k}" for k in ks), *(f"sd over seeds, pass@{k}" for k in ks[:1])]
    table = Table(
        "Held-out problems",
        "Mean over seeds, with a 95 % bootstrap interval over seeds and problems; sd: standard deviation of the seeds' "
        "means; [0, 0]: no success at all, so nothing to resample. Student rollouts: completions sampled to train the arm, "
        "mean over seeds.",
        [*header, "student rollouts"],
    )
    for row in results["arms"]:
        cells = [_share(row["pass_at"].get(k), "mean") for k in ks]
        spread = [percent((row["pass_at"].get(k) or {}).get("seed_sd")) for k in ks[:1]]
        name = label(row["variant"], row["arm"], single)
        table.rows.append([name, str(len(row["seeds"])), *cells, *spread, whole(row["student_rollouts"])])
    return table


def comparison_table(results: Row) -> Table:
    """Paired differences with their p-values."""
    single = len(results["curves"]) == 1
    table = Table(
        "Paired comparisons",
        "Difference of pass@k on the same problems of the same seeds, in percentage points. Intervals: bootstrap over "
        "seeds and problems, and Student's t over seeds. p: two-sided sign flips of the seeds' differences (five seeds "
        "cannot go below 0.0625); p of problems: sign flips of single problems, which says nothing about other seeds.",
        ["comparison", "seeds", "k", "difference", "t interval", "ratio", "p", "p of problems"],
    )
    for row in results["comparisons"]:
        a, b = (_label_of(row[x], single) for x in "ab")
        for k, found in row["pass_at"].items():
            ratio = DASH if found["ratio"] is None else f"{found['ratio']:.2f}"
            t = found["t_interval_95"]
            digits = percent_digits(found["difference"], tuple(found["interval_95"]))
            table.rows.append(
                [
                    f"{a} - {b}",
                    str(len(row["seeds"])),
                    k,
                    _share(found, "difference"),
                    DASH if t is None else bounds((t[0], t[1]), digits),
                    ratio,
                    f"{found['p_seeds']:.4f}",
                    f"{found['p_problems']:.4f}",
                ]
            )
    return table


def promotion_table(results: Row) -> Table:
    """How often a full window promoted; for shuffled answers this is the false-promotion rate."""
    table = Table(
        "Promotions",
        "Chunk of the decisions with a full window that promoted, with a 95 % Wilson interval in which overlapping windows "
        "of w steps count 1 / w each. With teacher.reward = shuffled it is the false-promotion rate at tau.",
        ["variant", "windows", "promotions", "share", "per seed"],
    )
    for row in results["promotions"]:
        low, high = row["interval_95"]
        share = f"{percent(row['share'])} {bounds((low, high), 1)}"
        per_seed = " ".join(str(entry["promotions"]) for entry in row["per_seed"])
        table.rows.append([row["variant"], whole(row["windows"]), whole(row["promotions"]), share, per_seed])
    return table


def teacher_table(results: Row) -> Table:
    """Stability of the teachers: first and last outer steps, mean over seeds."""
    table = Table(
        "Teachers",
        f"First against last outer steps, mean over seeds. Vendi score by {results['embedder']}. Collapsed: seeds whose "
        "share of distinct or of accepted questions, or Vendi score, fell below half of its start.",
        [
            "variant",
            "reward",
            "accepted",
            "distinct",
            "Vendi",
            "topics, bits",
            "well-posed",
            "correct",
            "KL",
            "collapsed",
        ],
    )
    keys = ("reward_mean", "accepted_share", "distinct_share", "vendi", "topic_entropy", "well_posed", "correct")
    for row in results["teachers"]:
        if row["cells"]:
            changes = [_change(row["cells"], key) for key in keys]
            changes.append(_change(row["cells"], "teacher_kl"))
            table.rows.append([row["variant"], *changes, f"{row['collapsed']} of {len(row['cells'])}"])
    return table


def pq_table(results: Row) -> Table:
    """Quality of the promotion questions of every cell that promoted."""
    table = Table(
        "Promotion questions",
        "Shares of the promotion questions that are well-posed and that have a correct answer, by the judge named.",
        ["cell", "questions", "distinct", "well-posed", "correct", "judge"],
    )
    for row in results["pq"]:
        for cell in row["cells"]:
            shares = [percent(cell[key]) for key in ("distinct_share", "well_posed", "correct")]
            name = f"{row['variant']}, seed {cell['seed']}"
            table.rows.append([name, whole(cell["questions"]), *shares, cell["judge"] or DASH])
    return table


def cell_table(results: Row) -> Table:
    """What became of every cell."""
    table = Table("Cells", "Every cell is a run folder with its own report.", ["cell", "state", "promotions", "time"])
    for cell in results["cells"]:
        state = cell["state"] if not cell["reason"] else f"{cell['state']}: {cell['reason']}"
        row = [f"{cell['variant']}, seed {cell['seed']}", state, whole(cell["promotions"])]
        table.rows.append([*row, duration(cell["wall_seconds"])])
    return table


def _ks(rows: Sequence[Row]) -> list[str]:
    return sorted({k for row in rows for k in row["pass_at"]}, key=int)


def _share(found: Row | None, key: str) -> str:
    if found is None:
        return DASH
    low, high = found["interval_95"]
    digits = percent_digits(found[key], (low, high))
    return f"{percent(found[key], digits)} {bounds((low, high), digits)}"


def _change(cells: Sequence[Row], key: str) -> str:
    """`0.98 -> 0.41`: means over seeds of the first and the last outer steps."""
    means = []
    for period in ("first", "last"):
        known = [cell[period][key] for cell in cells if cell[period][key] is not None]
        mean = sum(known) / len(known) if known else None
        means.append(DASH if mean is None else f"{mean:.3g}".replace("-", MINUS))
    return DASH if means == [DASH, DASH] else " \u2192 ".join(means)


def markdown(results: Row) -> str:
    """The tables as Markdown."""
    lines = [f"# {results['name']}", "", *([results["question"], ""] if results["question"] else [])]
    lines += [f"Recipe `{results['recipe'].rpartition('/')[2]}`, seeds {', '.join(map(str, results['seeds']))}.", ""]
    for table in tables(results):
        lines += [f"## {table.title}", "", table.note, "", _line(table.header), _line(["---"] * len(table.header))]
        lines += [_line(row) for row in table.rows] + [""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    plain = [" ".join(visible(cell).replace("|", "\\|").replace("\u00a0", " ").split()) for cell in cells]
    return f"| {' | '.join(plain)} |"


def charts(results: Row) -> list[tuple[str, Markup]]:
    """(caption, chart): pass@k of the arms, reward and shares of the questions over outer steps; none without figures."""
    single = len(results["curves"]) == 1
    ks = [int(k) for k in _ks(results["arms"])]
    arms = []
    for i, row in enumerate(results["arms"]):
        x = sorted(map(int, row["pass_at"]))
        found = [row["pass_at"][str(k)] for k in x]
        low, high = ([entry["interval_95"][side] for entry in found] for side in (0, 1))
        name = label(row["variant"], row["arm"], single)
        arms.append(Series(name, x, [entry["mean"] for entry in found], low, high, style=i % STYLES))
    wording = "pass@k on the held-out problems, mean over seeds"
    axes = Axes("pass", wording, f"{wording}, with 95 % intervals; see the table.", "k", "solved", True, True)
    drawn = [(wording, line_chart(axes, arms))] if ks and len(arms) <= STYLES else []
    for key, wording, y, share in (
        ("reward_mean", "Grounded reward over outer steps, mean over seeds", "reward", False),
        ("distinct_share", "Distinct questions over outer steps, mean over seeds", "distinct", True),
        ("well_posed", "Well-posed questions over outer steps, mean over seeds", "well-posed", True),
        ("correct", "Correct answers over outer steps, mean over seeds", "correct", True),
    ):
        curves = []
        for i, (variant, rows) in enumerate(results["curves"].items()):
            known = [row for row in rows if row.get(key) is not None]
            x, values = [row["step"] for row in known], [row[key] for row in known]
            curves.append(Series(variant, x, values, style=i % STYLES))
        axes = Axes(key.replace("_", "-"), wording, f"{wording}, one line a variant.", "outer step", y, share)
        drawn.append((wording, line_chart(axes, curves)))
    return [(caption, chart) for caption, chart in drawn if chart]


def page(results: Row) -> str:
    """The HTML page. Every text in it is escaped, and characters that hide or reorder text are made visible."""
    return render(
        "study.html",
        {
            "results": results,
            "tables": tables(results),
            "charts": charts(results),
            "unfinished": sum(cell["state"] != "finished" for cell in results["cells"]),
            "version": VERSION,
        },
    )
