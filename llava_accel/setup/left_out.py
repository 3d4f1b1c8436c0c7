"""Records that are not used: refused or listed, so that the user knows of each."""

from collections.abc import Iterable
from pathlib import Path

from llava_accel.console.output import Console
from llava_accel.data.problems import DataError
from llava_accel.data.survey import Survey
from llava_accel.exceptions import UserError
from llava_accel.recipe import DataTable, Recipe


def refuse_bad(data: DataTable, survey: Survey) -> None:
    """Stop on records that cannot be used, unless the recipe leaves them out and they are few.

    Raises:
        DataError: the first of them, with the number of the others.
    """
    bad = bad_records(data, survey)
    if not bad:
        if not len(survey.usable):
            raise UserError("[data]: no record of the file is left to use. Raise data.max_length, or check the file")
        return
    first, total = bad[0], len(survey.lengths)
    others = f" {len(bad) - 1} more of {total} records cannot be used" if len(bad) > 1 else ""
    if data.on_bad_record == "error":
        raise first.with_note(
            f'{others}. `llava-accel check RECIPE` lists them all; data.on_bad_record = "skip" leaves them out'
        )
    if len(bad) > data.max_bad * total:
        raise first.with_note(f"{others}: more than data.max_bad = {data.max_bad} allows")
    if not len(survey.usable):
        raise first.with_note(f"{others}, and no record is left")


def bad_records(data: DataTable, survey: Survey) -> list[DataError]:
    """What is wrong with records, less those that are too long where the recipe leaves these out.

    That key has no budget: their number is the user's choice of length.
    """
    return [error for error in survey.errors.values() if error.kind != "too_long" or data.on_too_long != "skip"]


def report_left_out(recipe: Recipe, survey: Survey, console: Console) -> None:
    """Say what of the data is not used and why; the records themselves are listed in the run folder."""
    if survey.num_dropped_turns:
        console.line(f"data.on_too_long: {survey.num_dropped_turns:,} turns were dropped to fit data.max_length")
    if not survey.errors:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in survey.errors_by_kind().most_common())
    path = Path(recipe.run.output_dir) / "skipped.txt"
    console.line(f"left out: {len(survey.errors):,} of {len(survey.lengths):,} records ({kinds}), listed in {path}")
    list_skipped(path, survey.errors.values())


def list_skipped(path: Path, errors: Iterable[DataError]) -> None:
    """Add records to the list of those left out, each once however often the run starts or meets them."""
    known = set(path.read_text().splitlines()) if path.exists() else set()
    new = [line for error in errors if (line := str(error)) not in known]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in new)
