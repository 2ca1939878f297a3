"""A chart as data, drawn by matplotlib only when it is shown: as SVG within a page, or as a file of its own. Needs no torch.

Within a page the text and lines take the page's colour, and the colours of series read on light and on dark ground. Series
differ by marker and dash as well as by colour. Every number of a chart stands in a table of its page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from soar.files import visible

COLOURS = ("#7a828c", "#d9691e", "#3b82d6", "#1f9e74", "#a45fd0", "#b08d12", "#d64b77", "#1b99a8")
DASHES = ("-", (0, (6, 2)), "-", (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (4, 3)), (0, (1, 3)), (0, (10, 3)))
MARKERS = "os^Dvph*"
STYLES = len(COLOURS)
INK = "#1d2126"  # becomes the page's own text colour within a page
WIDTH = 340  # points between the ends of the x axis
CHARACTER = 6.2  # points of a digit
MAX_LABEL = 48
LOOK: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name with $ is a name
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.2,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color", "grid.color"), INK
    ),
}


@dataclass(frozen=True)
class Series:
    """One line of a chart, or one part of every bar. x, y: equally long; low, high: band around y; error: of error bars.

    label: "" is left out of the legend. style: index of colour, dash and marker, counted round.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    error: Sequence[float] = ()
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """Series and what a chart says besides them; false when there is nothing to draw.

    key: unique in the page. percent: y is a share, shown in per cent. ticks: values of x on a log2 scale, else a linear one.
    names: of bars, which the series are stacked to. rules: (y, label) of horizontal lines. marks: x of vertical ones.
    """

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    percent: bool = False
    ticks: Sequence[int] = ()
    names: Sequence[str] = ()
    rules: Sequence[tuple[float, str]] = ()
    marks: Sequence[float] = ()
    mark_label: str = ""

    def __bool__(self) -> bool:
        return any(len(series.x) for series in self.series)

    def drawn(self, form: str, **options: Any) -> bytes:
        """The chart as `svg` or `png`; the same data gives the same bytes."""
        buffer = io.BytesIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else {"Software": None}
        with _look(self.key):
            _figure(self).savefig(buffer, format=form, metadata=metadata, **options)
        return buffer.getvalue()

    def svg(self) -> Markup:
        """The chart as an element of a page whose content policy allows no style attributes."""
        text = self.drawn("svg", transparent=True).decode()
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<g ") :], flags=re.DOTALL)
        text = re.sub(r"<[^<>]*>", _plain_tag, re.sub(r"\s*\n\s*", " ", text)).replace(INK, "currentColor")
        height = 72 * _height(self)
        head = Markup(
            '<svg class="chart" viewBox="0 0 {w:g} {h:g}" role="img" aria-labelledby="{k}-t {k}-d">'
            '<title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>'
        ).format(w=72 * 5.6, h=height, k=self.key, t=visible(self.title), d=visible(self.description))
        return head + Markup(text)


def _plain_tag(tag: re.Match[str]) -> str:
    """A tag of matplotlib with style as attributes, without fonts and without the names that repeat in every chart."""
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", tag.group())

    def attributes(style: re.Match[str]) -> str:
        pairs = [part.split(":", 1) for part in style.group(1).split(";") if ":" in part]
        return " ".join(f'{key.strip()}="{value.strip()}"' for key, value in pairs if key.strip() != "font-family")

    return re.sub(r'style="([^"]*)"', attributes, text)


@contextmanager
def _look(key: str) -> Iterator[None]:
    """matplotlib as it is without anyone's settings, with LOOK, and without warnings of glyphs that its font lacks."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**LOOK, "svg.hashsalt": key})
        yield


def label_of(text: str) -> str:
    """A name on one line, not too long, and never one that matplotlib would leave out of a legend."""
    line = " ".join(visible(text).split())
    line = line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}\u2026"
    return f"\u200a{line}" if line.startswith("_") else line


def _labels(chart: Chart) -> list[str]:
    labels = [series.label for series in chart.series if len(series.x)] + [label for _, label in chart.rules]
    return list(map(label_of, [*labels, *([chart.mark_label] if chart.marks else [])]))


def _legend_columns(labels: Sequence[str]) -> int:
    return 1 if max(map(len, labels), default=0) > 24 else 2


def _height(chart: Chart) -> float:
    """Inches: a legend of many lines makes a chart higher, not its plot lower."""
    labels = list(filter(None, _labels(chart)))
    return round(3.5 + 0.22 * math.ceil(len(labels) / _legend_columns(labels)), 2)


def _figure(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, _height(chart)), layout="constrained")
    axes = figure.subplots()
    handles = _draw_bars(axes, chart) if chart.names else _draw_lines(axes, chart)
    handles += [axes.axhline(y, color=INK, linestyle="--", linewidth=1, alpha=0.7) for y, _ in chart.rules]
    handles += [axes.axvline(x, color=COLOURS[3], linestyle=":", linewidth=1.5) for x in chart.marks][:1]
    axes.set_xlabel(label_of(chart.x_label))
    axes.set_ylabel(label_of(chart.y_label))
    low, high = axes.get_ylim()
    values = [y for s in chart.series for y in (*s.y, *s.low, *s.high)] + [y for y, _ in chart.rules]
    axes.set_ylim(0 if min(values) >= 0 and not any(s.error for s in chart.series) else low, max(high, 0))
    if chart.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}\u00a0%".replace("-", "\u2212"))
    legend = [(handle, label) for handle, label in zip(handles, _labels(chart), strict=True) if label]
    if legend:
        columns = _legend_columns([label for _, label in legend])
        figure.legend(*zip(*legend, strict=True), loc="outside upper left", ncols=columns)
    return figure


def _draw_lines(axes: Any, chart: Chart) -> list[Any]:
    from matplotlib.ticker import MaxNLocator

    handles = []
    for series in (s for s in chart.series if len(s.x)):
        style = series.style % STYLES
        colour, marker = COLOURS[style], MARKERS[style] if len(series.x) <= 60 else None
        if len(series.low) == 1:
            axes.vlines(series.x, series.low, series.high, color=colour)
        elif series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0)
        if series.error:
            axes.errorbar(series.x, series.y, series.error, fmt="none", ecolor=colour, elinewidth=1.2)
        handles += axes.plot(
            series.x, series.y, color=colour, linestyle=DASHES[style], marker=marker, markersize=5, clip_on=False
        )
    if not chart.ticks or chart.ticks[0] < 1:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        return handles
    axes.set_xscale("log", base=2)
    nearest = math.log2(chart.ticks[-1] / chart.ticks[0]) / 12
    shown: list[int] = []
    for k in chart.ticks:
        if not shown or math.log2(k / shown[-1]) >= nearest:
            shown.append(k)
    axes.set_xticks(shown, list(map(str, shown)))
    axes.minorticks_off()
    return handles


def _draw_bars(axes: Any, chart: Chart) -> list[Any]:
    handles, bottom = [], [0.0] * len(chart.names)
    for series in chart.series:
        handles.append(axes.bar(series.x, series.y, 0.84, bottom=bottom, color=COLOURS[series.style % STYLES]))
        bottom = [below + y for below, y in zip(bottom, series.y, strict=True)]
    names = [label_of(name)[:16] for name in chart.names]
    every = math.ceil((CHARACTER * max(map(len, names)) + 6) * len(names) / WIDTH)
    axes.set_xticks(range(0, len(names), every), names[::every])
    return handles
