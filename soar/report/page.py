"""One self-contained HTML page about a run folder, finished or not. Needs no torch and no network.

The page holds its own style and a small script, and a content policy that allows nothing else, so text that a model
wrote can do nothing even if it were not escaped; it is escaped all the same (jinja2 autoescape), and characters that
hide or reorder text are made visible. Every figure can be recomputed from the files of the run folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from soar.files import visible, write_atomic
from soar.report import changes, sections
from soar.report import text as wording
from soar.report.runs import Run, number, numbers, read_run
from soar.types import VERSION

TEMPLATES = Path(__file__).parent.parent / "templates"
MAX_QUESTIONS = 600
MAX_PQ = 300
MAX_ALARMS = 200
MAX_TEXT = 1000  # characters of one question or answer


def shorten(text: object) -> str:
    """At most MAX_TEXT characters of a text, and how many were left out."""
    shown = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    left_out = len(shown) - MAX_TEXT
    return shown if left_out <= 0 else f"{shown[:MAX_TEXT]} \u2026 ({left_out:,} more characters)"


def attribute(value: object) -> str:
    """A number for a `data-` attribute that the script compares; empty for anything else."""
    known = number(value)
    return "" if known is None else f"{known:.12g}"


def verdict(value: object) -> str:
    """`yes`, `no`, or a dash for anything that is no truth value."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else wording.DASH


def mapping(value: object) -> dict[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def content(run: Run) -> dict[str, Any]:
    """Everything that the page shows, by section."""
    phases, wall_seconds = sections.phases(run)
    command = run.manifest.get("command")
    rollouts = numbers([row.get("student_rollouts") for row in run.steps])
    return {
        "run": run,
        "asked": wording.asked(run),
        "headline": wording.headline(run),
        "paused": wording.paused(run),
        "remarks": wording.remarks(run),
        "arms": sections.arms_section(run),
        "outer": sections.loop_section(run),
        "screening": sections.screening_section(run),
        "signal": sections.signal_section(run),
        "change": changes.change_section(run),
        "questions": sections.questions_section(run.questions, MAX_QUESTIONS),
        "pq": sections.questions_section(run.pq, MAX_PQ),
        "alarms": run.events.get("alarm", [])[:MAX_ALARMS],
        "alarm_total": len(run.events.get("alarm", [])),
        "phases": phases,
        "wall_seconds": wall_seconds,
        "command": shlex.join(map(str, command)) if isinstance(command, list) else command,
        "rollouts": max(rollouts, default=None),
        "version": VERSION,
    }


def style_hash(text: str) -> str:
    """Source expression of a content security policy for an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page(template: str, values: dict[str, Any]) -> str:
    """A template of `templates` with these values, the style and the script in it, as HTML text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda v: visible(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
    )
    environment.globals |= {"arm_meanings": wording.ARM_MEANINGS}
    filters = (
        wording.percent,
        wording.whole,
        wording.decimal,
        wording.duration,
        wording.arm_name,
        wording.moment,
        shorten,
        attribute,
        verdict,
    )
    environment.filters |= {f.__name__: f for f in filters}
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2, ensure_ascii=False)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return environment.get_template(template).render(
        **values,
        style=Markup(style),
        style_hash=style_hash(style),
        script=Markup(script),
        script_hash=style_hash(script),
    )


def render(run: Run) -> str:
    """The page of one run as HTML text."""
    return page("report.html", content(run))


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page to `out` (None: `report.html` in the run folder), replacing an older one in one step; returns its path.

    Raises ReportError when `run_dir` is no run folder, OSError when the page cannot be written.
    """
    html = render(read_run(run_dir))
    target = out or run_dir / "report.html"
    write_atomic(target, html.encode())
    return target


def report_at_the_end(run_dir: Path, say: Callable[[str], None]) -> None:
    """`write_report` of a run that ends: a page that cannot be made is told to `say`, and the run ends as it would.

    Hours of work must not end in a traceback because of a figure. Raises OSError as `write_report` does.
    """
    try:
        write_report(run_dir)
    except OSError:
        raise
    except Exception as error:  # whatever it is: the run's results are written and do not depend on the page
        say(
            f"report.html could not be made ({type(error).__name__}: {error}); everything else of the run is saved. "
            f"Another version may make it: soar report {shlex.quote(str(run_dir))}"
        )
