"""Who may come in to what is served here: this machine alone, by its own name, with the key."""

import hmac
import re
import secrets
import socket

from llava_accel.exceptions import UserError

HOST = "127.0.0.1"
LARGEST_BODY = 32 << 20
"""Bytes of a request: pictures of some 20 MB in base64."""
_NAMES = (HOST, "localhost")


def open_door(port: int) -> socket.socket:
    """A socket that listens to this machine alone; UserError if the port is taken. 0 stands for any that is free."""
    door = socket.socket()
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a server that has just ended
        door.bind((HOST, port))
    except OSError as error:
        door.close()
        raise UserError(f"--port {port}: {error.strerror}. Name another one, or 0 for any that is free") from None
    door.listen(64)
    return door


def usable_key(given: str | None) -> str:
    """The key that the user gave, or a new one; UserError if no header can carry it."""
    if given is not None and not re.fullmatch(r"[\x21-\x7e]{8,200}", given):
        raise UserError("--key: a key has 8 to 200 letters, digits and signs of ASCII. Leave it out, and one is made")
    return secrets.token_urlsafe(24) if given is None else given


def is_key(given: str, key: str) -> bool:
    """Whether it is the key, in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key.encode())


def is_local_name(host: str | None) -> bool:
    """Whether a Host header names this machine. Another name is that of a page elsewhere, whose address leads here."""
    return re.sub(r":\d+$", "", host or "").lower() in _NAMES
