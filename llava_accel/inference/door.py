"""Who may come in to what is served here: this machine alone, under its own name, with the key."""

import hmac
import os
import re
import socket

from llava_accel.exceptions import UserError

HOST = "127.0.0.1"
LARGEST_BODY = 32 << 20
"""Bytes of a request: pictures of some 20 MB in base64."""


def open_door(port: int) -> socket.socket:
    """A socket that listens to this machine alone; UserError if the port is taken. 0 stands for any that is free."""
    try:
        return socket.create_server((HOST, port), backlog=64)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise UserError(f"--port {port}: {problem}. Name another one, or 0 for any that is free") from None


def is_key(given: str, key: str) -> bool:
    """Whether it is the key, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


def is_local_name(host: str | None) -> bool:
    """Whether a Host header names this machine. Another name is that of a page elsewhere, whose address leads here."""
    return re.sub(r":\d+$", "", host or "").lower() in (HOST, "localhost")
