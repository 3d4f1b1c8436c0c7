"""Check what a recipe names without building the model: recipe, model files, run folder, and every record of the data.

Every record is tokenised and every image decoded, in parallel. Of the model, configs, tokenizer, and names, shapes and
values of weights are checked. All problems are reported in one pass. In the examples that are shown, what the model is
trained to write is coloured. Only `--probe` builds the model, and takes two steps.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("check")  # before the imports below, so that help and mistakes are answered at once


import argparse
import json
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llava_accel.advice.folders import folder_remarks
from llava_accel.console.command_line import say_error
from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.data.split import held_out
from llava_accel.data.survey import Survey
from llava_accel.data.survey import survey as survey_records
from llava_accel.exceptions import UserError
from llava_accel.inspection.against import lines_to_mend
from llava_accel.inspection.clean_copy import CleanCopy
from llava_accel.inspection.data_facts import Checked
from llava_accel.inspection.data_page import write_data_page
from llava_accel.inspection.duration import hours, length
from llava_accel.inspection.learned import write_labels
from llava_accel.inspection.overlap import overlap
from llava_accel.inspection.preflight import Problems, examine_model, examine_position, examine_run, missing_trackers
from llava_accel.inspection.repeated_ids import repeated_ids
from llava_accel.inspection.summary import image_remarks, show_examples, summarise
from llava_accel.inspection.tokens_in_texts import tokens_in_texts, watched
from llava_accel.loop.machine import print_own_code
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe, RecipeError
from llava_accel.scoring.harmful import Records
from llava_accel.setup.datasets import (
    Part,
    bad_records,
    build_encoder,
    build_image_reader,
    check_choices,
    entries,
    refuse_bad,
    remarks,
    row_form,
)
from llava_accel.setup.remote_images import fetch_images
from llava_accel.sources.problems import DataError
from llava_accel.storage.atomic import check_out
from llava_accel.storage.jsonl import write_json_lines
from llava_accel.storage.kept_files import cache_folder

_MODEL = ("model.base", "model.language_model", "model.vision_tower", "model.projector", "model.adapter", "model.train")


@dataclass(kw_only=True)
class Check:
    """One call of `check`: what was asked, the console to report to, and what was found."""

    recipe: Recipe
    arguments: argparse.Namespace
    console: Console
    processing: Processing | None
    """None if the model cannot be used; then records and images are read, and nothing is tokenised."""
    source: Path | None
    """The checkpoint that the run resumes from."""
    problems: Problems = field(default_factory=Problems)
    """Problems of cache, template and settings."""
    unreadable: list[DataError] = field(default_factory=list)
    """Files that cannot be opened."""
    copy: CleanCopy | None = None
    parts: list[Checked] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Notes on all of the data, and on the run."""
    duration: str = ""
    has_bad_rows: bool = False
    """Whether records are wrong, besides those that the recipe leaves out."""


def check(arguments: argparse.Namespace) -> int:
    """Report on recipe, model, run folder, training and evaluation data.

    Returns:
        The exit code: 0 if all records can be used (or the recipe leaves the others out), 1 if records are wrong, 2 if
        anything else is.

    Raises:
        UserError: a file that the command line names cannot be written.
    """
    console = Console()
    for flag, example in (("labels", "labels.jsonl"), ("html", "data.html"), ("mend", "mend.jsonl")):
        if path := getattr(arguments, flag):
            check_out(Path(path), f"--{flag}", example)
    recipe: Recipe = arguments.loaded
    wrong: RecipeError | None = arguments.wrong  # was printed when the recipe was read
    is_unknown = wrong and wrong.is_about("run.name", "run.output_dir", "run.resume")
    source, problems = (None, []) if is_unknown else examine_run(recipe, console)
    processing = None
    if not (wrong and wrong.is_about(*_MODEL)):
        processing, model_problems = examine_model(recipe, console, source)
        problems += model_problems
    for message in problems:
        say_error(UserError(message))
    if wrong and wrong.is_about("data.train", "data.images", "data.eval", "data.cache_dir"):
        return 2
    task = Check(recipe=recipe, arguments=arguments, console=console, processing=processing, source=source)
    check_data(task)
    if wrong or problems or task.unreadable or task.problems.messages:
        write_page(task, command("check", arguments.recipe, *arguments.overrides))
        return 2
    following = what_follows(task)
    write_page(task, following)
    console.line(f"next: {following}")
    return 1 if task.has_bad_rows else 0


def what_follows(task: Check) -> str:
    """The command that comes next, with this call's overrides."""
    words = [task.arguments.recipe, *task.arguments.overrides]
    if not task.has_bad_rows:
        return command("train", *words)
    if not task.copy:
        return f"correct the records, or write a copy without them: {command('check', *words)} --fix DIR"
    return command("train", *words, *task.copy.overrides(task.recipe.data))


def command(verb: str, *words: str) -> str:
    """A line for the shell."""
    return shlex.join(["llava-accel", verb, *words])


def check_data(task: Check) -> None:
    """Read all records and report on them, and print problems with files, cache, template and settings."""
    recipe, problems = task.recipe, task.problems
    task.copy = CleanCopy(Path(task.arguments.fix)) if task.arguments.fix else None
    processing = task.processing
    encoder = problems.attempt(lambda: build_encoder(recipe, processing)) if processing else None
    form = problems.attempt(lambda: row_form(recipe, task.console))
    with tempfile.TemporaryDirectory() as spare:
        cache_dir = problems.attempt(lambda: cache_folder(recipe.data.cache_dir)) or Path(spare)
        for name, named in entries(recipe.data).items():
            if form and (sources := open_sources(named, cache_dir, task.unreadable)):
                corpus = Corpus(sources, encoder or find_images, form)
                check_corpus(task, name, corpus, processing if encoder else None)
        problems.attempt(lambda: check_run(task, cache_dir))
    for message in (*map(str, task.unreadable), *problems.messages):
        say_error(UserError(message))


def check_corpus(task: Check, name: str, corpus: Corpus, processing: Processing | None) -> None:
    """Read the records of `data.train` or `data.eval`, and report on them."""
    recipe, problems = task.recipe, task.problems
    fetch_images(corpus, recipe.data, task.console, refuses=False)
    survey = problems.attempt(lambda: read(task, name, corpus, processing))
    if survey is None:  # the template cannot be used with this tokenizer
        corpus, processing = Corpus(corpus.sources, find_images, corpus.form), None
        survey = read(task, name, corpus, None)
    checked = Checked(
        name=name,
        corpus=corpus,
        survey=survey,
        processing=processing,
        repeated=repeated_ids(corpus, survey),
        notes=[*remarks(corpus, survey), *image_remarks(survey, recipe.data), *folder_remarks(corpus, survey)],
    )
    task.parts.append(checked)
    report(task, checked)
    if copy := task.copy:
        problems.attempt(lambda: copy.add(checked, task.console))
    if recipe.data.on_bad_record == "error" and bad_records(recipe.data, survey):
        task.has_bad_rows = True
    else:
        problems.attempt(lambda: refuse_bad(recipe.data, survey))


def report(task: Check, checked: Checked) -> None:
    """Print counts, errors, notes and examples, and write the file of --labels."""
    console, usable = task.console, checked.survey.usable
    summarise(console, checked)
    for note in checked.notes:
        console.line(f"note: {note}")
    if processing := checked.processing:
        for line in tokens_in_texts(checked.survey.mentions, processing):
            console.line(f"  {line}")
            checked.notes.append(line)
    show_examples(console, checked, task.arguments.show)
    if checked.processing and task.arguments.labels and checked.name == "data.train":
        write_labels(Path(task.arguments.labels), checked.corpus, usable)
        console.line(f"labels of {len(usable)} records: {task.arguments.labels}")


def read(task: Check, name: str, corpus: Corpus, processing: Processing | None) -> Survey:
    """Read every record and every image, with a progress bar."""
    with task.console.bar(f"reading {name}", len(corpus)) as bar:
        return survey_records(
            corpus,
            workers=task.recipe.data.num_readers,
            decode=True,
            progress=bar.advance,
            watched=watched(processing) if processing else (),
        )


def check_run(task: Check, cache_dir: Path) -> None:
    """Say what training and evaluation share, how long the run is, and which trackers are not installed.

    Raises:
        UserError: data.eval_fraction leaves one side without a record; or the two steps of --probe cannot be taken.
    """
    recipe = task.recipe
    task.problems.attempt(lambda: print_own_code(recipe, task.console))
    task.notes += missing_trackers(recipe.log.trackers)
    training = next((part for part in task.parts if part.name == "data.train"), None)
    evaluation = next((part for part in task.parts if part.name == "data.eval"), None)
    rows = training.survey.usable if training else np.zeros(0, dtype=np.int64)
    if training and len(rows):
        eval_rows = evaluation.survey.usable if evaluation else rows[:0]
        if recipe.data.eval_fraction:
            rows, eval_rows = held_out(training.corpus, rows, recipe.data.eval_fraction, recipe.run.seed, cache_dir)
        judged = evaluation or training
        if len(eval_rows):
            task.problems.attempt(lambda: check_choices(recipe, judged.corpus, eval_rows))
        task.notes += overlap(training, rows, judged, eval_rows)
        if task.arguments.against:
            task.problems.attempt(lambda: say_harmful(task, training, rows, judged, eval_rows))
    for note in task.notes:
        task.console.line(f"note: {note}")
    if training and training.processing and len(rows):
        reader = build_image_reader(recipe.data, training.processing)
        part = Part(corpus=training.corpus, survey=training.survey, rows=rows, image_reader=reader)
        say_duration(task, training.processing, part)
        if (source := task.source) and not task.arguments.wrong:
            task.problems.attempt(lambda: examine_position(recipe, source, part))


def say_harmful(task: Check, training: Checked, rows: np.ndarray, evaluation: Checked, eval_rows: np.ndarray) -> None:
    """List the records that a run has shown to be worth a look; UserError if --against is not a run, or damaged."""
    sides = [Records(each.corpus, each.survey, some) for each, some in ((training, rows), (evaluation, eval_rows))]
    lines, remarks = lines_to_mend(task.arguments.against, *sides)
    for remark in remarks:
        task.console.line(f"against {task.arguments.against}: {remark}")
    if path := task.arguments.mend:
        write_json_lines(lines, path)
        task.console.line(f"records to look at: {path}")
    else:
        print("".join(json.dumps(line) + "\n" for line in lines), end="")


def say_duration(task: Check, processing: Processing, part: Part) -> None:
    """Print steps and epochs, and with --probe the hours."""
    task.duration = length(task.recipe, part)
    task.console.line(f"run: {task.duration}")
    if task.arguments.probe and not task.arguments.wrong:
        seconds, whole = hours(task.recipe, processing, part)
        time = f"{whole:.1f} hours" if whole >= 1 else f"{60 * whole:.1f} minutes"
        task.console.line(
            f"probe: {seconds:.3g} seconds per step, {time} in all on this machine, without evaluations and saving"
        )


def write_page(task: Check, following: str) -> None:
    """Write the page of --html, if it was asked for."""
    if path := task.arguments.html:
        of_model = [note.removeprefix("note: ") for note in (task.processing.notes if task.processing else ())]
        notes = [*of_model, *task.notes]
        write_data_page(path, task.recipe, task.parts, duration=task.duration, notes=notes, following=following)
        task.console.line(f"page: {path}")


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel check RECIPE`."""
    if code := check(arguments):
        raise SystemExit(code)
