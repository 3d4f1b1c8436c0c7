"""Reports of runs that go on: drawn when somebody asks and a run has written more, else taken from memory."""

import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_accel.exceptions import UserError
from llava_accel.pages.history import History, read_run
from llava_accel.pages.html import Live, render
from llava_accel.pages.write import attempted, comparison_page, refuse_repeated, report_page
from llava_accel.storage.folder_lock import is_held
from llava_accel.storage.kept_files import file_status
from llava_accel.storage.run_weights import complete_checkpoints

_REST = 10.0  # a page stays as it is for this many times the time of drawing it: a run may need the same cores
_LONGEST_REST_S = 60.0
_READ = ("*.json", "*.jsonl", "recipe.toml", "*.txt", "predictions/*.jsonl")
_PROCESS = uuid.uuid4().hex  # pages of an earlier process may be of another version


class LivePage:
    """One page. Any thread may ask for it.

    Args:
        folders: The runs that it shows; none of them has to exist yet.
        draw: Makes HTML of those that exist.
        links: See `Live`.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        draw: Callable[[list[History], Live], str],
        links: Sequence[tuple[str, str]],
    ) -> None:
        self._folders, self._draw, self._links = folders, draw, links
        self._drawing = threading.Lock()
        self._version, self._html, self._rests_until = "", b"", 0.0

    def version(self) -> str:
        """Changes when the page has more to show, but not for a while after it was drawn."""
        return self._version if time.monotonic() < self._rests_until else _version(self._folders)

    def html(self) -> tuple[str, bytes]:
        """The version and the page, which itself says if a run does not exist yet or cannot be read."""
        with self._drawing:
            version = self.version()  # before the files are read: what changes meanwhile is seen the next time
            if version != self._version:
                since = time.monotonic()
                self._html = self._drawn(version).encode()
                now = time.monotonic()
                self._version, self._rests_until = version, now + min(_LONGEST_REST_S, _REST * (now - since))
            return self._version, self._html

    def _drawn(self, version: str) -> str:
        notes: list[str] = []
        runs = [run for folder in self._folders if (run := _read(folder, notes))]
        html, problem = attempted(lambda: self._draw(runs, Live(version, self._links, notes))) if runs else (None, "")
        if html is not None:
            return html
        name = ", ".join(folder.name for folder in self._folders)
        notes += [f"the page could not be drawn ({problem})"] if problem else []
        return render("waiting.html.j2", {"name": name}, Live(version, self._links, notes))


def live_pages(folders: Sequence[Path]) -> dict[str, LivePage]:
    """The pages by their addresses: of one run its report, of several their comparison, and the report of each.

    Raises:
        UserError: a run is named twice.
    """
    refuse_repeated(folders)
    if len(folders) == 1:
        return {"/": LivePage(folders, _report, ())}
    single = {f"/{number}": folder for number, folder in enumerate(folders, start=1)}
    links = [("/", "Comparison"), *((address, str(folder)) for address, folder in single.items())]
    pages = {"/": LivePage(folders, comparison_page, links)}
    return pages | {address: LivePage([folder], _report, links) for address, folder in single.items()}


def _report(runs: list[History], live: Live) -> str:
    return report_page(runs[0], live)


def _read(folder: Path, notes: list[str]) -> History | None:
    """The run, or None and a note why there is none."""
    if not (folder / "recipe.toml").is_file():
        notes.append(f"{folder}: there is no run yet. It is shown here as soon as there is one")
        return None
    try:
        return read_run(folder)
    except (UserError, OSError) as error:
        notes.append(f"{folder} cannot be read now: {error}")
        return None


def _version(folders: Sequence[Path]) -> str:
    """A digest of what the pages of these runs are made of, as it is on the disk now."""
    digest = hashlib.sha256(_PROCESS.encode())
    for folder in folders:
        files = sorted(path for pattern in _READ for path in folder.glob(pattern))
        checkpoints = [path.name for path in complete_checkpoints(folder / "checkpoints")[-1:]]
        statuses = [(str(file), file_status(file)) for file in files]
        digest.update(repr((statuses, checkpoints, is_held(folder))).encode())
    return digest.hexdigest()[:32]
