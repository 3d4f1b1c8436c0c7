"""ScienceQA's problems.json and pid_splits.json -> records, in the prompts that LLaVA was trained and evaluated with."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_accel.converters.entry import Rows, lettered, make_record, placed, read_json, text_of, texts_of
from llava_accel.converters.faults import Part
from llava_accel.converters.image_lookup import ImageLookup
from llava_accel.data.annotations import LETTER_REQUEST, LETTERS
from llava_accel.exceptions import UserError
from llava_accel.sources.problems import DataError, quoted

_IMAGES_FROM = "https://scienceqa.s3.us-west-1.amazonaws.com/images/ (train.zip, val.zip and test.zip)"


def science_parts(
    problems: Path, splits: Path, names: Sequence[str], images: Path, explains: bool, out: Path
) -> Iterator[Part]:
    """One part per split.

    Args:
        problems: problems.json.
        splits: pid_splits.json.
        names: The splits to write.
        images: The folder of train/, val/ and test/, or the one above it.
        explains: Train on lecture, solution and "The answer is B.", as LLaVA did, in place of LLaVA-1.5's letter.

    Raises:
        UserError: with file and remedy.
    """
    known = read_json(problems, "Give the official problems.json with --problems")
    numbers = read_json(splits, "Give the official pid_splits.json with --pid-splits")
    for file, content in ((problems, known), (splits, numbers)):
        if not isinstance(content, dict):
            raise DataError(
                "fields", f"it is not a JSON object, but {quoted(content)}", "Give the official file", file=str(file)
            )
    for name in names:
        chosen = numbers.get(name)
        if not isinstance(chosen, list):
            raise UserError(f"--splits {name}: {splits} has only {', '.join(numbers)}. Name some of them.")
        lookup = ImageLookup(images, _IMAGES_FROM)
        rows = _rows(problems, known, chosen, lookup, explains)
        yield Part(out=out / f"{name}.jsonl", rows=rows, source=str(problems), images=lookup)


def _rows(file: Path, problems: Mapping[str, Any], chosen: Sequence[Any], images: ImageLookup, explains: bool) -> Rows:
    for number in map(str, chosen):
        try:
            problem = problems.get(number)
            if not isinstance(problem, dict):
                raise DataError(
                    "fields", "pid_splits.json names this problem, and it is not there", "Give both of one version"
                )
            yield _record(number, problem, images, explains)
        except DataError as error:
            yield placed(error, file, number)


def _record(number: str, problem: Mapping[str, Any], images: ImageLookup, explains: bool) -> dict[str, object]:
    question, choices = text_of(problem, "question"), texts_of(problem, "choices")
    letter = lettered(choices, problem.get("answer"))
    options = " ".join(f"({one}) {choice}" for one, choice in zip(LETTERS, choices, strict=False))
    context = _optional(problem, "hint").strip() or "N/A"
    # LLaVA puts the question first where it explains, and the context first where a letter is asked for.
    asked = f"Context: {context}\nQuestion: {question}\nOptions: {options}"
    target = letter
    if explains:
        asked = f"{question}\nContext: {context}\nOptions: {options}"
        target = _single_spaced(
            f"{_optional(problem, 'lecture')} {_optional(problem, 'solution')} The answer is {letter}."
        )
    return make_record(
        record_id=number,
        images=_images(number, problem, images),
        question=question,
        prompt=_single_spaced(asked),
        suffix="" if explains else LETTER_REQUEST,
        answers={letter: 1},
        target=target,
        choices=choices,
        question_type=_optional(problem, "subject"),
        answer_type=_optional(problem, "grade"),
    )


def _images(number: str, problem: Mapping[str, Any], images: ImageLookup) -> list[str]:
    if problem.get("image") is None:
        return []
    name = text_of(problem, "image")
    split = _optional(problem, "split")  # the folder of a problem in "minival" is "val"
    return [images.find(f"{split}/{number}/{name}", f"{number}/{name}")]


def _single_spaced(text: str) -> str:
    """LLaVA's own tidying of a prompt."""
    return text.replace("  ", " ").strip()


def _optional(problem: Mapping[str, Any], key: str) -> str:
    return "" if problem.get(key) is None else text_of(problem, key)
