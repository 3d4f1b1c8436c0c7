"""Serve the report of runs that go on, on 127.0.0.1. Nothing is written, not even into a run folder.

Only the pages of `pages/live.py` are served, at their addresses, whatever the path of a request. A browser that a page of
another site has sent here, under another name of this machine, is refused.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("watch")  # before the imports below, so that help and mistakes are answered at once


import argparse
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any

from llava_accel.console.door import HOST, LocalServer, is_local_name, open_door
from llava_accel.pages.live import LivePage, live_pages

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(LocalServer):
    """Serves some pages on a port of this machine; UserError if the port is taken."""

    def __init__(self, pages: Mapping[str, LivePage], port: int) -> None:
        super().__init__(open_door(port), _Handler)
        self.pages = pages

    @property
    def url(self) -> str:
        """The address of the first page."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "llava-accel", ""
    timeout = 30  # seconds that a request may take to arrive

    def do_GET(self) -> None:
        self._answer(with_page=True)

    def do_HEAD(self) -> None:
        self._answer(with_page=False)

    def _answer(self, *, with_page: bool) -> None:
        server, hosts = self.server, self.headers.get_all("Host", [])
        assert isinstance(server, Server)
        if len(hosts) != 1 or not is_local_name(hosts[0]):
            return self.send_error(HTTPStatus.FORBIDDEN, explain=f"Open {server.url}")
        page = server.pages.get(self.path)
        if page is None:
            return self.send_error(HTTPStatus.NOT_FOUND, explain=f"Open {server.url}")
        version, html = page.html() if with_page else (page.version(), b"")
        is_known = self.headers.get("If-None-Match") == f'"{version}"'
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else HTTPStatus.OK)
        self.send_header("ETag", f'"{version}"')
        if not is_known:
            self.send_header("Content-Type", "text/html; charset=utf-8")
        if with_page and not is_known:
            self.send_header("Content-Length", str(len(html)))
        self.end_headers()
        if not is_known:
            self.wfile.write(html)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for a request."""


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel watch RUN ...`."""
    with Server(live_pages(arguments.runs), arguments.port) as server:
        print(f"watch: {server.url} (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("\nwatch: ended. Runs go on")
