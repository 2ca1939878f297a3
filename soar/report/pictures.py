"""The charts of a report as files: SVG by themselves, PNG through resvg. Needs no torch.

A chart of the page takes its colours from the page's style sheet; a file has to carry them, so the light theme is written
into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from soar.files import write_atomic
from soar.report.page import TEMPLATES, content
from soar.report.runs import read_run
from soar.types import UserError

FONT = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
PNG_ZOOM = 3  # 400 units wide: 1,200 pixels


class PictureError(UserError):
    """PNG was asked for without the library that draws it."""


def chart_style() -> str:
    """The rules of the page's style sheet that charts use, in the light theme's colours."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    root = re.search(r":root \{.*?\}", style, re.DOTALL)
    colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", root.group() if root else ""))
    before_media = style.split("@media (max-width")[0]
    rules = re.findall(r"^\.(?:chart (?!\{)|grid|line|band|mark|c\d).*$", before_media, re.MULTILINE)
    text = "\n".join([f"text {{ font: 12px {FONT}; }}", *rules])
    return re.sub(r"var\((--[\w-]+)\)", lambda match: colours[match.group(1)], text)


def standalone(chart: str) -> str:
    """A chart of the page as an SVG document of its own."""
    match = re.match(r'<svg class="chart" viewBox="0 0 ([\d.]+) ([\d.]+)"', chart)
    assert match is not None, "every chart begins so (figures._svg)"
    width, height = match.groups()
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    body = chart.replace("<svg ", head, 1)
    end = body.index(">") + 1
    ground = f'<style>{chart_style()}</style><rect width="{width}" height="{height}" fill="#ffffff"/>'
    return body[:end] + ground + body[end:] + "\n"


def charts(values: dict[str, Any]) -> dict[str, str]:
    """Name -> chart, of everything in the page's content that is one."""
    found = {}
    for section in values.values():
        for chart in section.values() if isinstance(section, dict) else ():
            if isinstance(chart, str) and (key := re.search(r'aria-labelledby="([\w-]+)-t ', chart)):
                found[key.group(1)] = str(chart)
    return found


def write_pictures(run_dir: Path, out: Path, png: bool = False) -> list[Path]:
    """Write every chart of a run's report into the folder `out`; returns the files.

    Raises ReportError for no run folder, PictureError for png=True without resvg.
    """
    files: dict[Path, bytes] = {}
    for name, chart in charts(content(read_run(run_dir))).items():
        svg = standalone(chart)
        files[out / f"{name}.svg"] = svg.encode()
        if png:
            files[out / f"{name}.png"] = _png(svg)
    for path, data in files.items():
        write_atomic(path, data)
    return list(files)


def _png(svg: str) -> bytes:
    try:
        import resvg_py
    except ImportError as error:
        raise PictureError("--png needs resvg: pip install 'soar-rl[report]'; SVG needs nothing") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=PNG_ZOOM, sans_serif_family="DejaVu Sans"))
