"""Reads what a person types into a chat: commands, paths as terminals and file managers write them, and earlier lines.

Nothing here imports a slow library: the first prompt does not wait for one.
"""

import difflib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from llava_accel.exceptions import UserError

COMMANDS = {
    "/image": ("FILE", "adds an image to the next question; quotes, escaped spaces and file:// are understood"),
    "/system": ("TEXT", "the system prompt from the next conversation on; without TEXT there is none"),
    "/reset": ("", "starts a new conversation"),
    "/help": ("", "shows this list"),
    "/quit": ("", "ends, as Ctrl-D does"),
}
"""Command -> what it takes, and what it does."""
_KEPT_LINES = 1000


def help_text() -> str:
    """The commands, one a line."""
    rows = [(f"{name} {takes}".strip(), does) for name, (takes, does) in COMMANDS.items()]
    return "\n".join(f"  {start:13}{does}" for start, does in rows)


def split_command(line: str) -> tuple[str, str]:
    """A command and the text after it; ("", line) where it is a question.

    Raises:
        UserError: it begins like a command, but is not one.
    """
    if not line.startswith("/"):
        return "", line
    command, _, rest = line.partition(" ")
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise UserError(f"{command} is not a command. {hint}/help shows all of them")
    return command, rest.strip()


def typed_paths(text: str) -> list[Path]:
    """The files that a text names: the text itself if there is such a file, else its words as a shell would read them.

    Raises:
        UserError: it is empty, or a quote is not closed.
    """
    if not text:
        raise UserError("/image names no file. Write /image FILE")
    whole = _path(text)
    if os.path.isfile(whole):  # False, and no error, for a text that cannot be the name of a file
        return [whole]
    try:
        words = [_path(word) for word in shlex.split(text)]
    except ValueError as error:
        raise UserError(f"/image {text}: {str(error).lower()}. Close the quotes, or leave them out") from None
    # If not all of several words are files, the whole text is the wrong name.
    return words if len(words) == 1 or all(map(os.path.isfile, words)) else [whole]


def _path(text: str) -> Path:
    address = urlsplit(text) if text.startswith("file://") else None
    return Path(os.path.expanduser(text if address is None else unquote(address.path)))


@contextmanager
def kept_history() -> Iterator[None]:
    """In the block, arrow keys bring back lines of this session and of earlier ones; only the user can read their file.

    Where a system has no line editing, or the file cannot be written, no line is kept for later sessions.
    """
    readline, path = _line_editing(), _history_file()
    if readline is None or path is None:
        yield
        return
    with suppress(OSError):  # there is none yet, or another library wrote it
        readline.read_history_file(path)
    readline.set_history_length(_KEPT_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            path.chmod(0o600)
            readline.write_history_file(path)


def remember(line: str) -> None:
    """Add a line that was read without line editing to the history."""
    readline = _line_editing()
    if readline is not None and line.strip():
        readline.add_history(line.rstrip("\n"))


def _line_editing() -> Any:
    try:
        import readline
    except ImportError:  # Windows, and Pythons that were built without it
        return None
    return readline


def _history_file() -> Path | None:
    """The file, in XDG_STATE_HOME or `~/.local/state`; None for a user without a home."""
    named = os.environ.get("XDG_STATE_HOME", "")
    try:
        state = Path(named) if os.path.isabs(named) else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return state / "llava_accel" / "chat_history"
