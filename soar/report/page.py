"""One self-contained HTML page about a run folder, finished or not. Needs no torch and no network.

The page holds its own style and a small script, and a content policy that allows nothing else, so text that a model wrote
can do nothing; it is escaped all the same (jinja2 autoescape), and characters that hide or reorder text are made visible.

A chart is data, drawn by matplotlib when it is shown: an SVG image within a page. Series differ by marker and dash as well as
by colour. Every number of a chart stands in a table of its page.
"""

import base64
import hashlib
import io
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from soar.config import DENSE
from soar.files import Row, asset, clipped, shell_words, visible, write_atomic
from soar.loop.evaluate import told_apart
from soar.report import text as wording
from soar.report.runs import Arm, Run, count, mapping, number, numbers, read_arm, read_run
from soar.report.text import TEMPLATES
from soar.types import VERSION, mean, standard_error

MAX_QUESTIONS = 600  # of each of the two files
MAX_STEPS_SHOWN = 500
MAX_ARMS, MAX_KS = 60, 60  # of a table, far more than a run has: a cell of it for each arm and k
MAX_COMPLETIONS = 8  # of each outcome
OUTCOMES: dict[str, list[str]] = asset("outcomes")
"""What came of an attempt -> the cause in a word, and what to do."""
KINDS = {"hard": "hard problems", "question": "own questions", "teacher": "teacher texts"}
COLOURS = ("#7a828c", "#d9691e", "#3b82d6", "#1f9e74", "#a45fd0", "#b08d12", "#d64b77", "#1b99a8")
DASHES = ("-", (0, (6, 2)), "-", (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (4, 3)), (0, (1, 3)), (0, (10, 3)))
MARKERS = "os^Dvph*"
DARK, LOOK, STEP_CHARTS = (asset("charts")[key] for key in ("dark", "look", "steps"))


class Series(NamedTuple):
    """One line of a chart. x, y: equally long; low, high: band around y. style: of colour, dash and marker, counted round."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0


class Chart(NamedTuple):
    """Series and what a chart says besides them; false when there is nothing to draw.

    key: unique in the page. percent: y is a share, shown in per cent. ticks: values of x on a log2 scale, else a linear one.
    rules: (y, label) of horizontal lines. marks: x of promotions. bars: names of bars 0, 1 ...
    """

    key: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    percent: bool = False
    ticks: Sequence[int] = ()
    rules: Sequence[tuple[float, str]] = ()
    marks: Sequence[float] = ()
    bars: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any(len(series.x) for series in self.series)

    def figure(self) -> Any:
        """The chart as a matplotlib figure, in its own look whatever the caller's settings are."""
        import matplotlib.style
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        shown = [series for series in self.series if len(series.x)]
        labels = [*(series.label for series in shown), *(label for _, label in self.rules)]
        labels = list(map(label_of, [*labels, *["promotion"][: len(self.marks)]]))
        columns = 1 if max(map(len, labels), default=0) > 24 else 2
        size = (4.8, round(3.0 + 0.22 * math.ceil(len(labels) / columns), 2))
        values = [y for series in shown for y in (*series.y, *series.low, *series.high)] + [y for y, _ in self.rules]
        with matplotlib.style.context(["default", LOOK]):
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots()
            handles: list[Any] = [axes.bar(s.x, s.y, color=COLOURS[2]) if self.bars else _draw(axes, s) for s in shown]
            if self.bars:
                axes.set_xticks(range(len(self.bars)), list(map(label_of, self.bars)))
            elif self.ticks and self.ticks[0] > 0:
                ticks = [k for k in self.ticks if len(self.ticks) <= 8 or k.bit_count() == 1]
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, list(map(str, ticks)))
                axes.minorticks_off()
            else:
                xs = [x for series in shown for x in series.x]
                whole = all(float(x).is_integer() for x in xs)
                axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole, min_n_ticks=1))  # one step has one tick
                axes.set_xlim(left=min(0, *xs))
            handles += [axes.axhline(y, color="black", linestyle="--", linewidth=1, alpha=0.7) for y, _ in self.rules]
            handles += [axes.axvline(x, color=COLOURS[3], linestyle=":", linewidth=1.5) for x in self.marks][:1]
            axes.set(xlabel=label_of(self.x_label), ylabel=label_of(self.y_label))
            low, high = axes.get_ylim()
            axes.set_ylim(0 if min(values) >= 0 else low, max(high, 0))
            if self.percent:
                axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}\u00a0%".replace("-", "\u2212"))
            figure.legend(handles, labels, loc="outside upper left", ncols=columns)
        return figure

    def image(self) -> Markup:
        """An SVG image for light and dark pages that allow `data:`. It runs no script; the same data gives the same bytes."""
        import matplotlib

        buffer, metadata = io.BytesIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context({**LOOK, "svg.hashsalt": self.key}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that the font lacks
            self.figure().savefig(buffer, format="svg", metadata=metadata, transparent=True)
        data = base64.b64encode(buffer.getvalue().replace(b"</style>", DARK.encode() + b"</style>", 1)).decode()
        text = visible(f"{self.title}: {self.y_label} against {self.x_label}; the figures stand in a table of the page")
        return Markup('<img class="chart" alt="{}" src="data:image/svg+xml;base64,{}">').format(text, data)


def bar_chart(key: str, title: str, x_label: str, y_label: str, counts: Mapping[str, float]) -> Chart:
    """A bar for each name."""
    series = Series(y_label, range(len(counts)), list(counts.values()))
    return Chart(key, title, x_label, y_label, [series], bars=list(counts))


class Plots(list[Any]):
    """Charts as matplotlib figures; a notebook shows them side by side."""

    def __init__(self, charts: Sequence[Chart]) -> None:
        super().__init__(chart.figure() for chart in charts if chart)
        self.charts = [chart for chart in charts if chart]

    def _repr_html_(self) -> str:
        box = Markup('<figure style="{}"><figcaption>{}</figcaption>{}</figure>')
        style = "display: inline-block; width: 26em; margin: 4px; background: light-dark(#fff, #1b1f23)"
        style += "; color: light-dark(#1d2126, #e7eaed); color-scheme: light dark"
        return "".join(box.format(style, visible(chart.title), chart.image()) for chart in self.charts)


class Shown:
    """What prints as text (its table, if nothing else is said), and in a notebook with its charts."""

    table: str

    def __repr__(self) -> str:
        return self.table

    def charts(self) -> list[Chart]:
        """What `plot` draws."""
        return []

    def plot(self) -> Plots:
        """The charts as matplotlib figures."""
        return Plots(self.charts())

    def _repr_html_(self) -> str:
        return Markup("<pre>{}</pre>{}").format(visible(repr(self)), Markup(self.plot()._repr_html_()))


def label_of(text: str) -> str:
    """A name on one line, not too long, and never one that matplotlib would leave out of a legend."""
    line = wording.one_line(visible(text), 48)
    return f"\u200a{line}" if line.startswith("_") else line


def _draw(axes: Any, series: Series) -> Any:
    style = series.style % len(COLOURS)
    colour, marker = COLOURS[style], MARKERS[style] if len(series.x) <= 60 else None
    if len(series.low) == 1:
        axes.vlines(series.x, series.low, series.high, color=colour)
    elif series.low:
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0)
    look = {"color": colour, "linestyle": DASHES[style], "marker": marker, "markersize": 5, "clip_on": False}
    return axes.plot(series.x, series.y, **look)[0]


def column(rows: Sequence[Row], key: str) -> list[float]:
    """The numbers under a key."""
    return numbers([row.get(key) for row in rows])


def line(label: str, rows: Sequence[Row], key: str, style: int, x: str = "step", band: Sequence[str] = ()) -> Series:
    """A chart's line through the rows that have a number under `key` and one under `x`; band: keys of low and high."""
    whole = [row for row in rows if None not in [number(row.get(name)) for name in (x, key, *band)]]
    low, high = (column(whole, name) for name in band) if band else ([], [])
    return Series(label, column(whole, x), column(whole, key), low, high, style)


def spaced(rows: list[Any], most: int) -> list[Any]:
    """At most so many of the rows, with equal gaps between them."""
    return rows[:: max(1, math.ceil(len(rows) / most))]


def pass_at_chart(title: str, arms: Sequence[tuple[str, Arm]]) -> Chart:
    """pass@k of arms, each with the name that it is shown under, against k."""
    curves = []
    for style, (name, arm) in enumerate(arms):
        pairs = arm.interval.values() if arm.interval.keys() == arm.pass_at.keys() else ()
        low, high = ([pair[end] for pair in pairs] for end in (0, 1))
        curves.append(Series(name, [*arm.pass_at], [*arm.pass_at.values()], low, high, style))
    ks = sorted({k for _, arm in arms for k in arm.pass_at})
    return Chart("pass-at-k", title, "attempts per problem (k)", "problems solved", curves, True, ks)


def arms_section(run: Run) -> dict[str, Any]:
    """Table rows; pass rate and pass@k against the tokens that an arm took, its search included; pass@k against k."""
    # points on the way, and the evaluation, which an arm that is still trained has not
    events = [event for kind in ("curve", "evaluation") for event in run.events.get(kind, [])]
    spent = [(read_arm(str(e.get("arm")), e), tokens) for e in events if (tokens := number(e.get("total_tokens")))]
    ended = run.arms
    measured = ended.keys() | {reading.name for reading, _ in spent}
    names = [*(name for name in wording.ARMS if name in measured), *sorted(measured - wording.ARMS.keys())][:MAX_ARMS]
    arms = [ended.get(name, Arm(name, {}, {})) for name in names]  # all in every chart, so that an arm keeps its colour
    ks = sorted({k for arm in arms for k in arm.pass_at})
    charts, solved, x = [], "problems solved", "million generated tokens, search included"
    for k in dict.fromkeys([*ks[:1], *ks[-1:]]):
        points: dict[str, list[Row]] = {name: [] for name in names}
        for reading, tokens in spent:
            if reading.name in points:
                ends = dict(zip(("low", "high"), reading.interval.get(k, ()), strict=False))
                points[reading.name].append({"x": tokens / 1e6, "y": reading.pass_at.get(k), **ends})
        curves = []
        for style, (name, rows) in enumerate(points.items()):
            band = ("low", "high") if rows and "low" in rows[-1] else ()
            curves.append(line(wording.arm_name(name), rows, "y", style, "x", band))
        rules = [(arm.pass_at[k], wording.arm_name("base")) for arm in arms if arm.name == "base" and k in arm.pass_at]
        title = f"{'Pass rate' if k == 1 else f'pass@{k}'} against total tokens"
        charts.append(Chart(f"tokens-{k}", title, x, solved, curves, True, rules=rules))
    charts.append(pass_at_chart("pass@k on the held-out problems", [(wording.arm_name(arm.name), arm) for arm in arms]))
    steps = max((count(event.get("step")) or 0 for event in run.events.get("arm_step", [])), default=-1) + 1
    shown = {"rows": [arm for arm in arms if arm.pass_at], "ks": spaced(ks, MAX_KS), "of": (len(ended), len(ks))}
    return {**shown, "charts": [chart for chart in charts if chart], "steps": steps}


def step_rows(run: Run) -> list[Row]:
    """One row per outer step with the figures of its table and charts. Shares and rewards as in metrics.jsonl."""
    names = ("window_mean", "baseline_pass_rate", "best_pass_rate", "accepted", "sampled", "failed_students", "seconds")
    labels, shares, rows = ("well_posed", "correct"), dict[Any, float | None](), list[Row]()
    for of, questions in run.written.items():
        for label in labels:  # the share of the questions with such a label in which it is true
            shares[of, label] = mean([row[label] for row in questions if isinstance(row.get(label), bool)])
    for event in run.steps:
        rewards, step = numbers(event.get("reward_G")), count(event.get("step"))
        centre, error = number(event.get("reward_mean")), standard_error(rewards)
        row: Row = {key: number(event.get(key)) for key in (*names, "teacher_kl", "vendi", "distinct_share")}
        row |= {"step": step, "mean": centre, "error": error, "best": max(rewards, default=centre)}
        row["accepted_share"] = (row["accepted"] or 0.0) / row["sampled"] if row["sampled"] else None
        row["low"], row["high"] = (None if centre is None else centre + sign * (error or 0) for sign in (-1, 1))
        row |= {label: shares.get((step, label)) for label in labels}
        rows.append({**row, "promoted": event.get("promoted") is True, "reason": event.get("reason") or ""})
    return rows


def loop_section(run: Run) -> dict[str, Any]:
    """The outer loop: teacher reward, promotions, pass rates, and how the questions changed, over steps."""
    rows, tau = step_rows(run), run.setting("promotion", "tau")
    marks = [float(row["step"]) for row in rows if row["promoted"]]
    rules = [] if tau is None else [(tau, f"\u03c4 = {tau:g}")]
    repeats, sets = count(run.setting("student", "repeats")) or 0, list[list[tuple[float, float]]]()
    rejected: Counter[str] = Counter()
    for event in run.steps:
        rejected.update({reason: max(0, count(n) or 0) for reason, n in mapping(event.get("rejected")).items()})
        rewards, errors = (x if isinstance(x := event.get(key), list) else [] for key in ("reward_G", "reward_se_G"))
        pairs = map(numbers, zip(rewards, errors, strict=False))
        sets.append([(pair[0], pair[1]) for pair in pairs if len(pair) == 2])
    own: dict[str, Row] = {"reward": {"marks": marks, "rules": rules}, "rates": {"marks": marks}}
    likelihood = mapping(run.config.get("reward")).get("mode") in DENSE
    if likelihood:
        own["rates"] |= {"title": "Right answers of reward questions", "y_label": "mean likelihood"}
    charts = []
    for key, words in STEP_CHARTS.items():
        series = [line(rows=rows, **entry) for entry in words["series"]]
        charts.append(Chart(key, x_label="outer step", **{**words, "series": series, **own.get(key, {})}))
    return {
        "rows": rows[-MAX_STEPS_SHOWN:],
        "changes": wording.changes(rows),
        "left_out": max(0, len(rows) - MAX_STEPS_SHOWN),
        "charts": [chart for chart in charts if chart],
        "likelihood": likelihood,
        "apart": told_apart(sets, repeats),
        "alone": repeats == 1 and mapping(run.config.get("teacher")).get("reward") == "grounded",
        "rejected": [(reason, n) for reason, n in rejected.most_common() if n],
        "accepted": int(sum(column(rows, "accepted"))),
        "sampled": int(sum(column(rows, "sampled"))),
    }


def written_section(run: Run) -> list[tuple[int, list[tuple[str, float, list[Row]]]]]:
    """(outer step, `text.extremes`) of up to four outer steps, three questions of each dataset."""
    written = run.written
    steps = dict.fromkeys([*written][i * (len(written) - 1) // 3] for i in range(4) if written)
    ends = ((step, wording.extremes(written[step])) for step in steps)
    return [(step, [(name, reward, rows[:3]) for name, reward, rows in some]) for step, some in ends]


def questions_section(rows: list[Row]) -> dict[str, Any]:
    """The embedded rows of a question file, with equal gaps between them, and which labels they have."""
    shown = spaced(rows, MAX_QUESTIONS)
    fields = [k for k in ("topic", "well_posed", "correct") if any(row.get(k) is not None for row in shown)]
    return {"rows": shown, "total": len(rows), "fields": fields}


def place(row: Row) -> str:
    """Who wrote a completion, and when: `student, outer step 3, RLOO step 0`."""
    steps = [(name, count(row.get(key))) for key, name in (("step", "outer step"), ("rloo_step", "RLOO step"))]
    return ", ".join([str(row.get("by"))[:40], *(f"{name} {step}" for name, step in steps if step is not None)])


def rollouts_section(run: Run) -> dict[str, Any]:
    """Outcomes in the order of OUTCOMES, then of teacher texts: number, meaning, and completions spaced evenly."""
    folded: dict[str, list[Row]] = {outcome: [] for outcome in OUTCOMES}
    for row in run.rollouts:
        folded.setdefault("teacher: " * (row.get("kind") == "teacher") + str(row.get("outcome"))[:40], []).append(row)
    groups = []
    for outcome, rows in ((outcome, rows) for outcome, rows in folded.items() if rows):
        kinds = Counter(KINDS.get(str(row.get("kind")), "other") for row in rows)
        title = f"{outcome} ({', '.join(f'{kind} {number:,}' for kind, number in kinds.items())})"
        shown = []
        for row in spaced(rows, MAX_COMPLETIONS):
            texts = {key: clipped(str(row.get(key) or ""), 300, 900) for key in ("question", "answer", "completion")}
            shown.append({"place": place(row), **texts})
        groups.append({"title": title, "meaning": OUTCOMES.get(outcome, ("", ""))[1], "rows": shown})
    return {"groups": groups, "total": len(run.rollouts)}


def content(run: Run) -> dict[str, Any]:
    """Everything that the page shows, by section."""
    wall = run.summary.get("wall_seconds")
    times = [(name, seconds) for name, value in mapping(wall).items() if (seconds := number(value)) is not None]
    command = run.manifest.get("command")
    return {
        "run": run,
        "arms": arms_section(run),
        "outer": loop_section(run),
        "written": written_section(run),
        "questions": questions_section(run.questions),
        "pq": questions_section(run.pq),
        "kept": rollouts_section(run),
        "phases": times,
        "wall_seconds": math.fsum(seconds for _, seconds in times) if isinstance(wall, dict) else None,
        "command": shell_words(*command) if isinstance(command, list) else command,
        "rollouts": max(column(run.steps, "student_rollouts"), default=None),
    }


def render(template: str, values: dict[str, Any]) -> str:
    """A page of `templates` with these values, the style and the script in it, as HTML text."""
    own: dict[str, Any] = {"wording": wording, "version": VERSION}
    for name, file in (("style", "report.css"), ("script", "report.js")):
        text = (TEMPLATES / file).read_text(encoding="utf-8")
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        own |= {name: Markup(text), f"{name}_hash": f"sha256-{digest}"}
    return wording.fill(template, **values, **own)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page whole to `out` (None: report.html in the run folder); returns where. Raises ReportError, OSError."""
    html, target = render("report.html", content(read_run(run_dir))), out or run_dir / "report.html"
    write_atomic(target, html.encode())
    return target


def report_at_the_end(run_dir: Path, say: Callable[[str], None]) -> None:
    """`write_report`; what hinders it is told to `say`: hours of work must not end in a traceback. Raises OSError alone."""
    try:
        write_report(run_dir)
    except OSError:
        raise
    except Exception as error:  # whatever it is: the run's results are written and do not depend on the page
        why = f"({type(error).__name__}: {error}); everything else of the run is saved"
        advice = f"Another version may make it: soar report {shell_words(run_dir)}"
        say(f"report.html could not be made {why}. {advice}")
