"""How fast WebDataset shards open, as a run opens them, and how fast samples are found in them.

    python tests/bench/shards.py FOLDER --shards 1000 --samples 10000 --different 100

Shards are as img2dataset writes them: an image, its caption and a .json with its address for each sample. Images have a few
bytes, as what is timed is the index, not the disk. Only some shards are different, and the others are links to them: these
are indexed and read through as they are, and what is found is repeated for the links. Each stage is a process of its own.
Seconds are the processor's, with those of workers; "own" is memory of the process alone (RssAnon), "peak" with mapped pages
of files, both with the 0.4 GB that Python and the libraries take.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.runs import recipe as make_recipe
from llava_accel.console.output import Console
from llava_accel.data.corpus import open_sources
from llava_accel.data.loader import load_windows
from llava_accel.data.sampler import windows
from llava_accel.data.survey import COLUMNS, Survey, cached_survey
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import build_order, content, open_corpora, open_data, read_through, survey_key
from llava_accel.setup.header import print_header
from llava_accel.sources.named import Named
from llava_accel.storage.kept_files import cache_folder

_LOOKS = 10_000
_WORDS = "a large red square beside some people standing near an old tree on the left side of this street".split()


def make(folder: Path, shards: int, samples: int, different: int) -> None:
    """Write the shards."""
    draw = random.Random(0)
    for name in ("different", "shards"):
        (folder / name).mkdir(parents=True)
    for shard in range(shards):
        path = folder / "different" / f"{shard % different:05d}.tar"
        (folder / "shards" / f"{shard:05d}.tar").symlink_to(path.resolve())
        if shard >= different:
            continue
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(samples):
                key, caption = f"{shard:05d}{number:06d}", " ".join(draw.choices(_WORDS, k=draw.randint(3, 12)))
                about = {
                    "url": f"https://images.invalid/{key}.ppm",
                    "caption": caption,
                    "key": key,
                    "width": 2,
                    "height": 2,
                }
                members = {"ppm": b"P6 2 2 255\n" + key.encode().ljust(12), "txt": caption.encode()}
                for suffix, part in (members | {"json": json.dumps(about).encode()}).items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))


def setting(folder: Path, shards: str) -> tuple[Recipe, Processing]:
    """A recipe on these shards, with batches of 128 examples."""
    data = {"cache_dir": str(folder / "cache"), "workers": 2, "images": ""}
    train = {"per_device_batch_size": 16, "accumulation_steps": 8}
    made = make_recipe(folder, folder / shards, train=train, data=data)
    return made, load_processing(made.model, made.data.image_aspect)


def index(folder: Path) -> None:
    """The table of each shard, made once."""
    sources, seconds = timed("index", lambda: open_sources([Named(str(folder / "different"))], folder / "cache"))
    rows = sum(map(len, sources))
    print(f"  {rows:,} samples in {len(sources):,} shards, {rows / seconds:,.0f} samples a second", flush=True)


def read(folder: Path) -> None:
    """All else that the first start reads: records and headers of images. Kept for all shards."""
    recipe, processing = setting(folder, "different")
    few, _ = open_corpora(recipe, processing)
    found, seconds = timed("read", lambda: read_through(recipe, processing, few, Console(False)))
    assert len(found.usable) == len(few)
    print(f"  {len(few) / seconds:,.0f} samples a second", flush=True)
    corpus, _ = open_corpora(*setting(folder, "shards"))
    columns = {name: np.resize(getattr(found, name), len(corpus)) for name in COLUMNS}
    whole = Survey(**columns, num_dropped_turns=0, errors={})  # pyright: ignore[reportArgumentType]  arrays are of columns
    cached_survey(corpus, survey_key(recipe, processing), cache_folder(recipe.data.cache_dir), lambda: whole)
    urls = folder / "cache" / "urls"  # of images: none, though each row has one
    shutil.copy(urls / f"{few.fingerprint()}.json", urls / f"{corpus.fingerprint()}.json")


def start(folder: Path, fraction: float = 0.0) -> None:
    """A start of a run up to its first batch, or to the one after this share of an epoch."""
    recipe, processing = setting(folder, "shards")
    run = RunContext(recipe, Accelerator(cpu=True), Console(False))
    (part, _), opening = timed("open", lambda: open_data(run, processing))
    order, ordering = timed("order", lambda: build_order(recipe, part, 1))
    _, saying = timed("figures of the report", lambda: print_header(run, order, part, None, None))
    _, digest = timed("what a resumed run compares", lambda: (content(run, part), order.fingerprint()))
    first = int(fraction * order.steps_per_epoch)

    def batch() -> Any:
        steps = (window for (window,) in windows(order, first, first + 1, per_device_batch_size=16, num_ranks=1))
        return next(load_windows(part.corpus, part.image_reader, steps, workers=0, device=run.accelerator.device))

    _, reading = timed(f"the batch of step {first:,}", batch)
    print(f"  {opening + ordering + saying + digest + reading:.1f} s to that batch", flush=True)
    rows = random.Random(1).choices(range(len(part.corpus)), k=_LOOKS)
    _, seconds = timed("samples at any place", lambda: [part.corpus.image_files(row) for row in rows])
    print(f"  {1e6 * seconds / _LOOKS:.0f} us each, of {len(part.corpus):,}", flush=True)


def timed(name: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """Do it, and print seconds and memory; what it gives, and the processor's seconds."""
    since, before = time.perf_counter(), _processor_seconds()
    found = work()
    seconds, busy = time.perf_counter() - since, _processor_seconds() - before
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    memory = f"own {int(own.split()[1]) / 1e6:.2f} GB, peak {peak:.2f} GB"
    print(f"{name}: {busy:.2f} s, {seconds:.2f} by the clock, {memory}", flush=True)
    return found, busy


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_STAGES = {
    "index": index, "read": read, "first start": start, "later start": start, "resume": lambda folder: start(folder, 0.5),
}  # fmt: skip


def main() -> None:
    """Write the shards where they are missing, then each stage in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="in each shard")
    parser.add_argument("--different", type=int, default=100, help="shards; the others are links to them")
    parser.add_argument("--stage", choices=_STAGES)
    arguments = parser.parse_args()
    if arguments.stage:
        _STAGES[arguments.stage](arguments.folder)
        return
    if not (arguments.folder / "shards").exists():
        make(arguments.folder, arguments.shards, arguments.samples, arguments.different)
    for stage in _STAGES:
        print(f"- {stage}", flush=True)
        subprocess.run([sys.executable, __file__, str(arguments.folder), "--stage", stage], check=True)


if __name__ == "__main__":
    main()
