"""Prints what the user sees: rich on a terminal, plain lines elsewhere, nothing twice on several ranks."""

import atexit
import io
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol, runtime_checkable

import rich.console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_PATIENCE_S = 5.0
_FILE_WIDTH = 120  # columns of a table where the output is not a terminal
_LINE_WIDTH = 80  # of lines that are wrapped there


@runtime_checkable
class Bar(Protocol):
    """One phase's progress."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Advance by `count`; the note stays until the next one."""
        ...

    def close(self) -> None:
        """Take the bar away."""
        ...


class _RichBar:
    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=count, **({"note": note} if note else {}))  # pyright: ignore[reportArgumentType]

    def close(self) -> None:
        self._progress.remove_task(self._task)
        if not self._progress.tasks:
            self._progress.stop()


class _PlainBar:
    """At most twenty lines a phase where the output is a file: a bar would fill it with control characters.

    A line without a note is printed only after some seconds of silence.
    """

    def __init__(self, console: rich.console.Console, name: str, total: int, done: int) -> None:
        self._console, self._name, self._total, self._done = console, name, total, done
        self._every = max(1, total // 20)
        self._printed, self._since = done // self._every, time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        due, now = self._done // self._every, time.monotonic()
        if (due > self._printed or self._done == self._total) and (note or now - self._since > _PATIENCE_S):
            self._printed, self._since = due, now
            self._console.print(f"{self._name} {self._done:,}/{self._total:,} {note}".rstrip(), soft_wrap=True)

    def close(self) -> None:
        pass


class Console:
    """The console of the main process; on other ranks every call does nothing."""

    def __init__(self, is_main: bool = True) -> None:
        self._is_main = is_main
        self.rich = rich.console.Console(highlight=False, quiet=not is_main)
        if not self.rich.is_terminal:
            self.rich.width = _FILE_WIDTH
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.rich)

    @property
    def is_terminal(self) -> bool:
        """Whether the output is a terminal, and not a file."""
        return self.rich.is_terminal

    def line(self, text: str) -> None:
        """Print one line as it is; markup in it is not read, so data cannot colour or link anything."""
        self.rich.print(escape(printable(text)), soft_wrap=True)

    def table(self, title: str, columns: list[str], rows: list[list[str]], *, is_narrow: bool = False) -> None:
        """Print a table; numbers are expected as text, cells are not read as markup.

        Args:
            is_narrow: Wrap cells so that it has 80 columns where the output is not a terminal.
        """
        table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*[escape(printable(cell)) for cell in row])
        self.rich.print(table, width=_LINE_WIDTH if is_narrow and not self.is_terminal else None)

    def pairs(self, title: str, facts: Mapping[str, str]) -> None:
        """Print a title and a line for each fact, wrapped to the terminal, or to 80 columns where there is none."""
        indent = 2 + max(map(len, facts), default=0) + 2
        width = max(2 * indent, self.rich.width if self.is_terminal else _LINE_WIDTH)
        self.line(title)
        for name, text in facts.items():
            wrapped = textwrap.wrap(
                printable(text), width - indent, break_long_words=False, break_on_hyphens=False
            )  # a path must stay whole, so that it can be pasted
            for number, line in enumerate(wrapped or [""]):
                self.line(f"  {'' if number else name:{indent - 2}}{line}".rstrip())

    def open_bar(self, name: str, total: int, done: int = 0) -> Bar:
        """A progress bar with a note and the time left; the caller closes it. Several may be open."""
        if not self._is_main or not self.rich.is_terminal:
            return _PlainBar(self.rich, name, total, done)
        if not self._progress.live.is_started:
            self._progress.start()
            atexit.register(self._progress.stop)  # a run that ends in an error must give the cursor back
        return _RichBar(self._progress, name, total, done)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Bar]:
        """A bar for the time of a block."""
        bar = self.open_bar(name, total)
        try:
            yield bar
        finally:
            bar.close()


class LastingOutput(io.TextIOWrapper):
    """Standard output that never ends a run: characters that its encoding lacks are escaped; if its disk is full or its
    reader is gone, a note says so, and the rest is discarded."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        by_lines, encoding = stream.line_buffering, stream.encoding
        super().__init__(stream.buffer, encoding=encoding, errors="backslashreplace", line_buffering=by_lines)

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        own, nowhere = os.fstat(self.fileno()), os.open(os.devnull, os.O_WRONLY)
        for number in (self.fileno(), 2):
            with suppress(OSError):  # closed
                if os.path.samestat(own, os.fstat(number)):
                    os.dup2(nowhere, number)
        os.close(nowhere)
        note(f"nothing more is printed ({error.strerror}); the command goes on")


_noted: set[str] = set()


def note(text: str) -> None:
    """Print a text once on standard error, for code that has no console at hand."""
    if os.environ.get("RANK", "0") == "0" and text not in _noted:
        _noted.add(text)
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 step", "1,200 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """The text with control characters written out: data must not control the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
