"""`soar watch --web`: the report page of a run, finished or at work, on this machine's own address. Needs no torch.

Read only: one page under a random address, made anew when it is asked for. A page of somebody else in the same browser learns
nothing: it does not know the address, and a host name that it points here is refused by its Host header.
"""

from __future__ import annotations

import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from soar.report.page import content, render
from soar.report.runs import read_run

FRESH_SECONDS = 10  # between two pages of a run at work
HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff",
}  # fmt: skip


def web_server(path: Path, port: int = 0) -> tuple[ThreadingHTTPServer, str]:
    """A server for the page of the run in `path` on a loopback port (0: a free one), and the page's address.

    Raises ReportError where there is no run, OSError for a port that is taken.
    """
    secret, lock = f"/{secrets.token_urlsafe(24)}/", threading.Lock()
    read_run(path)

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # of a client that says nothing

        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                return self.send_error(403)
            if not secrets.compare_digest(self.path.encode(), secret.encode()):
                return self.send_error(404)
            with lock:
                run = read_run(path)
                text = render("report.html", content(run)).encode()
            self.send_response(200)
            refresh = {} if run.finished or run.paused else {"Refresh": f"{FRESH_SECONDS}"}
            for name, value in {**HEADERS, **refresh, "Content-Length": str(len(text))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
            return None

        def log_message(self, *args: object) -> None:
            """Nothing: the address is a secret."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    return server, f"http://127.0.0.1:{server.server_port}{secret}"
