"""Small charts as inline SVG, and the display of text that a model wrote. Needs no torch and no plotting library.

Every text goes through `markupsafe`, so nothing in a label can become markup. A chart has a title and a description
for screen readers; colours come from the page's style sheet (classes `c0` ... `c7`), so one chart serves both themes.
Series differ by marker and dash as well as by colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from soar.files import visible

WIDTH, HEIGHT = 400, 270  # narrow, so that a phone shrinks the text little
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 44
LEGEND_LINE = 18
CHARACTER = 6.5  # mean width of a 13 px character (the largest in use), for laying out the legend
WIDE_CHARACTER = 8.3  # a digit of the widest font that a reader may have, for labels that must not touch
STYLES = 8
DASHES = ("", "7 3", "", "2 3", "9 3 2 3", "4 4", "1 4", "12 4")


@dataclass(frozen=True)
class Series:
    """One line of a chart. x, y: equally long; low, high: band around y; error: half-length of error bars.

    style: index of colour, dash and marker. notes: text shown when a point is pointed at.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    error: Sequence[float] = ()
    style: int = 0
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Axes:
    """What a chart says besides its data.

    key: unique in the page (ids are made of it). percent: y is a share, shown in per cent. log2: x on a log2 scale.
    lines: (y, label) of horizontal reference lines. marks: (x, label) of vertical ones, `mark_label` in the legend.
    """

    key: str
    title: str
    description: str
    x_label: str
    y_label: str
    percent: bool = False
    log2: bool = False
    lines: Sequence[tuple[float, str]] = ()
    marks: Sequence[tuple[float, str]] = ()
    mark_label: str = ""
    x_ticks: Sequence[float] = field(default_factory=tuple)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """About `target` round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high].

    A range too narrow for floating point to divide is widened upward.
    """
    if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-290):
        high = low + (abs(low) if abs(low) > 1e-280 else 1.0)
    step = 10 ** math.floor(math.log10((high - low) / target))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= target)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def tick_text(value: float, percent: bool) -> str:
    """A tick label: at most four digits, per cent where the axis is a share."""
    shown = f"{value * 100 if percent else value:.4g}".replace("-", "\u2212")
    return f"{shown}\u00a0%" if percent else shown


class _Frame:
    """Pixel coordinates of a chart: x and y in data units to SVG units."""

    def __init__(self, axes: Axes, x_range: tuple[float, float], y_values: Sequence[float], legend: int) -> None:
        self.axes = axes
        self.y_ticks = nice_ticks(min(0.0, *y_values), max(0.0, *y_values))
        self.y_low, self.y_high = self.y_ticks[0], self.y_ticks[-1]
        self.x_low, self.x_high = x_range
        self.top = TOP + LEGEND_LINE * legend
        self.height = HEIGHT + LEGEND_LINE * legend
        self.bottom = self.height - BOTTOM

    def x(self, value: float) -> float:
        low, high = self.x_low, self.x_high
        if self.axes.log2:
            value, low, high = math.log2(value), math.log2(low), math.log2(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def draw_axes(self, x_ticks: Sequence[tuple[float, str]]) -> list[Markup]:
        """Grid, tick labels and axis names; x_ticks are (pixel, label)."""
        parts = []
        for value in self.y_ticks:
            y = self.y(value)
            line = '<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            parts.append(Markup(line).format("zero" if value == 0 else "grid", LEFT, WIDTH - RIGHT, y, y))
            parts.append(_text(LEFT - 6, y + 4, tick_text(value, self.axes.percent), "end"))
        parts += [_text(x, self.bottom + 16, label, "middle") for x, label in x_ticks]
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, self.height - 6, self.axes.x_label, "middle", "name"))
        middle = (self.top + self.bottom) / 2
        turned = '<text class="name" text-anchor="middle" transform="translate(13 {}) rotate(-90)">{}</text>'
        parts.append(Markup(turned).format(middle, visible(self.axes.y_label)))
        return parts


def _text(x: float, y: float, text: str, anchor: str = "start", style: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        style, x, y, anchor, visible(text)
    )


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in pairs)


def _marker(style: int, x: float, y: float, note: str = "") -> Markup:
    r = 3.5
    shapes = (
        f'<circle class="c{style} dot" cx="{x}" cy="{y}" r="{r}">',
        f'<rect class="c{style} dot" x="{x - r}" y="{y - r}" width="{2 * r}" height="{2 * r}">',
        f'<polygon class="c{style} dot" points="{x},{y - 4.5} {x + 4.5},{y + r} {x - 4.5},{y + r}">',
        f'<polygon class="c{style} dot" points="{x},{y - 4.8} {x + 4.8},{y} {x},{y + 4.8} {x - 4.8},{y}">',
    )
    shape = shapes[style % len(shapes)]
    name = shape[1:].split(" ", 1)[0]
    title = Markup("<title>{}</title>").format(visible(note)) if note else Markup("")
    return Markup(shape) + title + Markup(f"</{name}>")


def _legend(entries: Sequence[tuple[Markup, str]]) -> tuple[list[Markup], int]:
    """Legend rows above the plot, wrapped to the width, and how many rows there are."""
    parts: list[Markup] = []
    start = 10.0
    x, row = start, 0
    for swatch, label in entries:
        width = 30 + CHARACTER * len(label) + 14
        if x > start and x + width > WIDTH:
            x, row = start, row + 1
        y = TOP + LEGEND_LINE * row
        group = Markup('<g transform="translate({} {})">{}{}</g>')
        parts.append(group.format(x, y, swatch, _text(30, 4, label)))
        x += width
    return parts, row + 1 if entries else 0


def _line_swatch(series: Series) -> Markup:
    line = Markup('<line class="c{0} line" x1="0" x2="24" y1="0" y2="0" stroke-dasharray="{1}"/>')
    return line.format(series.style, DASHES[series.style % STYLES]) + _marker(series.style, 12, 0)


def _draw_series(frame: _Frame, series: Series) -> list[Markup]:
    style = series.style % STYLES
    pixels = [(frame.x(x), frame.y(y)) for x, y in zip(series.x, series.y, strict=True)]
    parts = []
    if series.low:
        upper = [(frame.x(x), frame.y(y)) for x, y in zip(series.x, series.high, strict=True)]
        lower = [(frame.x(x), frame.y(y)) for x, y in zip(series.x, series.low, strict=True)]
        if len(upper) == 1:
            bar = '<line class="c{} bar" x1="{}" x2="{}" y1="{}" y2="{}"/>'
            parts.append(Markup(bar).format(style, upper[0][0], upper[0][0], lower[0][1], upper[0][1]))
        band = Markup('<polygon class="c{} band" points="{}"/>')
        parts.append(band.format(style, _points(upper + lower[::-1])))
    for x, y, e in zip(series.x, series.y, series.error, strict=False):
        bar = Markup('<line class="c{} bar" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(bar.format(style, frame.x(x), frame.x(x), frame.y(y - e), frame.y(y + e)))
    line = Markup('<polyline class="c{} line" points="{}" stroke-dasharray="{}"/>')
    parts.append(line.format(style, _points(pixels), DASHES[style]))
    if len(pixels) <= 60 or series.notes:
        for i, (x, y) in enumerate(pixels):
            parts.append(_marker(style, x, y, series.notes[i] if series.notes else ""))
    return parts


def _svg(axes: Axes, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup(
        '<svg class="chart" viewBox="0 0 {w} {h}" role="img" aria-labelledby="{k}-t {k}-d">'
        '<title id="{k}-t">{t}</title><desc id="{k}-d">{d}</desc>'
    ).format(w=WIDTH, h=height, k=axes.key, t=visible(axes.title), d=visible(axes.description))
    return head + Markup("").join(parts) + Markup("</svg>")


def line_chart(axes: Axes, series: Sequence[Series]) -> Markup:
    """Lines with optional bands and error bars. Empty markup when there is no point to draw."""
    series = [s for s in series if len(s.x)]
    if not series:
        return Markup("")
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for y in (*s.y, *s.low, *s.high)]
    ys += [y + sign * e for s in series for y, e in zip(s.y, s.error, strict=False) for sign in (-1, 1)]
    ys += [y for y, _ in axes.lines]
    entries = [(_line_swatch(s), s.label) for s in series]
    entries += [(Markup('<line class="rule" x1="0" x2="24" y1="0" y2="0"/>'), label) for _, label in axes.lines]
    if axes.marks:
        entries.append((Markup('<line class="mark" x1="12" x2="12" y1="-7" y2="6"/>'), axes.mark_label))
    legend, rows = _legend(entries)
    frame = _Frame(axes, (min(xs), max(xs)), ys, rows)
    ticks = list(axes.x_ticks) or [t for t in nice_ticks(min(xs), max(xs), 8) if t == int(t)]
    inside = [t for t in ticks if frame.x_low <= t <= frame.x_high]
    parts = legend + frame.draw_axes([(frame.x(t), f"{t:g}") for t in inside])
    for x, note in axes.marks:
        mark = Markup('<line class="mark" x1="{0}" x2="{0}" y1="{1}" y2="{2}"><title>{3}</title></line>')
        parts.append(mark.format(frame.x(x), frame.top, frame.bottom, visible(note)))
    for y, _ in axes.lines:
        rule = Markup('<line class="rule" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(rule.format(LEFT, WIDTH - RIGHT, frame.y(y), frame.y(y)))
    for s in series:
        parts += _draw_series(frame, s)
    return _svg(axes, frame.height, parts)


def bar_chart(axes: Axes, names: Sequence[str], stacks: Sequence[Series]) -> Markup:
    """Stacked bars, one per name; the y of each series are its part of every bar. Values must not be negative."""
    if not names or not stacks:
        return Markup("")
    totals = [sum(s.y[i] for s in stacks) for i in range(len(names))]
    swatch = Markup('<rect class="c{} fill" x="4" y="-6" width="16" height="11"/>')
    legend, rows = _legend([(swatch.format(s.style), s.label) for s in stacks] if len(stacks) > 1 else [])
    frame = _Frame(axes, (-0.5, len(names) - 0.5), totals, rows)
    slot = (WIDTH - LEFT - RIGHT) / len(names)
    longest = max(map(len, names))
    every = max(1, math.ceil((WIDE_CHARACTER * longest + 6) / slot))
    shown = [(frame.x(i), name) for i, name in enumerate(names) if i % every == 0]
    parts = legend + frame.draw_axes(shown)
    for i, name in enumerate(names):
        base = 0.0
        for s in stacks:
            if s.y[i] > 0:
                top, bottom = frame.y(base + s.y[i]), frame.y(base)
                rect = Markup('<rect class="c{} fill" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
                note = s.notes[i] if s.notes else f"{s.label} {name}: {tick_text(s.y[i], axes.percent)}"
                x = round(frame.x(i) - slot * 0.42, 1)
                size = (round(slot * 0.84, 1), round(max(bottom - top, 0.6), 1))
                parts.append(rect.format(s.style % STYLES, x, top, *size, visible(note)))
                base += s.y[i]
    return _svg(axes, frame.height, parts)
