"""Writes the records of a split, and reports together all that cannot be used: in an error, or as left out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llava_accel.converters.entry import Rows, without_repeats
from llava_accel.converters.image_lookup import ImageLookup
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted, some
from llava_accel.storage.jsonl import write_json_lines

_MOST_SHOWN = 20
_MOST_NAMED = 200
_SKIP = "--on-bad-record skip"


@dataclass(kw_only=True)
class Part:
    """One file of records that is to be written.

    Args:
        out: A file of JSON lines.
        rows: Its records, and errors in place of those that cannot be used.
        source: The file that the rows come from, for messages.
        images: Looks up their images; missing ones are then reported as one fault.
        notes: Lines to print once all rows are read.
    """

    out: Path
    rows: Rows
    source: str
    images: ImageLookup | None = None
    notes: list[str] = field(default_factory=list)


def write_part(part: Part, skips: bool, say: Callable[[str], None]) -> None:
    """Write a file whole, or not at all, and say what is in it and what was left out.

    Args:
        skips: Leave out what cannot be used.

    Raises:
        UserError: with all faults; or because no record is left.
    """
    faults: list[DataError] = []
    names: set[str] = set()
    count = write_json_lines(_usable(part, skips, faults, names), part.out)
    say(f"{part.out}: {count:,} questions on {len(names):,} images")
    for note in part.notes:
        say(note)
    if faults:
        lines = [f"left out {len(faults):,} of {count + len(faults):,} records of {part.source}:"]
        say("\n  ".join([*lines, *_fault_lines(faults, part.images)]))


def _usable(part: Part, skips: bool, faults: list[DataError], names: set[str]) -> Iterator[dict[str, object]]:
    count = 0
    for row in without_repeats(part.rows, part.source):
        if isinstance(row, DataError):
            faults.append(row)
            continue
        count += 1
        image = row.get("image", [])
        names.update(image if isinstance(image, list) else [str(image)])
        yield row
    if faults and not (skips and count):
        raise _refusal(part, faults, count)
    if not count:
        raise DataError("empty", "there is no record in it", "Give a file with records", file=part.source)


def _refusal(part: Part, faults: list[DataError], count: int) -> UserError:
    missing, others = _parted(faults, part.images)
    if not others and part.images:
        problem, remedy = part.images.shortage()
        end = f"; or leave out the {len(missing):,} question(s) on them with {_SKIP}" if count else ""
        return DataError("missing_image", problem, remedy + end, file=part.source)
    if len(faults) == 1:
        return faults[0].with_note(f"Or leave it out with {_SKIP}") if count else faults[0]
    total = count + len(faults)
    first = f"{part.source}: {len(faults):,} of {total:,} records cannot be used:"
    last = f"Correct them, or leave them out with {_SKIP}" if count else "Correct them: there is no other record"
    return UserError("\n  ".join([first, *_fault_lines(faults, part.images)]) + f"\n{last}")


def _fault_lines(faults: list[DataError], images: ImageLookup | None) -> list[str]:
    """A line for each of the first faults, and one for the others; missing images share one."""
    missing, others = _parted(faults, images)
    lines = [". ".join(images.shortage())] if images and missing else []
    lines += [str(fault) for fault in others[:_MOST_SHOWN]]
    if rest := others[_MOST_SHOWN:]:
        names = [quoted(fault.id) if fault.row is None else f"row {fault.row}" for fault in rest]
        lines.append(f"and {len(rest):,} more: {some(names, _MOST_NAMED)}")
    return lines


def _parted(faults: list[DataError], images: ImageLookup | None) -> tuple[list[DataError], list[DataError]]:
    """The missing images that `images` counts, and the other faults."""
    missing = {fault: None for fault in faults if images and fault.kind == "missing_image"}
    return list(missing), [fault for fault in faults if fault not in missing]
