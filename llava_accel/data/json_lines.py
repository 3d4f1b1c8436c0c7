"""JSON lines on disk: written whole or not at all."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path


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
