"""Check what a recipe names without building the model: recipe, model files, run folder, and every record of the data.

Every record is tokenised and every image decoded, in parallel. Of the model, configs, tokenizer, and names, shapes and
values of weights are checked. All problems are reported in one pass. In the examples that are shown, what the model is
trained to write is coloured.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("check")  # before the imports below, so that help and mistakes are answered at once


import argparse
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.text import Text

from llava_accel.console.command_line import say_error
from llava_accel.console.output import Console, printable
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.data.labels import Example
from llava_accel.data.survey import Survey
from llava_accel.data.survey import survey as survey_records
from llava_accel.exceptions import UserError
from llava_accel.inspection.clean_copy import CleanCopy, duplicate_ids
from llava_accel.inspection.preflight import Problems, examine_model, examine_run
from llava_accel.inspection.tokens_in_texts import tokens_in_texts
from llava_accel.model.processing import Processing
from llava_accel.recipe import DataTable, Recipe, RecipeError
from llava_accel.setup.datasets import bad_records, build_encoder, entries, refuse_bad, remarks, row_form
from llava_accel.setup.remote_images import fetch_images
from llava_accel.sources.problems import DataError
from llava_accel.storage.jsonl import write_json_lines
from llava_accel.storage.kept_files import cache_folder

_SHOWN_ERRORS = 500
_SHOWN_REPEATS = 5  # of ids: no error, as LLaVA's own mixture has many
_MODEL = ("model.base", "model.language_model", "model.vision_tower", "model.projector", "model.adapter", "model.train")


def check(arguments: argparse.Namespace) -> int:
    """Report on recipe, model, run folder, training and evaluation data.

    Returns:
        The exit code: 0 if all records can be used (or the recipe leaves the others out), 1 if records are wrong, 2 if
        anything else is.
    """
    console = Console()
    recipe: Recipe = arguments.loaded
    wrong: RecipeError | None = arguments.wrong  # has been said
    problems = [] if wrong and wrong.is_about("run.name", "run.output_dir", "run.resume") else examine_run(recipe)
    processing = None
    if not (wrong and wrong.is_about(*_MODEL)):
        processing, model_problems = examine_model(recipe, console)
        problems += model_problems
    for message in problems:
        say_error(UserError(message))
    if wrong and wrong.is_about("data.train", "data.images", "data.eval", "data.cache_dir"):
        return 2
    unreadable, bad_rows, copy_words = check_data(recipe, processing, arguments, console)
    if wrong or problems or unreadable:
        return 2
    words = [arguments.recipe, *arguments.overrides]
    if not bad_rows:
        console.line(f"next: {command('train', *words)}")
    elif not arguments.fix:
        remedy = f"write a copy without them: {command('check', *words)} --fix DIR"
        console.line(f"next: correct the records, or {remedy}")
    else:
        console.line(f"next: {command('train', *words, *copy_words)}")
    return 1 if bad_rows else 0


def command(verb: str, *words: str) -> str:
    """A line for the shell."""
    return shlex.join(["llava-accel", verb, *words])


def check_data(
    recipe: Recipe, processing: Processing | None, arguments: argparse.Namespace, console: Console
) -> tuple[bool, bool, list[str]]:
    """Read all records.

    Args:
        processing: None where the model cannot be used; then records and images are read, and nothing is tokenised.

    Returns:
        Whether a file, the cache or the template cannot be used; whether records cannot; and the overrides that make
        the recipe use the copy of `--fix`.
    """
    unreadable: list[DataError] = []
    problems, bad_rows = Problems(), False
    copy = CleanCopy(Path(arguments.fix)) if arguments.fix else None
    encoder = problems.attempt(lambda: build_encoder(recipe, processing)) if processing else None
    with tempfile.TemporaryDirectory() as spare:
        cache_dir = problems.attempt(lambda: cache_folder(recipe.data.cache_dir)) or Path(spare)
        for name, named in entries(recipe.data).items():
            if sources := open_sources(named, cache_dir, unreadable):
                corpus = Corpus(sources, encoder or find_images, row_form(recipe.data))
                bad_rows |= check_corpus(
                    recipe, name, corpus, processing if encoder else None, arguments, copy, problems, console
                )
    for message in (*map(str, unreadable), *problems.messages):
        say_error(UserError(message))
    return bool(unreadable or problems.messages), bad_rows, copy.overrides(recipe.data) if copy else []


def check_corpus(
    recipe: Recipe,
    name: str,
    corpus: Corpus,
    processing: Processing | None,
    arguments: argparse.Namespace,
    copy: CleanCopy | None,
    problems: Problems,
    console: Console,
) -> bool:
    """Read the records of `data.train` or `data.eval`; whether some are wrong, beyond what the recipe leaves out."""
    fetch_images(corpus, recipe.data, console, refuses=False)
    survey = problems.attempt(lambda: read(recipe, corpus, name, console))
    if survey is None:  # the template cannot be used with this tokenizer
        corpus, processing = Corpus(corpus.sources, find_images, corpus.form), None
        survey = read(recipe, corpus, name, console)
    repeated = duplicate_ids(corpus)
    summarise(console, name, survey, repeated, tokenised=processing is not None)
    for remark in [*remarks(corpus, survey), *image_remarks(survey, recipe.data)]:
        console.line(f"note: {remark}")
    if processing:
        for line in tokens_in_texts(corpus, survey.usable, processing):
            console.line(f"  {line}")
        show_examples(console, corpus, survey.usable, processing, arguments.show)
    if processing and arguments.labels and name == "data.train":
        write_labels(Path(arguments.labels), corpus, survey.usable)
        console.line(f"labels of {len(survey.usable)} records: {arguments.labels}")
    if copy:
        problems.attempt(lambda: copy.add(name, corpus, survey, repeated, console))
    if recipe.data.on_bad_record == "error":
        return bool(bad_records(recipe.data, survey))
    problems.attempt(lambda: refuse_bad(recipe.data, survey))
    return False


def read(recipe: Recipe, corpus: Corpus, name: str, console: Console) -> Survey:
    """Every record and every image, with a bar."""
    with console.bar(f"reading {name}", len(corpus)) as bar:
        return survey_records(corpus, workers=recipe.data.num_workers, decode=True, progress=bar.advance)


def summarise(console: Console, name: str, survey: Survey, repeated: dict[int, DataError], *, tokenised: bool) -> None:
    """Print the table of counts, and the errors in full."""
    lengths = survey.lengths[survey.usable]
    rows = [
        ["records", f"{len(survey.lengths):,}"],
        ["usable", f"{len(survey.usable):,}"],
        ["images", f"{int(survey.num_images.sum()):,}"],
        ["turns", f"{int(survey.num_turns.sum()):,}"],
        ["turns dropped to fit", f"{survey.num_dropped_turns:,}"],
        ["targets", f"{int(survey.num_targets.sum()):,}" if tokenised else "not tokenised"],
    ]
    if len(lengths) and tokenised:
        quantiles = np.quantile(lengths, (0.0, 0.5, 0.95, 1.0)).astype(int)
        rows.append(["tokens: least, median, 95 %, most", ", ".join(f"{q:,}" for q in quantiles)])
    rows += [[f"unusable: {kind}", f"{count:,}"] for kind, count in sorted(survey.errors_by_kind().items())]
    rows += [["usable, with the id of another", f"{len(repeated):,}"]] if repeated else []
    console.table(name, ["", ""], rows)
    for errors, most in ((survey.errors, _SHOWN_ERRORS), (repeated, _SHOWN_REPEATS)):
        for error in list(errors.values())[:most]:
            console.line(f"  {error}")
        if len(errors) > most:
            console.line(f"  and {len(errors) - most:,} more, all listed by --fix DIR")


def image_remarks(survey: Survey, data: DataTable) -> list[str]:
    """What the model sees of images that other programs show otherwise."""
    said: list[str] = []
    if count := survey.traits["turned"]:
        how = {
            "ignore": "They are read as they are stored, as LLaVA does; most programs, and load_image of transformers, "
            'turn them. To train on what those show, set data.exif = "apply"',
            "apply": 'They are turned, as data.exif = "apply" says; LLaVA does not turn them',
        }[data.exif]
        said.append(f"{count:,} images are to be turned, by their EXIF. {how}")
    if count := survey.traits["transparent"]:
        said.append(
            f"{count:,} images are transparent in parts, and are read with the colours that are hidden there, as LLaVA "
            'does. Processors of transformers lay them on white: give them image.convert("RGBA").convert("RGB")'
        )
    return said


def show_examples(console: Console, corpus: Corpus, usable: np.ndarray, processing: Processing, count: int) -> None:
    """Print a few examples, spread over the data: what is learned in bold green between ⟦ and ⟧, images as one mark."""
    if not len(usable):
        return
    console.line("examples (the model learns to write what is between ⟦ and ⟧):")
    for place in np.linspace(0, len(usable) - 1, min(count, len(usable))).astype(int):
        for example in corpus.encode(int(usable[place])).examples:
            check_labels(example, processing.image_token_id)
            console.rich.print(coloured(example, processing), soft_wrap=True)


def coloured(example: Example, processing: Processing) -> Text:
    """The example as text; after an answer that is one of several comes its weight."""
    text = Text("  ")
    for ids, learned in runs(example, processing.image_token_id):
        decoded = str(processing.processor.tokenizer.decode(ids))
        shown = printable(decoded).replace("\n", "\\n") if ids else f"[{processing.num_image_tokens} image tokens]"
        text.append(f"⟦{shown}⟧" if learned else shown, style="bold green" if learned else "dim")
    return text.append(f" x {example.weight:.2g}") if example.weight != 1 else text


def runs(example: Example, image_token_id: int) -> Iterator[tuple[list[int], bool]]:
    """Stretches of the example that are all learned or all not; an image is an empty stretch."""
    ids, start = example.input_ids, 0
    kinds = np.where(ids == image_token_id, 2, example.is_target.astype(int))
    for end in [*(np.nonzero(np.diff(kinds))[0] + 1), len(ids)]:
        yield ([] if kinds[start] == 2 else ids[start:end].tolist()), bool(kinds[start] == 1)
        start = int(end)


def check_labels(example: Example, image_token_id: int) -> None:
    """Assert what must never happen: no target at all, a target on an image, a target without a token before it."""
    targets = example.input_ids[example.is_target]
    assert len(targets), "an example without a target reached the model"
    assert not np.any(targets == image_token_id), "an image token is a target"
    assert not example.is_target[0], "the first token is a target"


def write_labels(path: Path, corpus: Corpus, usable: np.ndarray) -> None:
    """One line a usable record: {"id", "input_ids", "labels"}; image tokens expanded, -100 elsewhere, not shifted.

    With data.answers = "weighted" a line for each answer, with its "weight".
    """
    write_json_lines(
        (
            {
                "id": corpus.record(row).id,
                "input_ids": example.input_ids.tolist(),
                "labels": np.where(example.is_target, example.input_ids, -100).tolist(),
                **({"weight": example.weight} if example.weight != 1 else {}),
            }
            for row in usable.tolist()
            for example in corpus.encode(row).examples
        ),
        path,
    )


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel check RECIPE`."""
    if code := check(arguments):
        raise SystemExit(code)
