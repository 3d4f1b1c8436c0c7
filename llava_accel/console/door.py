"""Who may use what is served here: only this machine, under its own name, and with the key where there is one."""

import hmac
import os
import re
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llava_accel.exceptions import UserError

HOST = "127.0.0.1"
LARGEST_BODY = 32 << 20
"""Bytes of a request: images of some 20 MB in base64."""


def open_door(port: int) -> socket.socket:
    """A socket that listens to this machine alone; UserError if the port is taken. 0 is any port that is free."""
    try:
        return socket.create_server((HOST, port), backlog=64)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise UserError(f"--port {port}: {problem}. Name another one, or 0 for any that is free") from None


class LocalServer(ThreadingHTTPServer):
    """Answers requests to the socket of `open_door`, in a thread for each connection."""

    def __init__(self, door: socket.socket, visit: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(door.getsockname(), visit, bind_and_activate=False)
        self.socket.close()
        self.socket, self.server_port = door, door.getsockname()[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of a defect; a client that has gone is not one."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def is_key(given: str, key: str) -> bool:
    """Whether `given` is the key; the time that this takes does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


def is_local_name(host: str | None) -> bool:
    """Whether a Host header names this machine. A page of another site can send requests here, but under its own name."""
    return re.sub(r":\d+$", "", host or "").lower() in (HOST, "localhost")
