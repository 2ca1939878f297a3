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
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from soar.files import Row, clipped, visible
from soar.report import page as pages
from soar.report import text as wording
from soar.report.runs import Run, numbers, read_run
from soar.types import UserError, standard_error

FRESH_SECONDS = 10  # between two pages of a run at work
HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
}  # fmt: skip
ASCII = str.maketrans({"±": "+-", "τ": "tau", "…": "..."}) | str.maketrans("−–→\u00a0«»⟨⟩", '--> ""<>')


def terminal_text(text: str, console: Console, style: str = "") -> Text:
    """The one place where text meets a terminal: what could move its cursor, reorder or hide text is made visible."""
    text = visible(text)
    if console.options.ascii_only:  # what it has no letters for is escaped
        text = text.translate(ASCII).encode("ascii", "backslashreplace").decode()
    return Text(text, style=style)


def step_lines(events: Sequence[Row], rows: Sequence[Row] = (), width: int = 118) -> list[str]:
    """One outer step as lines: its figures, the best and worst question, cut to `width`, its promotion, its alarms."""
    step, *others = events
    rewards = numbers(step.get("reward_G"))
    figures = {"error": standard_error(rewards), "best": max(rewards, default=None), "ends": wording.extremes(rows)}
    return wording.fill("step.txt", step=step, events=others, limit=max(30, width - 30), **figures).split("\n")


def view_lines(run: Run, age: float = 0.0) -> Iterator[tuple[str, str]]:
    """The view as (text, style), top to bottom. age: seconds since metrics.jsonl was written, 0: not shown."""
    shown = dict[str, Any]()
    if run.steps:
        step = run.steps[-1]["step"]
        events = [run.steps[-1], *(event for event in run.promotions if event["step"] == step)]
        shown["lines"] = step_lines(events, run.written.get(step, []))
    last = [row for row in run.rollouts if pages.place(row) == pages.place(run.rollouts[-1])]
    if last:
        row = next((row for row in reversed(last) if row.get("outcome") != "right"), last[-1])
        outcomes = Counter(wording.one_line(row.get("outcome"), 40) for row in last)
        shown |= {"shown": row, "outcomes": outcomes, "place": pages.place(row)}
        shown["completion"] = clipped(str(row.get("completion")), 60, 120)
    for line in wording.fill("watch.txt", run=run, wording=wording, age=age, last=last, **shown).split("\n"):
        style, _, text = line.partition("\t")
        yield text, style


def follow(path: Path, console: Console, every: float = 2.0, once: bool = False) -> None:
    """Show a run while it is at work: live on a terminal, elsewhere the view now and at the end. Raises ReportError."""
    metrics, began = path / "metrics.jsonl", time.monotonic()
    run = read_run(path)

    def view() -> RenderableType:
        age = max(0.0, time.time() - metrics.stat().st_mtime) if metrics.is_file() else 0.0
        return Group(*(terminal_text(text, console, style) for text, style in view_lines(run, age)))

    if run.state == "at work" and not (console.is_terminal or once):
        console.print(view())
    with Live(view(), console=console, auto_refresh=False) as live:
        live.refresh()
        while run.state == "at work" and not once:
            time.sleep(max(every, 50 * (time.monotonic() - began)))  # reading takes a fiftieth of the time at most
            began = time.monotonic()
            run = read_run(path)
            live.update(view(), refresh=True)
    if not console.is_terminal:
        console.line()  # with which a live view ends on a terminal alone


def web_server(path: Path, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server for the page of the run in `path` on a loopback port (0: a free one), and the page's random address.

    Read only. A page of somebody else in the same browser learns nothing: it does not know the address, and a host name that
    it points here is refused by its Host header. Raises ReportError for no run, UserError for a port that is not free.
    """
    secret, lock = f"/{secrets.token_urlsafe(24)}/", threading.Lock()
    read_run(path)

    @lru_cache(maxsize=1)
    def page(turn: float) -> tuple[bytes, dict[str, str]]:
        """The page and its own headers, drawn once for everybody who asks in a turn of FRESH_SECONDS."""
        run = read_run(path)
        refresh = {"Refresh": f"{FRESH_SECONDS}"} if run.state == "at work" else {}
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
