"""A chart as data, drawn by matplotlib when it is shown: an SVG image within a page. Needs no torch.

Series differ by marker and dash as well as by colour. Every number of a chart stands in a table of its page.
"""

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from soar.files import asset, visible

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
                axes.xaxis.set_major_locator(MaxNLocator(8, integer=all(float(x).is_integer() for x in xs)))
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
        """The chart as an SVG image for light and dark pages that allow images from `data:`.

        No script can run in it, and the same data gives the same bytes.
        """
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
    line = " ".join(visible(text).split())
    line = line if len(line) <= 48 else f"{line[:47]}\u2026"
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
