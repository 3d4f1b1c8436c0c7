"""The page of `check --html`: counts, lengths, answers, errors, and images with the text that is learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llava_accel.data.images import Exif
from llava_accel.data.spread import spread
from llava_accel.inspection.data_facts import Checked, Share, answer_shares, examples_of_errors, length_shares, numbers
from llava_accel.inspection.learned import Run, runs
from llava_accel.model.processing import Processing
from llava_accel.pages.gallery import GalleryImage, show_file
from llava_accel.pages.html import render, write_page
from llava_accel.recipe import Recipe

_MOST_CARDS = 36  # of data.train, and of data.eval
_MOST_IMAGES = 4  # of one record


@dataclass(frozen=True, slots=True)
class LearnedCard:
    """One example: its images, and its text in stretches."""

    id: str
    place: str
    """Name of the file, and row."""
    images: list[GalleryImage]
    runs: list[Run]


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What the page shows of data.train or data.eval."""

    name: str
    numbers: dict[str, str]
    lengths: list[Share]
    num_answers: int
    answers: list[Share]
    errors: dict[str, tuple[int, list[str]]]
    notes: list[str]
    cards: list[LearnedCard]


def write_data_page(
    path: Path, recipe: Recipe, parts: Sequence[Checked], *, duration: str, notes: Sequence[str], following: str
) -> None:
    """Write the page.

    Args:
        duration: Length of the run; empty if it is not known.
        notes: Notes on all data.
        following: The command that comes next.

    Raises:
        OSError: the file cannot be written.
    """
    context = {
        "name": recipe.run.name,
        "sections": [_section(part, recipe.data.exif) for part in parts],
        "duration": duration,
        "notes": notes,
        "following": following,
    }
    write_page(path, render("check.html.j2", context))


def _section(checked: Checked, exif: Exif) -> DataSection:
    survey, processing = checked.survey, checked.processing
    num_answers, answers = answer_shares(checked)
    return DataSection(
        name=checked.name,
        numbers=numbers(checked),
        lengths=length_shares(survey.lengths[survey.usable]) if processing else [],
        num_answers=num_answers,
        answers=answers,
        errors=examples_of_errors(checked),
        notes=checked.notes,
        cards=[
            _card(checked, processing, row, exif)
            for row in survey.usable[spread(len(survey.usable), _MOST_CARDS)].tolist()
        ]
        if processing
        else [],
    )


def _card(checked: Checked, processing: Processing, row: int, exif: Exif) -> LearnedCard:
    encoded = checked.corpus.encode(row)
    files = [view.file for view in encoded.example.images[:_MOST_IMAGES]]
    names = encoded.record.images
    return LearnedCard(
        id=encoded.record.id,
        place=checked.corpus.place(row).rpartition("/")[2],
        images=[show_file(file, name, exif) for file, name in zip(files, names, strict=False)],
        runs=[run for example in encoded.examples for run in runs(example, processing)],
    )
