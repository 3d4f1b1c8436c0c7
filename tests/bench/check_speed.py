"""How fast `check` reads: text records with the search for repeated ids, headers of images, whole images, and the verb.

    python tests/bench/check_speed.py FOLDER [--records 200000] [--images 1000] [--rounds 3]

Not part of the suite: 50 MB of records and 70 MB of JPEG. Each figure is the best of some rounds, with two processes that
read; the verb's holds its start. A text record is one question of ten words and an answer of one to twelve.
"""

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.scale import setting, write
from llava_accel.data.corpus import Corpus
from llava_accel.data.survey import survey
from llava_accel.inspection.repeated_ids import repeated_ids
from llava_accel.inspection.tokens_in_texts import watched
from llava_accel.setup.datasets import open_corpora

_SIZE = (640, 480)
_WORKERS = 2


def write_images(folder: Path, number: int) -> None:
    """JPEGs of the usual size with edges and noise, about 70 KB each, and a record for each."""
    draw = np.random.default_rng(0)
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "noise"}]
    with (folder / "images.jsonl").open("w") as file:
        for place in range(number):
            coarse = Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize(_SIZE)
            fine = Image.fromarray(draw.integers(0, 256, (*_SIZE[::-1], 3), dtype=np.uint8)).filter(ImageFilter.BLUR)
            Image.blend(coarse, fine, 0.3).save(folder / f"{place}.jpg", quality=90)
            file.write(json.dumps({"id": place, "image": f"{place}.jpg", "conversations": turns}) + "\n")


def read_texts(corpus: Corpus, tokens: list[str]) -> None:
    """Read all records, and look for repeated ids."""
    found = survey(corpus, workers=_WORKERS, decode=True, watched=tokens)
    assert len(found.usable) == len(corpus) and not repeated_ids(corpus, found)


def read_images(corpus: Corpus, decode: bool) -> None:
    """Read all headers, or all images."""
    assert len(survey(corpus, workers=_WORKERS, decode=decode).usable) == len(corpus)


def run_check(folder: Path) -> None:
    """The verb, in this process: its imports have been made."""
    from llava_accel import check
    from llava_accel.console.verbs import read_arguments
    from llava_accel.recipe import dump_recipe

    recipe, _ = setting(folder, "texts.jsonl")
    (folder / "recipe.toml").write_text(dump_recipe(recipe))
    arguments = read_arguments("check", [str(folder / "recipe.toml")])
    arguments.loaded = recipe
    with contextlib.redirect_stdout(io.StringIO()):
        assert check.check(arguments) == 0


def best(name: str, number: int, unit: str, rounds: int, work: Callable[[], None]) -> None:
    """Print how many a second, in the fastest round."""
    seconds = []
    for _ in range(rounds):
        since = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - since)
    print(f"{name}: {number / min(seconds):,.0f} {unit}/s", flush=True)


def main() -> None:
    """Write what is missing, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder, rounds = arguments.folder, arguments.rounds
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "texts.jsonl").exists():
        write(folder / "texts.jsonl", arguments.records)
    if not (folder / "images.jsonl").exists():
        write_images(folder, arguments.images)
    recipe, processing = setting(folder, "texts.jsonl")
    texts, _ = open_corpora(recipe, processing)
    images, _ = open_corpora(*setting(folder, "images.jsonl"))
    best("texts", len(texts), "records", rounds, lambda: read_texts(texts, watched(processing)))
    best("headers", len(images), "images", rounds, lambda: read_images(images, decode=False))
    best("decoded whole", len(images), "images", rounds, lambda: read_images(images, decode=True))
    best("check of the texts", len(texts), "records", rounds, lambda: run_check(folder))


if __name__ == "__main__":
    main()
