"""A Hugging Face hub on this machine that has one data set, org/name, at one commit."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789" * 4


@contextmanager
def fake_hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve these files; the address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    files: Mapping[str, bytes]

    def _answer(self) -> None:
        place = urlsplit(self.path)
        path, query = place.path, parse_qs(place.query)
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if re.fullmatch(r"/api/datasets/org/name(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.files]
            self._json({"id": "org/name", "sha": COMMIT, "private": False, "siblings": siblings, "tags": []})
        elif found := re.fullmatch(r"/api/datasets/org/name/tree/[^/]+(?:/(.*))?", path):
            self._json(self._tree(unquote(found[1] or ""), query.get("recursive") == ["true"]))
        elif re.fullmatch(r"/api/datasets/org/name/paths-info/[^/]+", path):
            self._json([self._entry(name) for name in json.loads(sent)["paths"] if name in self.files])
        elif (found := re.fullmatch(r"/datasets/org/name/resolve/[^/]+/(.*)", path)) and found[1] in self.files:
            self._file(self.files[found[1]])
        else:
            self._send(404, b'{"error": "not found"}', {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_GET = do_HEAD = do_POST = _answer

    def _tree(self, folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        inner = [name for name in self.files if name.startswith(f"{folder}/" if folder else "")]
        here = [name for name in inner if is_recursive or "/" not in name.removeprefix(f"{folder}/")]
        folders = sorted({name.rpartition("/")[0] for name in inner} - {folder, ""})
        return [self._entry(name) for name in here] + [
            {"type": "directory", "oid": "0", "path": name} for name in folders
        ]

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}

    def _file(self, content: bytes) -> None:
        about = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            self._send(200, content, about)
            return
        start = int(asked[1]) if asked[1] else len(content) - int(asked[2])
        stop = min(int(asked[2]) + 1, len(content)) if asked[1] and asked[2] else len(content)
        self._send(206, content[start:stop], about | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
