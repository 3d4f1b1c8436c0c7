"""A copy of the data without the records that cannot be used, and the list of what it leaves out."""

from pathlib import Path

from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus
from llava_accel.data.duplicates import with_own_id
from llava_accel.data.problems import DataError
from llava_accel.data.survey import Survey
from llava_accel.exceptions import UserError


def write_clean_copy(
    folder: Path, corpus: Corpus, survey: Survey, repeated: dict[int, DataError], console: Console
) -> None:
    """The usable records as JSON lines, and left_out.txt with the reason for each of the others.

    A record with the id of an earlier one gets its own, and is listed in renamed.txt.
    Images are not copied: the copy is used with the same data.images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in corpus.sources:
        target = folder / f"{source.table.path.stem}.jsonl"
        if target.exists() and target.resolve() == source.table.path.resolve():
            raise UserError(f"--fix {folder}: {target} is the data itself. Name another folder")
        target.unlink(missing_ok=True)
    start = 0
    for source in corpus.sources:
        with (folder / f"{source.table.path.stem}.jsonl").open("ab") as file:
            for row in range(start, start + len(source.table)):
                if row not in survey.errors:
                    raw = corpus.raw(row)
                    file.write((with_own_id(raw, source.table.number(row - start)) if row in repeated else raw) + b"\n")
        start += len(source.table)
    (folder / "left_out.txt").write_text("".join(f"{error}\n" for error in survey.errors.values()))
    renamed = [f"{error}\n" for row, error in repeated.items() if row not in survey.errors]
    (folder / "renamed.txt").write_text("".join(renamed))
    left_out = f"{len(survey.errors):,} left out, in left_out.txt; {len(renamed):,} with a new id, in renamed.txt"
    console.line(f"clean copy: {folder} ({len(survey.usable):,} records; {left_out})")
