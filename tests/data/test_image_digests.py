"""The digest of a corpus's images follows what they hold, not where they are, and opens few files."""

import base64
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.samples import corpus, corpus_of, encoder, record, write_images
from llava_accel.data import image_digests
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.data.image_digests import images_digest
from llava_accel.data.survey import survey
from llava_accel.sources.named import Named


@pytest.fixture
def data(tmp_path: Path) -> Corpus:
    write_images(tmp_path, *(f"{n}.png" for n in range(3)))
    shown = [["0.png"], ["1.png"], ["0.png"], ["2.png", "1.png"], []]
    records = [record("<image>\n" * len(s) + "Q", "A", image=s, id=str(n)) for n, s in enumerate(shown)]
    return corpus(tmp_path, records)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read for their digest."""
    found: list[str] = []
    digest = image_digests._digest
    monkeypatch.setattr(image_digests, "_digest", lambda file: (found.append(file.name), digest(file))[1])
    return found


def of(data: Corpus, cache: Path) -> str:
    return images_digest(data, survey(data, workers=0, decode=False).image_keys, cache)


def test_each_file_is_read_once_and_again_only_when_it_has_changed(
    data: Corpus, tmp_path: Path, opened: list[str]
) -> None:
    first = of(data, tmp_path / "cache")
    assert sorted(opened) == ["0.png", "1.png", "2.png"]
    opened.clear()
    assert of(data, tmp_path / "cache") == first and opened == []
    os.utime(tmp_path / "1.png")
    assert of(data, tmp_path / "cache") == first and opened == ["1.png"]


def test_a_changed_pixel_of_equal_size_and_time_is_seen(data: Corpus, tmp_path: Path) -> None:
    first, file = of(data, tmp_path / "cache"), tmp_path / "2.png"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert of(data, tmp_path / "cache") != first


def test_two_images_that_are_swapped_are_seen(data: Corpus, tmp_path: Path) -> None:
    first = of(data, tmp_path / "cache")
    (tmp_path / "0.png").rename(tmp_path / "x")
    (tmp_path / "1.png").rename(tmp_path / "0.png")
    (tmp_path / "x").rename(tmp_path / "1.png")
    assert of(data, tmp_path / "cache") != first


def test_a_folder_that_has_moved_or_was_copied_holds_the_same(data: Corpus, tmp_path: Path) -> None:
    first = of(data, tmp_path / "cache")
    for name in ("moved", "copied"):
        (tmp_path / name).mkdir()
        for file in list(tmp_path.glob("*.png")):
            shutil.copy(file, tmp_path / name) if name == "copied" else file.rename(tmp_path / name / file.name)
        moved = Corpus(
            open_sources([Named(str(tmp_path / "data.jsonl"), str(tmp_path / name))], tmp_path / "c"), encoder()
        )
        assert moved.fingerprint() == data.fingerprint()
        assert of(moved, tmp_path / "cache") == first
        for file in (tmp_path / name).iterdir():
            shutil.copy(file, tmp_path)


def test_a_missing_image_is_another_content(data: Corpus, tmp_path: Path) -> None:
    keys = survey(data, workers=0, decode=False).image_keys
    first = images_digest(data, keys, tmp_path / "cache")
    (tmp_path / "0.png").rename(tmp_path / "x")
    assert images_digest(data, keys, tmp_path / "cache") != first
    (tmp_path / "x").rename(tmp_path / "0.png")
    assert images_digest(data, keys, tmp_path / "cache") == first


def test_damaged_digests_are_made_anew(data: Corpus, tmp_path: Path) -> None:
    first = of(data, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "images").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    assert of(data, tmp_path / "cache") == first


def test_of_a_large_image_both_ends_count(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 100_000
    found = {image_digests._digest(tmp_path / "a.png")}
    for row in (0, 100, 199):
        changed = pixels.copy()
        changed[row, 100] ^= 1
        Image.fromarray(changed).save(tmp_path / "b.png")
        found.add(image_digests._digest(tmp_path / "b.png"))
    assert len(found) == 4, "PNG ends in a checksum of all of it"


def test_where_no_image_is_a_file_of_its_own_a_later_start_reads_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, "a.png")
    content = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    data = corpus(tmp_path, [record("<image>\nQ", "A", image=content)])
    first = of(data, tmp_path / "cache")
    keys = survey(data, workers=0, decode=False).image_keys
    monkeypatch.setattr(Corpus, "record", lambda *_: pytest.fail("a row was read"))
    assert images_digest(data, keys, tmp_path / "cache") == first


def test_text_alone_has_a_digest_too(tmp_path: Path) -> None:
    data = corpus(tmp_path, [record("Q", "A")])
    assert of(data, tmp_path / "cache") == of(corpus_of(tmp_path / "data.jsonl"), tmp_path / "cache")
