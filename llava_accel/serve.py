"""Answer requests in the form of OpenAI's chat.completions, for trying: on this machine alone, one at a time."""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("serve")  # before the imports below, so that help and mistakes are answered at once


import argparse
import json
import re
import secrets
import select
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from tempfile import TemporaryDirectory

from llava_accel.chat import open_dialogue, show_line
from llava_accel.console.door import HOST, LARGEST_BODY, LocalServer, is_key, is_local_name, open_door
from llava_accel.exceptions import UserError
from llava_accel.inference.completions import Refused, answer_form, read_request
from llava_accel.inference.dialogue import Dialogue

_MOST_WAITING = 8


class Server(LocalServer):
    """Serves one model: one answer at a time."""

    def __init__(self, door: socket.socket, dialogue: Dialogue, model: str, key: str) -> None:
        super().__init__(door, _Visit)
        self.dialogue, self.model, self.key = dialogue, model, key
        self.answering, self.waiting = threading.Lock(), threading.BoundedSemaphore(_MOST_WAITING)


class _Visit(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]  no other server makes it
    protocol_version = "HTTP/1.1"  # else large bodies wait a second for the answer to "Expect: 100-continue"
    timeout = 30  # seconds, with a client that neither sends nor reads
    _has_begun = False

    def do_GET(self) -> None:
        with self._refusing():
            self._admit("/v1/models")
            model = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "llava_accel"}
            self._send(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        with self._refusing():
            self._admit("/v1/chat/completions")
            if not self.server.waiting.acquire(blocking=False):
                raise Refused(429, f"{_MOST_WAITING} requests are waiting. Ask again later", "rate_limit_exceeded")
            try:
                with TemporaryDirectory(prefix="llava_accel_") as folder:
                    self._answer(self._body(), Path(folder))
            finally:
                self.server.waiting.release()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: only defects are printed."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the base class refuses in the form of the other refusals."""
        self._refuse(Refused(code, f"{message or self.responses[code][0]}. Send a plain HTTP request"))

    def _admit(self, path: str) -> None:
        if not is_local_name(self.headers["Host"]):
            raise Refused(403, f"the Host header names another machine. Ask http://{HOST}", "forbidden_host")
        kind, _, key = (self.headers["Authorization"] or "").partition(" ")
        if kind.lower() != "bearer" or not is_key(key.strip(), self.server.key):
            problem = "the key is missing or wrong. Send Authorization: Bearer KEY with the one that serve printed"
            raise Refused(401, problem, "invalid_api_key")
        if self.path.partition("?")[0] != path:
            problem = f"there is no {self.command} {self.path[:80]!r} here"
            raise Refused(404, f"{problem}. Use GET /v1/models or POST /v1/chat/completions", "unknown_url")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Answer an error of the request in OpenAI's form; a defect is answered without its details, and raised."""
        try:
            yield
        except Refused as refused:
            self._refuse(refused)
        except UserError as error:
            self._refuse(Refused(400, str(error)))
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            self._refuse(Refused(500, "the server has failed; its terminal says why. Try a smaller request"))
            raise

    def _body(self) -> bytes:
        length = self.headers["Content-Length"] or ""
        if self.headers["Transfer-Encoding"] or not (length.isascii() and length.isdigit()):
            raise Refused(411, "the length of the body is not known. Send Content-Length", "length_required")
        if len(length) > 10 or int(length) > LARGEST_BODY:
            problem = f"the body is longer than {LARGEST_BODY >> 20} MiB"
            raise Refused(413, f"{problem}. Send fewer or smaller images", "request_too_large")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionAbortedError
        return body

    def _answer(self, body: bytes, folder: Path) -> None:
        request, turns, images = read_request(body, self.server.model, folder)
        same = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.server.model}

        def on_text(text: str) -> None:
            if request.stream:
                self._event(answer_form(same, delta={"role": "assistant", "content": text}))
            elif select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError  # nobody waits for the rest

        longest = request.max_completion_tokens or request.max_tokens
        with self.server.answering:
            reply = self.server.dialogue.reply(turns, images, on_text, longest=longest)
        if request.stream:
            self._event(answer_form(same, reply, delta={}))
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self._send(200, answer_form(same, reply, message={"role": "assistant", "content": reply.text}))

    def _refuse(self, refused: Refused) -> None:
        if self._has_begun:
            return self._event(refused.form)
        self._send(refused.status, refused.form)
        # Closed before all of the request is read, the connection would lose the refusal.
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        left = 2 * LARGEST_BODY
        while left > 0 and (content := self.rfile.read1(1 << 16)):
            left -= len(content)

    def _event(self, form: Mapping[str, object]) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._head(200, "text/event-stream")
        self.wfile.write(b"data: " + json.dumps(form).encode() + b"\n\n")

    def _send(self, status: int, form: Mapping[str, object]) -> None:
        content = json.dumps(form).encode()
        self._head(status, "application/json", ("Content-Length", str(len(content))))
        self.wfile.write(content)

    def _head(self, status: int, kind: str, *others: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Connection", "close"), ("Cache-Control", "no-store"), *others):
            self.send_header(name, value)
        self.end_headers()


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel serve`."""
    key = secrets.token_urlsafe(24) if arguments.key is None else arguments.key
    if not re.fullmatch(r"[!-~]{8,200}", key):
        raise UserError("--key: a key has 8 to 200 letters, digits and signs of ASCII. Leave it out, and one is made")
    door = open_door(arguments.port)
    dialogue = open_dialogue(arguments, show_line)
    model = Path(arguments.adapter or arguments.base).resolve().name
    with Server(door, dialogue, model, key) as server:
        address = f"http://{HOST}:{server.server_port}/v1"
        show_line(f"address: {address}\nkey: {key}\nmodel: {model}\nCtrl-C ends it")
        server.serve_forever()
