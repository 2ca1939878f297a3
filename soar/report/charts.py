"""A chart as data, drawn by matplotlib when it is shown: as SVG within a page or as a file of its own. Needs no torch.

Within a page text and lines take the page's colour, and the colours of series read on light and on dark ground. Series differ
by marker and dash as well as by colour. Every number of a chart stands in a table of its page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from soar.files import visible

COLOURS = ("#7a828c", "#d9691e", "#3b82d6", "#1f9e74", "#a45fd0", "#b08d12", "#d64b77", "#1b99a8")
DASHES = ("-", (0, (6, 2)), "-", (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (4, 3)), (0, (1, 3)), (0, (10, 3)))
MARKERS = "os^Dvph*"
STYLES = len(COLOURS)
INK = "#1d2126"  # becomes the page's own text colour within a page
MAX_LABEL = 48
LOOK: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a name with $ is a name
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.labelpad": 10,  # a page's font may be wider than the one that the place was measured with
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.2,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color", "grid.color"), INK
    ),
}


@dataclass(frozen=True)
class Series:
    """One line of a chart, or all its bars. x, y: equally long; low, high: band around y.

    label: "" is left out of the legend. style: index of colour, dash and marker, counted round.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """Series and what a chart says besides them; false when there is nothing to draw.

    key: unique in the page. percent: y is a share, shown in per cent. ticks: values of x on a log2 scale, else a linear one.
    names: of bars, which the one series then is. rules: (y, label) of horizontal lines. marks: x of vertical ones.
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

    def drawn(self, **options: Any) -> bytes:
        """The chart as SVG; the same data gives the same bytes."""
        import matplotlib

        buffer = io.BytesIO()
        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that the font lacks
            matplotlib.rcdefaults()
            matplotlib.rcParams.update({**LOOK, "svg.hashsalt": self.key})
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            _figure(self).savefig(buffer, format="svg", metadata=metadata, **options)
        return buffer.getvalue()

    def svg(self) -> Markup:
        """The chart as an element of a page whose content policy allows no style attributes."""
        text = self.drawn(transparent=True).decode()
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<g ") :], flags=re.DOTALL)
        text = re.sub(r"<[^<>]*>", _plain_tag, re.sub(r"\s*\n\s*", " ", text)).replace(INK, "currentColor")
        head = Markup(
            '<svg class="chart" viewBox="0 0 {w:g} {h:g}" role="img" aria-labelledby="{k}-t {k}-d">'
            '<title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>'
        ).format(w=72 * 5.6, h=72 * _height(self), k=self.key, t=visible(self.title), d=visible(self.description))
        return head + Markup(text)


def _plain_tag(tag: re.Match[str]) -> str:
    """A tag of matplotlib with style as attributes, without fonts and without the names that repeat in every chart."""
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", tag.group())

    def attributes(style: re.Match[str]) -> str:
        pairs = [part.split(":", 1) for part in style.group(1).split(";") if ":" in part]
        return " ".join(f'{key.strip()}="{value.strip()}"' for key, value in pairs if key.strip() != "font-family")

    return re.sub(r'style="([^"]*)"', attributes, text)


def label_of(text: str) -> str:
    """A name on one line, not too long, and never one that matplotlib would leave out of a legend."""
    line = " ".join(visible(text).split())
    line = line if len(line) <= MAX_LABEL else f"{line[: MAX_LABEL - 1]}\u2026"
    return f"\u200a{line}" if line.startswith("_") else line


def _legend(chart: Chart) -> tuple[list[str], int]:
    """Labels of series, rules and marks (empty ones are left out of the legend), and the columns that they stand in."""
    labels = [s.label for s in chart.series if len(s.x)] + [label for _, label in chart.rules]
    labels = list(map(label_of, [*labels, *([chart.mark_label] if chart.marks else [])]))
    return labels, 1 if max(map(len, labels), default=0) > 24 else 2


def _height(chart: Chart) -> float:
    """Inches: a legend of many lines makes a chart higher, not its plot lower."""
    labels, columns = _legend(chart)
    return round(3.5 + 0.22 * math.ceil(sum(map(bool, labels)) / columns), 2)


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
    axes.set_ylim(0 if min(values) >= 0 else low, max(high, 0))
    if chart.percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}\u00a0%".replace("-", "\u2212"))
    labels, columns = _legend(chart)
    legend = [pair for pair in zip(handles, labels, strict=True) if pair[1]]
    if legend:
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
        handles += axes.plot(
            series.x, series.y, color=colour, linestyle=DASHES[style], marker=marker, markersize=5, clip_on=False
        )
    if not chart.ticks or chart.ticks[0] < 1:
        whole = all(float(x).is_integer() for series in chart.series for x in series.x)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
        return handles
    shown = [k for k in chart.ticks if len(chart.ticks) <= 8 or k.bit_count() == 1]
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, list(map(str, shown)))
    axes.minorticks_off()
    return handles


def _draw_bars(axes: Any, chart: Chart) -> list[Any]:
    (series,) = chart.series
    axes.set_xticks(range(len(chart.names)), [label_of(name)[:16] for name in chart.names])
    return [axes.bar(series.x, series.y, 0.84, color=COLOURS[series.style % STYLES])]
