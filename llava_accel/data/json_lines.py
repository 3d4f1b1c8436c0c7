"""JSON lines on disk: written whole or not at all, and read by their line feeds alone."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_json_lines(rows: Iterable[Mapping[str, object]], out: Path) -> int:
    """Write one JSON object a line, in UTF-8, and return how many.

    `rows` may be a generator that raises half-way: the new file takes its place at the end.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    count = 0
    try:
        # Half a surrogate pair cannot be encoded; Python's backslash form of it is also JSON's.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_json_lines` wrote. `str.splitlines` would also cut at U+2028 and others, which texts may hold.

    Raises:
        ValueError: a line is no JSON.
    """
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
