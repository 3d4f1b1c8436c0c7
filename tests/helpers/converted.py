"""What converters make of a published file."""

import json
from typing import Any

from llava_accel.converters.faults import Part
from llava_accel.data.records import parse_record
from llava_accel.sources.problems import DataError


def records(part: Part) -> list[dict[str, Any]]:
    """The part's records, each one that training reads."""
    rows = [row for row in part.rows if isinstance(row, dict)]
    for row in rows:
        parse_record(json.dumps(row).encode(), 1)
    return rows


def faults(part: Part) -> list[str]:
    """What is said in place of the others."""
    return [str(row) for row in part.rows if isinstance(row, DataError)]
