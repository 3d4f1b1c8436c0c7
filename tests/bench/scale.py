"""Ten million records: what opening, ordering and resuming take, and how fast `check` reads.

    python tests/bench/scale.py FOLDER [--rows 10000000] [--read 400000]

Not part of the suite: the file takes about 250 bytes of disk a record, and its table as much again. Each figure comes
from a process of its own. "own" is memory of the process alone (RssAnon), "peak" with mapped pages of files, both with
the 0.4 GB that Python and the libraries take. The survey of the large file is that of its first records, repeated:
reading all ten million would take minutes and measure the same.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.runs import recipe as make_recipe
from llava_accel.console.output import Console
from llava_accel.data.sampler import windows
from llava_accel.data.survey import COLUMNS, Survey, cached_survey, survey
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.setup.datasets import build_order, open_corpora, open_data, survey_key
from llava_accel.sources.mapped_table import Table
from llava_accel.storage.kept_files import cache_folder

WORDS = "what is the color of this large red square and how many people are standing near a tree on left side".split()


def write(path: Path, rows: int) -> None:
    """Text-only questions of ten words with answers of one to twelve, each record with an id of its own."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            question = " ".join(draw.choices(WORDS, k=10))
            answer = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            turns = [{"from": "human", "value": f"{question}?"}, {"from": "gpt", "value": f"{answer}."}]
            file.write(json.dumps({"id": f"{number:08d}", "conversations": turns}) + "\n")


def setting(folder: Path, file: str) -> tuple[Recipe, Processing]:
    """A recipe on that file, with batches of 128 examples."""
    train = {"per_device_batch_size": 16, "accumulation_steps": 8}
    data = {"cache_dir": str(folder / "cache"), "workers": 2, "images": ""}
    made = make_recipe(folder, folder / file, train=train, data=data)
    return made, load_processing(made.model, made.data.image_aspect)


def index(folder: Path) -> None:
    """The first start: the table, and the survey."""
    recipe, processing = setting(folder, "large.jsonl")
    timed("index the file", lambda: Table(folder / "large.jsonl", folder / "cache"))
    (corpus, _), (few, _) = (open_corpora(*setting(folder, name)) for name in ("large.jsonl", "read.jsonl"))
    some = survey(few, workers=0, decode=False)
    columns = {name: np.resize(getattr(some, name), len(corpus)) for name in COLUMNS}
    key = survey_key(recipe, processing)
    whole = Survey(**columns, num_dropped_turns=0, errors={})  # pyright: ignore[reportArgumentType]  arrays are of columns
    timed("keep the survey", lambda: cached_survey(corpus, key, cache_folder(str(folder / "cache")), lambda: whole))


def read(folder: Path) -> None:
    """Records a second with two processes."""
    corpus, _ = open_corpora(*setting(folder, "read.jsonl"))
    found, seconds = timed("read", lambda: survey(corpus, workers=2, decode=True))
    assert len(found.usable) == len(corpus)
    print(f"  {len(corpus) / seconds:,.0f} records/s", flush=True)


def start(folder: Path) -> None:
    """Every later start: open, order, and go on in the middle of the epoch."""
    recipe, processing = setting(folder, "large.jsonl")
    accelerator = Accelerator(cpu=True)
    (part, _), _ = timed("open", lambda: open_data(RunContext(recipe, accelerator, Console()), processing))
    order, _ = timed("order", lambda: build_order(recipe, part, 1))
    middle = order.steps_per_epoch // 2
    for name, step in (("first step", 0), ("resume in the middle", middle)):
        steps = windows(order, step, step + 1, per_device_batch_size=16, num_ranks=1)
        ((window,), _) = timed(name, lambda steps=steps: next(steps))
    timed("a micro-batch of records", lambda: [part.corpus.encode(int(part.rows[row])) for row in window[0]])


def timed(name: str, work: Callable[[], Any]) -> tuple[Any, float]:
    """Do it, and print seconds and memory."""
    since = time.perf_counter()
    found = work()
    seconds = time.perf_counter() - since
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{name}: {seconds:.2f} s, own {int(own.split()[1]) / 1e6:.2f} GB, peak {peak / 1e6:.2f} GB", flush=True)
    return found, seconds


def main() -> None:
    """Write what is missing, then each stage in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--read", type=int, default=400_000)
    parser.add_argument("--stage", choices=["index", "read", "start"])
    arguments = parser.parse_args()
    if arguments.stage:
        {"index": index, "read": read, "start": start}[arguments.stage](arguments.folder)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("large.jsonl", arguments.rows), ("read.jsonl", arguments.read)):
        if not (arguments.folder / name).exists():
            write(arguments.folder / name, rows)
    for stage in ("index", "read", "start"):
        subprocess.run([sys.executable, __file__, str(arguments.folder), "--stage", stage], check=True)


if __name__ == "__main__":
    main()
