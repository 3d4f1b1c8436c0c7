"""Write the vision tower's features of all images to disk, ahead of the run.

Training and evaluation fill the same cache by themselves, in their first pass over the data. If it is filled before, the
first epoch does not run the tower. On several ranks each takes its part of the images. `--list` shows what is in the cache,
`--clear` empties it.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("cache")  # before the imports below, so that help and mistakes are answered at once


import argparse
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from llava_accel.console.output import Console
from llava_accel.data.collate import stack_images
from llava_accel.data.feature_store import turn
from llava_accel.data.loader import in_shared_memory, worker_start
from llava_accel.data.pixels import ImageReader, LoadedImage
from llava_accel.data.tiling import ImageView
from llava_accel.exceptions import UserError
from llava_accel.model.objective import Objective
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import autocast, build_accelerator
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, open_data
from llava_accel.setup.vision_cache import attach_features, may_cache
from llava_accel.sources.problems import DataError
from llava_accel.storage.kept_files import cache_folder, contents, file_status

_AT_ONCE = 32  # images
_PATIENCE_S = 10.0  # for a process that writes features


def cache(recipe: Recipe) -> int:
    """Compute and keep the features of every image of the recipe that has none yet, as far as they fit.

    Returns:
        Images whose features are stored now.

    Raises:
        UserError: the recipe trains the tower or switches the cache off; or an image is broken.
    """
    if not may_cache(recipe):
        raise UserError(
            f"data.cache_features = {str(recipe.data.cache_features).lower()}, model.train_vision = "
            f"{str(recipe.model.train_vision).lower()}: this recipe stores no features. Set data.cache_features = true "
            "and model.train_vision = false"
        )
    # "auto" keeps none if not all of them fit; here as many are kept as fit.
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache_features": True})})
    accelerator = build_accelerator(recipe)
    console = Console(accelerator.is_main_process)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    run = RunContext(recipe, accelerator, console)
    parts = [part for part in open_data(run, processing) if part is not None]
    objective, _ = build_objective(run, processing)
    objective.to(accelerator.device)
    attach_features(run, processing, objective, parts)
    store, writer = parts[0].image_reader.store, objective.features
    if store is None or writer is None:  # a note has said why
        raise UserError("data.cache_dir: features cannot be written there. Name a folder that can be written")
    _fill(run, objective, image_views(parts), parts[0].image_reader)
    objective.flush_features()
    accelerator.wait_for_everyone()
    console.line(f"vision features: {len(store):,} images, {store.num_bytes() / 1e9:,.2f} GB in {store.folder}")
    if writer.problem:
        raise UserError(
            f"data.cache_dir: the others could not be stored in {store.folder} ({writer.problem}). Make room there, end the "
            "process that keeps its lock, or name another folder"
        )
    if writer.is_full:
        console.line(
            f"they do not all fit into data.cache_max_gb = {recipe.data.cache_max_gb:g}: the others are computed in "
            f"every epoch. {store.root} also holds features of other towers, which may be deleted"
        )
    return len(store)


def image_views(parts: list[Part]) -> list[ImageView]:
    """Every different image that is used, once for each way in which it is seen."""
    rows = ((part, int(row)) for part in parts for row in part.rows[part.survey.num_images[part.rows] > 0])
    return list(dict.fromkeys(view for part, row in rows for view in part.corpus.encode(row).example.images))


def _fill(run: RunContext, objective: Objective, views: list[ImageView], image_reader: ImageReader) -> None:
    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    mine = views[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad(), autocast(recipe, accelerator), console.bar("vision features", len(mine)) as bar:
        for images in _load(mine, image_reader, recipe):
            missing = [image for image in images if not image.is_encoded]
            if missing and objective.features is not None and not objective.features.is_full:
                fields = stack_images(missing, image_reader.shape)
                objective.encode(fields["pixel_values"], fields["image_names"].to(accelerator.device))
            bar.advance(len(images))


class _Images(Dataset[LoadedImage | DataError]):
    def __init__(self, views: list[ImageView], image_reader: ImageReader) -> None:
        self._views, self._image_reader = views, image_reader

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, place: int) -> LoadedImage | DataError:
        try:
            return self._image_reader.load(self._views[place])
        except DataError as error:  # raised in a worker it would lose its message
            return error


def _load(views: list[ImageView], image_reader: ImageReader, recipe: Recipe) -> Iterator[list[LoadedImage]]:
    workers = recipe.data.num_workers
    loader = DataLoader(
        _Images(views, image_reader),
        _AT_ONCE,
        num_workers=workers,
        collate_fn=in_shared_memory,
        worker_init_fn=worker_start(workers),
    )
    for loaded in loader:
        for error in loaded:
            if isinstance(error, DataError) and recipe.data.on_bad_record == "error":
                raise error
        yield [image for image in loaded if isinstance(image, LoadedImage)]


def show(folder: Path, console: Console) -> None:
    """Print what is in a cache: files, size, and when the last one was written."""
    rows: list[list[str]] = []
    total = 0.0
    for what, files in contents(folder).items():
        sizes, times, _ = zip(*map(file_status, files), strict=True)
        last = datetime.fromtimestamp(max(0, *times) / 1e9).strftime("%Y-%m-%d %H:%M")
        rows.append([what, f"{len(files):,}", f"{_megabytes(sizes):,.1f}", last])
        total += _megabytes(sizes)
    rows.append(["all", "", f"{total:,.1f}", ""])
    console.table(f"cache: {folder}", ["", "files", "MB", "last written"], rows)


def _megabytes(sizes: Iterable[int]) -> float:
    """Megabytes of files; the size of one that has gone meanwhile is given as -1, and counts as 0."""
    return sum(max(0, size) for size in sizes) / 1e6


def clear(folder: Path, console: Console) -> None:
    """Remove the files of a cache, and nothing else that may be in its folder.

    Raises:
        UserError: another process holds its lock.
        OSError: a file cannot be removed.
    """
    features = folder / "features"
    try:
        with turn(features, _PATIENCE_S) if features.is_dir() else nullcontext():
            files = [file for some in contents(folder).values() for file in some]
            size = _megabytes(file_status(file)[0] for file in files)
            for file in files:
                file.unlink(missing_ok=True)
    except TimeoutError as error:
        raise UserError(
            f"{features}: {error.strerror}. End the process that writes there, and repeat the command"
        ) from None
    console.line(f"removed {len(files):,} files, {size:,.1f} MB, from {folder}")


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel cache RECIPE`."""
    recipe: Recipe | None = arguments.loaded
    if not (arguments.list or arguments.clear):
        assert recipe is not None
        cache(recipe)
        return
    folder = cache_folder(recipe.data.cache_dir if recipe else "")
    if arguments.list:
        show(folder, Console())
    if arguments.clear:
        clear(folder, Console())
