"""`soar watch --web`: the report page of a run, finished or at work, on this machine's own address. Needs no torch.

Read only: one page under a random address, made anew as the run goes on. A page of somebody else in the same browser learns
nothing: it does not know the address, and a host name that it points here is refused by its Host header.
"""

from __future__ import annotations

import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from soar.report.page import content, render
from soar.report.runs import read_run

FRESH_SECONDS = 10.0  # as old as a page gets
HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
}  # fmt: skip


def web_server(path: Path, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server for the page of the run in `path` on a loopback port (0: a free one), and the page's address.

    Raises ReportError where there is no run, OSError for a port that is taken.
    """
    secret, lock = f"/{secrets.token_urlsafe(24)}/", threading.Lock()
    made, body, running = float("-inf"), b"", False

    def page() -> tuple[bytes, bool]:
        nonlocal made, body, running
        with lock:
            if time.monotonic() - made > FRESH_SECONDS:
                run = read_run(path)
                running = not (run.finished or run.paused)
                body, made = render("report.html", content(run)).encode(), time.monotonic()
            return body, running

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # of a client that says nothing

        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                return self.send_error(403)
            if not secrets.compare_digest(self.path.encode(), secret.encode()):
                return self.send_error(404)
            text, again = page()
            self.send_response(200)
            refresh = {"Refresh": f"{FRESH_SECONDS:.0f}"} if again else {}
            for name, value in {**HEADERS, **refresh, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
            return None

        def log_message(self, *args: object) -> None:
            """Nothing: the address is a secret."""

    page()
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    return server, f"http://127.0.0.1:{server.server_port}{secret}"
