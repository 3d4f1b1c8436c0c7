"""The rows of JSON lines and of a JSON array, one at a time whatever the size of the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llava_accel.sources.problems import DataError

MAX_BYTES = 16 << 20
"""Longest row that is read: a line of hundreds of megabytes is not a conversation, and would fill the memory."""
GIT_POINTER, FETCH = b"version https://git-lfs", "It is a Git LFS pointer to the file: run git lfs pull"
"""First bytes of a pointer that Git LFS puts in place of a large file, and the remedy."""
_BLOCK = 1 << 22  # characters read at once from a JSON array
_SPACE, _SEPARATOR = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            # A byte order mark is not part of the first record.
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            line = line if len(line) > MAX_BYTES else line.strip()
            if line:
                yield number, line


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; a line that is too long for a record is cut where that is certain, and never held whole."""
    while line := file.readline(MAX_BYTES + 4):
        end = line
        while len(end) == MAX_BYTES + 4 and not end.endswith(b"\n"):
            end = file.readline(MAX_BYTES + 4)
        yield line


def json_array(path: Path) -> Iterator[bytes]:
    """Objects of a top-level array, each on one line; DataError where the file breaks off or is malformed."""
    decoder, number = json.JSONDecoder(), 1

    def refused(problem: str, remedy: str, row: int | None = None) -> DataError:
        return DataError("json", problem, remedy, file=str(path), row=row)

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text, place = file.read(_BLOCK).lstrip(), 1
            if not text.startswith("["):
                raise refused("the file is not a JSON array", _remedy(text))
            while True:
                place = (_SPACE if number == 1 else _SEPARATOR).match(text, place).end()  # pyright: ignore[reportOptionalMemberAccess]  matches ""
                if text.startswith("]", place):
                    break
                try:
                    _, end = decoder.raw_decode(text, place)
                except (ValueError, RecursionError) as error:
                    left, cut = text[place:], _may_be_cut(error, text)
                    if cut and len(left) > MAX_BYTES:
                        problem = f"the record is longer than {MAX_BYTES >> 20} MiB, or a text in it is not closed"
                        remedy = "Write one conversation per record; images are files, named in 'image'"
                        raise refused(problem, remedy, number) from None
                    # Doubling keeps the work on a huge record linear.
                    block = file.read(max(_BLOCK, len(left))) if cut else ""
                    if not block:
                        problem = f"not valid JSON ({getattr(error, 'msg', error)})"
                        problem += "; the file may be cut off" if cut else ""
                        raise refused(problem, "Write the file again" if cut else "Correct it", number) from None
                    text, place = left + block, 0
                    continue
                # Between the tokens of JSON a line break means nothing, and inside them there is none.
                yield text[place:end].replace("\n", " ").replace("\r", " ").encode()
                place, number = end, number + 1
            if (text[place + 1 :] + file.read(_BLOCK)).strip():
                raise refused("there is more text after the end of the array", "Write one array per file")
    except UnicodeDecodeError as error:
        raise refused(f"not UTF-8 ({error})", "Save it as UTF-8") from None


def _remedy(text: str) -> str:
    """The remedy for a file that begins with this text and not with an array."""
    if text.startswith(GIT_POINTER.decode()):
        return FETCH
    if text.startswith("{") and re.search(r'"(questions|annotations)"\s*:\s*\[', text):
        return (
            "It seems to be of a public data set: `llava-accel prepare --help` lists those that are made into records"
        )
    if text.startswith("{") and "}\n{" in text.replace("\r", "") and text.splitlines()[0].rstrip().endswith("}"):
        return "It seems to have one record per line: name it .jsonl"
    return "Write [record, ...], or one record per line in .jsonl; if it holds no records, name the other files alone"


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether the rest of the file could mend the error; more text cannot mend one far from the end of `text`."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16  # longer than any escape or word
