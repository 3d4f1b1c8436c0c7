"""Opens the recipe's data, reads it through once, and splits it: train, check, evaluate and plan start from that.

Records that are not used are refused or listed, so that the user knows of each.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from accelerate.utils import broadcast_object_list
from jaxtyping import Int

from llava_accel import compat
from llava_accel.console.output import Console, note, printable
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import Encoder
from llava_accel.data.image_digests import images_digest
from llava_accel.data.own_rows import open_reader
from llava_accel.data.pixels import ImageReader
from llava_accel.data.row_forms import RowForm
from llava_accel.data.sampler import Order, image_groups
from llava_accel.data.split import held_out
from llava_accel.data.survey import Survey, cached_survey, survey
from llava_accel.exceptions import UserError
from llava_accel.model.processing import Processing
from llava_accel.own_code import own_line
from llava_accel.recipe import DataTable, Recipe
from llava_accel.recipe.inputs import Source as NamedSource
from llava_accel.runtime.context import RunContext
from llava_accel.setup.remote_images import fetch_images
from llava_accel.setup.run_folder import SKIPPED
from llava_accel.sources.named import EVAL_SPLITS, Named
from llava_accel.sources.problems import DataError, quoted
from llava_accel.storage.jsonl import append_whole
from llava_accel.storage.kept_files import cache_folder

_FEW = 10  # records: with fewer, equal answers mean nothing
_NEARLY_ALL = 0.9


@dataclass(frozen=True, kw_only=True)
class Part:
    """Training or evaluation data: the corpus, and which of its rows are used."""

    corpus: Corpus
    survey: Survey
    rows: np.ndarray
    image_reader: ImageReader

    def __len__(self) -> int:
        return len(self.rows)


def build_encoder(recipe: Recipe, processing: Processing) -> Encoder:
    """The recipe's template, lengths and placement over the base's tokenizer."""
    return Encoder(
        processing.processor.tokenizer,
        processing.image_token_id,
        processing.tiling,
        template=recipe.model.template,
        chat_template=processing.processor.chat_template,  # pyright: ignore[reportArgumentType]
        answers="pairs" if recipe.train.objective == "dpo" else recipe.data.answers,
        labels=recipe.data.labels,
        image_placement=image_placement(recipe.data, processing),
        max_length=recipe.data.max_length,
        on_too_long=recipe.data.on_too_long,
        words=processing.words,
        num_rows=processing.vocab_size,
        exif=recipe.data.exif,
    )


def image_placement(data: DataTable, processing: Processing) -> Literal["start", "start_if_single", "in_place"]:
    """data.image_placement; for "auto" what the code of the base's family does."""
    return processing.base.family.image_placement if data.image_placement == "auto" else data.image_placement


def row_form(recipe: Recipe, console: Console | None = None) -> RowForm:
    """The form in which the recipe has rows read.

    Args:
        console: Prints a line about the user's own reader, if there is one.

    Raises:
        UserError: the reader cannot be loaded.
    """
    data, pairs = recipe.data, recipe.train.objective == "dpo"
    if data.reader and console:
        console.line(own_line("data.reader", data.reader))
    return RowForm(tuple(sorted(data.columns.items())), data.missing_image_mark, pairs, open_reader(data.reader))


def build_image_reader(data: DataTable, processing: Processing) -> ImageReader:
    """A reader of images that applies the recipe's image_aspect and exif, then the tower's image processor."""
    processor, aspect = processing.processor.image_processor, processing.square_aspect
    return ImageReader(processor, aspect, data.exif, processing.tiling)  # pyright: ignore[reportArgumentType]


def open_corpora(
    recipe: Recipe, processing: Processing, console: Console | None = None
) -> tuple[Corpus, Corpus | None]:
    """The rows of data.train and of data.eval (None where the recipe names no file)."""
    encoder, cache_dir = build_encoder(recipe, processing), cache_folder(recipe.data.cache_dir)
    form = row_form(recipe, console)
    train, *evaluation = (
        Corpus(open_sources(named, cache_dir), encoder, form) for named in entries(recipe.data).values()
    )
    return train, next(iter(evaluation), None)


def open_data(run: RunContext, processing: Processing) -> tuple[Part, Part | None]:
    """Training data, and evaluation data where the recipe has some. The main process reads it through, the others use the
    cached result.

    Raises:
        DataError, UserError: a record cannot be used and the recipe says "error", or too many cannot.
    """
    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    with accelerator.main_process_first():
        train, evaluation = open_corpora(recipe, processing, console)
        train_survey = read_through(recipe, processing, train, console)
        eval_survey = train_survey if evaluation is None else read_through(recipe, processing, evaluation, console)
    if accelerator.is_main_process:
        read = [(train, train_survey)] + ([] if evaluation is None else [(evaluation, eval_survey)])
        for (corpus, each), name in zip(read, entries(recipe.data), strict=True):
            report_left_out(recipe, each, console)
            for remark in remarks(corpus, each):
                console.line(f"note: {name}: {remark}")
    image_reader = build_image_reader(recipe.data, processing)
    rows, eval_rows = train_survey.usable, eval_survey.usable
    if recipe.data.eval_fraction:
        cache_dir = cache_folder(recipe.data.cache_dir)
        with accelerator.main_process_first():
            rows, eval_rows = held_out(train, rows, recipe.data.eval_fraction, recipe.run.seed, cache_dir)
    training = Part(corpus=train, survey=train_survey, rows=rows, image_reader=image_reader)
    if evaluation is None and not recipe.data.eval_fraction:
        return training, None
    corpus = train if evaluation is None else evaluation
    check_choices(recipe, corpus, eval_rows)
    return training, Part(corpus=corpus, survey=eval_survey, rows=eval_rows, image_reader=image_reader)


def check_choices(recipe: Recipe, corpus: Corpus, rows: Int[np.ndarray, "rows"]) -> None:
    """Raise UserError if eval.metric is multiple_choice, and none of the rows to evaluate has choices."""
    if recipe.eval.metric == "multiple_choice" and not any(corpus.record(int(row)).choices for row in rows):
        raise UserError(
            'eval.metric = "multiple_choice", and no evaluation record has "choices". Add them to the records, or choose '
            "another metric"
        )


def read_through(recipe: Recipe, processing: Processing, corpus: Corpus, console: Console) -> Survey:
    """The survey of a corpus, from the cache where it has been read before. Raises as `refuse_bad` does."""
    fetch_images(corpus, recipe.data, console)

    def read() -> Survey:
        with console.bar("read data", len(corpus)) as bar:
            return survey(corpus, workers=recipe.data.num_readers, decode=False, progress=bar.advance)

    result = cached_survey(corpus, survey_key(recipe, processing), cache_folder(recipe.data.cache_dir), read)
    refuse_bad(recipe.data, result)
    return result


def refuse_bad(data: DataTable, survey: Survey) -> None:
    """Raise if there are records that cannot be used, unless the recipe leaves them out and they are few: DataError about
    the first of them, with the number of the others, or UserError if no record is left."""
    bad = bad_records(data, survey)
    if not bad:
        if not len(survey.usable):
            raise UserError("[data]: no record of the file is left to use. Raise data.max_length, or check the file")
        return
    first, total = bad[0], len(survey.lengths)
    others = [f"{len(bad) - 1} more of {total} records cannot be used"] if len(bad) > 1 else []
    if longest := max(error.tokens for error in bad):
        others.append(f"data.max_length = {longest} takes all that are too long")
    if data.on_bad_record == "error":
        remedy = '`llava-accel check RECIPE` lists them all; data.on_bad_record = "skip" leaves them out'
    elif len(bad) > data.max_bad * total:
        remedy = f"That is more than data.max_bad = {data.max_bad} allows. Raise it, or write a copy without them: "
        remedy += "`llava-accel check RECIPE --fix DIR`"
    elif not len(survey.usable):
        remedy = "No record is left"
    else:
        return
    raise first.with_note(". ".join([*others, remedy]))


def bad_records(data: DataTable, survey: Survey) -> list[DataError]:
    """The errors of records, without those that data.on_too_long or data.reader leaves out.

    data.max_bad does not limit the latter: their number is the user's choice.
    """
    wanted = {"left_out", *(["too_long"] if data.on_too_long == "skip" else [])}
    return [error for error in survey.errors.values() if error.kind not in wanted]


def report_left_out(recipe: Recipe, survey: Survey, console: Console) -> None:
    """Print how much of the data is not used and why, and list the records in the run folder."""
    if survey.num_dropped_turns:
        console.line(f"data.on_too_long: {survey.num_dropped_turns:,} turns were dropped to fit data.max_length")
    if not survey.errors:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in survey.errors_by_kind().most_common())
    path = Path(recipe.run.output_dir) / SKIPPED
    console.line(f"left out: {len(survey.errors):,} of {len(survey.lengths):,} records ({kinds}), listed in {path}")
    list_skipped(path, survey.errors.values())


def remarks(corpus: Corpus, survey: Survey) -> list[str]:
    """What is odd about records that can be used: turns without a partner, images that are too thin, rejected answers that
    are not learned from, duplicates in one file or in several, and an answer that nearly all of them have."""
    said: list[str] = []
    usable = survey.usable
    if survey.num_unpaired_turns:
        said.append(
            f"{survey.num_unpaired_turns:,} turns dropped: a leading answer or a trailing question has no partner"
        )
    if survey.num_vanished:
        said.append(
            f"{survey.num_vanished:,} images are strips so thin that their tiles leave no token, as with LLaVA itself: the "
            "model sees them only squeezed into a square. Crop them, or paste them onto a wider canvas"
        )
    if survey.num_ignored:
        said.append(
            f"{survey.num_ignored:,} rejected answers are not learned from: the chosen ones alone are. To learn which of "
            'two answers is preferred, set train.objective = "dpo", with the keys of recipes/dpo_lora.toml'
        )
    _, first, numbers = np.unique(survey.record_keys[usable], return_index=True, return_inverse=True)
    is_again = np.ones(len(usable), dtype=bool)
    is_again[first] = False
    again = np.flatnonzero(is_again)
    if len(again):
        one, other = (corpus.place(int(usable[place])) for place in (first[numbers[again[0]]], again[0]))
        said.append(
            f"{len(again):,} records equal an earlier one in texts and images, such as {other}, which equals {one}. "
            "Each is learned as often as it occurs"
        )
    _, commonest = common_answers(corpus, survey, usable, 1)
    if len(usable) >= _FEW and commonest[0][1] >= _NEARLY_ALL * len(usable):
        answer, count = commonest[0]
        said.append(
            f"{count / len(usable):.0%} of the records end in the answer {quoted(answer)}: a model that always says "
            "so is right as often. Take more of the others, or compare every score with that"
        )
    return said


def common_answers(
    corpus: Corpus, survey: Survey, rows: Int[np.ndarray, "rows"], most: int
) -> tuple[int, list[tuple[str, int]]]:
    """How many different answers these rows end in, and the `most` most frequent ones, each with its number of rows."""
    answers = survey.answer_keys[rows]
    keys, counts = np.unique(answers, return_counts=True)
    places = np.argsort(-counts, kind="stable")[:most]
    # From the encoded record, not from the row: its last turns may have been dropped.
    texts = [
        corpus.encode(int(rows[np.argmax(answers == keys[place])])).record.turns[-1].text.strip() for place in places
    ]
    return len(counts), list(zip(texts, counts[places].tolist(), strict=True))


def list_skipped(path: Path, errors: Iterable[DataError]) -> None:
    """Add records to the list of those left out, each once, however often the run starts or meets it. If the list cannot be
    written, a note says so."""
    try:
        known = set(path.read_bytes().decode(errors="replace").split("\n")) if path.exists() else set()
        new = [line for error in errors if (line := printable(str(error))) not in known]
        path.parent.mkdir(parents=True, exist_ok=True)
        append_whole(path, "".join(f"{line}\n" for line in new))
    except OSError as error:
        note(f"{path} cannot be written ({error.strerror}), and lacks records that are left out")


def survey_key(recipe: Recipe, processing: Processing) -> str:
    """A digest of everything besides the files that decides what a record becomes."""
    data, processor = recipe.data, processing.processor
    settings = (
        compat.tokenizer_backend(processor.tokenizer).to_str(), processing.image_token_id, processing.tiling,
        recipe.model.template, processor.chat_template, image_placement(data, processing), data.max_length, data.on_too_long,
        data.answers, data.labels, data.exif, processing.words,
    )  # fmt: skip
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:20]


def build_order(recipe: Recipe, part: Part, num_ranks: int) -> Order:
    """The order of the training data for this many ranks; the global batch is what counts, not how it is split.

    Raises:
        UserError: the weights of data.train leave no example in an epoch.
    """
    is_weighted = any(source.weight != 1 for source in part.corpus.sources)
    train = recipe.train
    order = Order(
        lengths=part.survey.lengths[part.rows],
        seed=recipe.run.seed,
        global_batch_size=train.per_device_batch_size * train.accumulation_steps * num_ranks,
        shuffle=recipe.data.shuffle,
        group_by_length=recipe.data.group_by_length,
        repeats=part.corpus.weights[part.rows] if is_weighted else None,
        groups=image_groups(part.survey.image_keys[part.rows]) if recipe.data.share_prefix else None,
    )
    if not order.examples_per_epoch:
        problem = f"data.train: the weights leave none of the {len(part.rows):,} records in an epoch"
        raise UserError(f"{problem}. Raise them: 1 is each record once")
    return order


def content(run: RunContext, part: Part) -> str:
    """Digests of what records and images hold, wherever they are. Only the main process reads; every rank must call it."""
    own = [content_here(run.recipe, part) if run.accelerator.is_main_process else ""]
    return broadcast_object_list(own)[0]


def content_here(recipe: Recipe, part: Part) -> str:
    """`content` without other ranks."""
    images = images_digest(part.corpus, part.survey.image_keys, cache_folder(recipe.data.cache_dir))
    return f"{part.corpus.fingerprint()} {images[:20]}"


def entries(data: DataTable) -> dict[str, list[Named]]:
    """Every source of data.train, and of data.eval where it is set."""
    named = {"data.train": _named(data.train, data.images, ("train",))}
    return named | ({"data.eval": _named(data.eval, data.images, EVAL_SPLITS)} if data.eval else {})


def _named(sources: str | Sequence[NamedSource], images: str, splits: tuple[str, ...]) -> list[Named]:
    if isinstance(sources, str):
        return [Named(sources, images, splits=splits)]
    return [
        Named(
            each.path, each.images or images, each.weight, each.limit, each.config,
            (each.split,) if each.split else splits, each.revision,
        )
        for each in sources
    ]  # fmt: skip
