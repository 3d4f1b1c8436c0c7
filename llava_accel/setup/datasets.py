"""The recipe's data, opened, read through once, and split: what train, check, evaluate and plan start from."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from llava_accel import compat
from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import Encoder
from llava_accel.data.images import ImageReader
from llava_accel.data.loader import Loaded, cache_folder, load_windows
from llava_accel.data.problems import DataError
from llava_accel.data.sampler import Order, windows
from llava_accel.data.split import held_out
from llava_accel.data.survey import Survey, cached_survey, survey
from llava_accel.model.processing import Processing
from llava_accel.recipe import DataTable, Recipe
from llava_accel.runtime.signals import NEVER, Interruption
from llava_accel.setup.left_out import list_skipped, refuse_bad, report_left_out
from llava_accel.setup.state import TrainState


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
        processing.num_image_tokens,
        template=recipe.model.template,
        chat_template=processing.processor.chat_template,  # pyright: ignore[reportArgumentType]
        answers=recipe.data.answers,
        image_placement=recipe.data.image_placement,
        max_length=recipe.data.max_length,
        on_too_long=recipe.data.on_too_long,
    )


def open_corpora(recipe: Recipe, processing: Processing) -> tuple[Corpus, Corpus | None]:
    """The rows of data.train and of data.eval (None where the recipe names no file)."""
    encoder, cache_dir = build_encoder(recipe, processing), cache_folder(recipe.data.cache_dir)
    train, *evaluation = (Corpus(open_sources(named, cache_dir), encoder) for named in entries(recipe.data).values())
    return train, next(iter(evaluation), None)


def open_data(
    recipe: Recipe, processing: Processing, accelerator: Accelerator, console: Console
) -> tuple[Part, Part | None]:
    """Training data, and evaluation data where the recipe has some. The main process reads, the others find it read.

    Raises:
        DataError, UserError: a record cannot be used and the recipe says "error", or too many cannot.
    """
    with accelerator.main_process_first():
        train, evaluation = open_corpora(recipe, processing)
        found = read_through(recipe, processing, train, console)
        eval_found = found if evaluation is None else read_through(recipe, processing, evaluation, console)
    if accelerator.is_main_process:
        for some in [found] if evaluation is None else [found, eval_found]:
            report_left_out(recipe, some, console)
    image_reader = ImageReader(processing.processor.image_processor, recipe.data.image_aspect)
    rows, eval_rows = found.usable, eval_found.usable
    if recipe.data.eval_fraction:
        cache_dir = cache_folder(recipe.data.cache_dir)
        with accelerator.main_process_first():
            rows, eval_rows = held_out(train, rows, recipe.data.eval_fraction, recipe.run.seed, cache_dir)
    training = Part(corpus=train, survey=found, rows=rows, image_reader=image_reader)
    if evaluation is None and not recipe.data.eval_fraction:
        return training, None
    corpus = train if evaluation is None else evaluation
    return training, Part(corpus=corpus, survey=eval_found, rows=eval_rows, image_reader=image_reader)


def read_through(recipe: Recipe, processing: Processing, corpus: Corpus, console: Console) -> Survey:
    """The survey of a corpus, from the cache where it has been read before; refused as the recipe says.

    Raises:
        DataError, UserError: see `refuse_bad`.
    """

    def read() -> Survey:
        with console.bar("read data", len(corpus)) as bar:
            return survey(corpus, workers=recipe.data.workers, decode=False, progress=bar.advance)

    found = cached_survey(corpus, survey_key(recipe, processing), cache_folder(recipe.data.cache_dir), read)
    refuse_bad(recipe.data, found)
    return found


def survey_key(recipe: Recipe, processing: Processing) -> str:
    """Everything besides the files that decides what a record becomes."""
    data, processor = recipe.data, processing.processor
    settings = (
        compat.tokenizer_description(processor.tokenizer), processing.image_token_id, processing.num_image_tokens,
        recipe.model.template, processor.chat_template, data.image_placement, data.max_length, data.on_too_long,
        data.answers,
    )  # fmt: skip
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:20]


def build_order(recipe: Recipe, part: Part, num_ranks: int) -> Order:
    """The order of the training data for this many ranks; the global batch is what counts, not how it is split."""
    is_weighted = any(source.weight != 1 for source in part.corpus.sources)
    train = recipe.train
    return Order(
        lengths=part.survey.lengths[part.rows],
        seed=recipe.run.seed,
        global_batch_size=train.per_device_batch_size * train.accumulation_steps * num_ranks,
        group_by_length=recipe.data.group_by_length,
        repeats=part.corpus.weights[part.rows] if is_weighted else None,
        groups=_image_groups(part) if recipe.data.share_prefix else None,
    )


def train_windows(
    recipe: Recipe,
    part: Part,
    order: Order,
    state: TrainState,
    accelerator: Accelerator,
    enter: Callable[[str], None],
    interruption: Interruption = NEVER,
) -> Iterator[list[Loaded]]:
    """This rank's micro-batches of every step from where `state` stands to the end; `enter` is told of each phase.

    The end is the last step, or where `state.is_stopped` is set, or where the process is asked to end.
    """
    rank, size = accelerator.process_index, recipe.train.per_device_batch_size
    steps = windows(order, state.step, state.num_steps, per_device_batch_size=size, num_ranks=accelerator.num_processes)
    mine = ([part.rows[micro_batch].tolist() for micro_batch in step[rank]] for step in steps)

    def on_error(error: DataError) -> None:
        if recipe.data.on_bad_record == "error":
            raise error
        list_skipped(Path(recipe.run.output_dir) / "skipped.txt", [error])

    loaded = load_windows(
        part.corpus,
        part.image_reader,
        mine,
        workers=recipe.data.workers,
        device=accelerator.device,
        on_error=on_error,
        share_up_to=recipe.data.max_length if recipe.data.share_prefix else 0,
        enter=enter,
        pack=recipe.model.attention != "flash_attention_2",
    )
    return itertools.takewhile(lambda _: not state.is_stopped, interruption.until(loaded, accelerator))


def _image_groups(part: Part) -> np.ndarray:
    """A number for each row that is equal for records of the same images; a text-only record stands alone."""
    keys = part.survey.image_keys[part.rows]
    _, groups = np.unique(keys, return_inverse=True)
    (alone,) = np.nonzero(keys == 0)
    groups[alone] = len(keys) + np.arange(len(alone))
    return groups


def entries(data: DataTable) -> dict[str, list[tuple[str, str, float]]]:
    """(path, folder of images, weight) of every source of data.train, and of data.eval where it is set."""
    if isinstance(data.train, str):
        train = [(data.train, data.images, 1.0)]
    else:
        train = [(source.path, source.images or data.images, source.weight) for source in data.train]
    return {"data.train": train} | ({"data.eval": [(data.eval, data.images, 1.0)]} if data.eval else {})
