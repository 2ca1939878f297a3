"""A run as it goes: the lines of `soar run`, the view of `soar watch`, and its page on this machine. Needs no torch.

Nothing is asked of the process that runs: its folder is read again and again, from any machine with the same disk. What a
model or a foreign folder says stays as it is until `terminal_text`.
"""

import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from soar.files import Row, clipped, visible
from soar.report import page as pages
from soar.report import text as wording
from soar.report.runs import Run, count, number, numbers, read_run, standard_error
from soar.types import UserError

FRESH_SECONDS = 10  # between two pages of a run at work
HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
}  # fmt: skip
MAX_TEXT = 300
ASCII = dict(zip("±τ−–→\u00a0«»…⟨⟩", ["+-", "tau", *"-->", " ", '"', '"', "...", *"<>"], strict=True))


def terminal_text(text: str, console: Console, style: str = "") -> Text:
    """The one place where text meets a terminal: what could move its cursor, reorder or hide text is made visible.

    For terminals that know ASCII alone everything else is escaped.
    """
    text = visible(text)
    if console.options.ascii_only:
        text = "".join(ASCII.get(c, c) for c in text).encode("ascii", "backslashreplace").decode()
    return Text(text, style=style)


def one_line(text: object, limit: int = MAX_TEXT) -> str:
    """Text that a model wrote, on one line, at most `limit` characters."""
    shown = " ".join(str(text)[: 4 * limit].split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def signed(value: object) -> str:
    """`+0.0123`; a dash for what is no number."""
    size = number(value)
    return wording.DASH if size is None else f"{size:+.4f}"


def step_lines(events: Sequence[Row], rows: Sequence[Row] = (), width: int = 118) -> list[str]:
    """One outer step as lines: its figures, the best and worst question, cut to `width`, its promotion, its alarms."""
    step = events[0]
    vendi, error = number(step.get("vendi")), standard_error(numbers(step.get("reward_G")))
    best = max(numbers(step.get("reward_G")), default=None)
    figures = [
        f"step {count(step.get('step')) or 0:3d}",
        f"reward {signed(step.get('reward_mean'))}{'' if error is None else f' ± {error:.4f}'} (best {signed(best)})",
        f"baseline {wording.decimal(step.get('baseline_pass_rate'))}",
        f"accepted {wording.whole(step.get('accepted'))}/{wording.whole(step.get('sampled'))}",
        f"distinct {number(step.get('distinct_share')) or 0:.2f}",
        *([] if vendi is None else [f"as diverse as {vendi:.1f}"]),
    ]
    lines = ["  ".join(figures)]
    limit = max(30, width - 30)
    for name, reward, (row, *_) in wording.extremes(rows):
        question, answer = one_line(row.get("question", ""), limit), one_line(row.get("answer", ""), limit // 3)
        lines.append(f"  {name:8s} {signed(reward)}  «{question}» {answer}")
    return lines + [f"  {_event_line(event)}" for event in events[1:] if event.get("event") in ("promotion", "alarm")]


def _event_line(event: Row) -> str:
    if event.get("event") == "alarm":
        return f"alarm: {one_line(event.get('kind'))}: {one_line(event.get('message'))}"
    rates = [wording.decimal(event.get(key)) for key in ("baseline_pass_rate", "pass_rate")]
    return f"promoted dataset {count(event.get('dataset'))}: pass rate {' → '.join(rates)}"


def view_lines(run: Run, age: float = 0.0) -> Iterator[tuple[str, str]]:
    """The view as (text, style), top to bottom. age: seconds since metrics.jsonl was written, 0: not shown."""
    state = "finished" if run.finished else "paused" if run.paused else "at work"
    written = f", last written {wording.duration(age)} ago" if age and state == "at work" else ""
    yield f"{one_line(run.name)}: {state}{written}", "bold"
    if run.paused and not run.finished:
        yield f"paused: {one_line(run.paused.get('reason'))}", "bold yellow"
        yield f"continue with: {one_line(run.paused.get('resume'))}", "yellow"
    if line := wording.now_line(run):
        yield one_line(line), ""
    for screen in run.events.get("screen", [])[-1:]:
        hard, candidates = (wording.whole(screen.get(key)) for key in ("hard", "candidates"))
        yield f"{hard} of {candidates} candidates are hard", ""
    if run.steps:
        total, step = run.setting("teacher", "steps"), run.steps[-1]["step"]
        done = f"{len(run.steps)}{'' if total is None else f' of {total:.0f}'} outer steps done"
        yield f"{done}, {wording.plural(len(run.promotions), 'promotion')}", ""
        events = [run.steps[-1], *(event for event in run.promotions if event["step"] == step)]
        yield from ((text, "") for text in step_lines(events, run.written.get(step, [])))
    if run.rollouts:
        last = [row for row in run.rollouts if pages.place(row) == pages.place(run.rollouts[-1])]
        outcomes = Counter(one_line(row.get("outcome"), 40) for row in last)
        told = ", ".join(f"{outcome} {number}" for outcome, number in outcomes.items())
        yield f"completions kept last ({one_line(pages.place(last[-1]))}): {told}", ""
        row = next((row for row in reversed(last) if row.get("outcome") != "right"), last[-1])
        shown = one_line(clipped(str(row.get("completion")), 60, 120))
        yield f"  {one_line(row.get('outcome'), 40)}, gold {one_line(row.get('answer'), 40)}: «{shown}»", ""
    yield from ((_event_line(event), "bold red") for event in run.events.get("alarm", [])[-2:])
    yield from ((one_line(wording.held_out(measured)), "") for measured in run.arms.values())
    if run.finished:
        yield wording.headline(run), "bold"


def follow(path: Path, console: Console, every: float = 2.0, once: bool = False) -> None:
    """Show a run until it is finished or paused: a live view on a terminal, elsewhere the view now and at the end.

    Reading takes a fiftieth of the time at most. Raises ReportError when `path` holds no run.
    """
    metrics, began = path / "metrics.jsonl", time.monotonic()
    run = read_run(path)

    def view() -> RenderableType:
        age = max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else 0.0
        return Group(*(terminal_text(text, console, style) for text, style in view_lines(run, age)))

    if not console.is_terminal and not once:
        console.print(view())
    with Live(view(), console=console, auto_refresh=False) as live:
        live.refresh()
        while not (once or run.finished or run.paused):
            time.sleep(max(every, 50 * (time.monotonic() - began)))
            began = time.monotonic()
            run = read_run(path)
            live.update(view(), refresh=True)


def web_server(path: Path, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server for the page of the run in `path` on a loopback port (0: a free one), and the page's random address.

    Read only. A page of somebody else in the same browser learns nothing: it does not know the address, and a host name that
    it points here is refused by its Host header. Raises ReportError where there is no run, UserError for a port that is taken
    or is none.
    """
    secret, lock = f"/{secrets.token_urlsafe(24)}/", threading.Lock()
    read_run(path)

    @lru_cache(maxsize=1)
    def page(turn: float) -> tuple[bytes, dict[str, str]]:
        """The page and its own headers, drawn once for everybody who asks in a turn of FRESH_SECONDS."""
        run = read_run(path)
        refresh = {} if run.finished or run.paused else {"Refresh": f"{FRESH_SECONDS}"}
        return pages.render("report.html", pages.content(run)).encode(), refresh

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # of a client that says nothing

        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                return self.send_error(403)
            if not secrets.compare_digest(self.path.encode(), secret.encode()):
                return self.send_error(404)
            try:
                with lock:
                    text, refresh = page(time.monotonic() // FRESH_SECONDS)
            except UserError:  # the folder was moved away
                return self.send_error(503)
            self.send_response(200)
            for name, value in {**HEADERS, **refresh, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
            return None

        def log_message(self, *args: object) -> None:
            """Nothing: the address is a secret."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be had: {error}; give another, or 0 for a free one") from error
    return server, f"http://127.0.0.1:{server.server_port}{secret}"
