"""How fast WebDataset shards open, and how fast samples are found in them.

    python tests/bench/shards.py --shards 1000 --samples 1000

Shards are made in a temporary folder, with images of a few bytes: what is timed is the index, not the disk.
"""

import argparse
import io
import json
import random
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.examples import find_images
from llava_accel.sources.named import Named

_TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dot."}]
_LOOKS = 10_000


def make(folder: Path, shards: int, samples: int) -> None:
    """Write the shards."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    content = buffer.getvalue()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(samples):
                for suffix, part in (("png", content), ("json", json.dumps({"conversations": _TURNS}).encode())):
                    info = tarfile.TarInfo(f"{shard:05d}-{number:06d}.{suffix}")
                    info.size = len(part)
                    archive.addfile(info, io.BytesIO(part))


def opened(folder: Path) -> tuple[Corpus, float]:
    """The corpus of all shards, and the seconds that opening it took."""
    start = time.perf_counter()
    corpus = Corpus(open_sources([Named(str(folder / "shards"))], folder / "cache"), find_images)
    return corpus, time.perf_counter() - start


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1000, help="in each shard")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        make(folder / "shards", arguments.shards, arguments.samples)
        corpus, first = opened(folder)
        _, again = opened(folder)
        rows = random.Random(1).choices(range(len(corpus)), k=_LOOKS)
        start = time.perf_counter()
        for row in rows:
            corpus.image_files(row)
        each = (time.perf_counter() - start) / _LOOKS
    print(f"{len(corpus):,} samples in {arguments.shards:,} shards")
    print(f"index made in {first:.1f} s ({len(corpus) / first:,.0f} samples/s), opened again in {again:.2f} s")
    print(f"a sample at any place in {1e6 * each:.0f} us")


if __name__ == "__main__":
    main()
