"""Tiles and tokens are the original's: on its pictures, on a table of sizes, and by its rules written down once more."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from llava_accel.data.images import decode
from llava_accel.data.tiling import WHOLE, Tiling

KIT = Path(__file__).parents[1] / "parity" / "next"
NEXT = Tiling(336, 576, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), has_newline=True)
ONEVISION = Tiling(384, 729, tuple((384 * i, 384 * j) for i in range(1, 7) for j in range(1, 7)), True, most_tiles=9)
GOLDEN = [
    (640, 480, 2340, 2929), (480, 640, 2352, 2943), (500, 375, 2340, 1728), (375, 500, 2352, 1737),
    (333, 500, 1476, 1849), (427, 640, 2160, 2727), (640, 427, 2144, 2709), (1024, 899, 2634, 6551),
    (1280, 720, 1948, 5967), (720, 1280, 1968, 6009), (1920, 1080, 1948, 7269), (1080, 1920, 1968, 7317),
    (800, 800, 2928, 7371), (336, 336, 1176, 1485), (224, 224, 1176, 1485), (300, 300, 1176, 1485),
    (300, 100, 776, 981), (100, 300, 1392, 999), (320, 240, 1026, 1317), (240, 320, 1376, 1323),
    (336, 672, 1776, 2241), (672, 336, 1752, 2214), (672, 672, 2928, 3699), (1008, 336, 2328, 2943),
    (336, 1008, 2376, 2997), (1000, 300, 2182, 2779), (300, 1000, 2232, 2835), (2480, 3508, 2256, 7353),
    (1700, 2200, 2448, 7353), (4000, 3000, 2340, 7309), (3840, 2160, 1948, 7317), (6000, 500, 1014, 2848),
    (384, 384, 2928, 1485), (768, 768, 2928, 3699), (1152, 1152, 2928, 7371), (1154, 1154, 2928, 7371),
    (2304, 2304, 2928, 7371), (1875, 1375, 2340, 7353), (188, 94, 876, 1093), (1, 1000, 648, 891),
    (1000, 1, 576, 811),
]  # fmt: skip
"""Width, height, and tokens by the original code for NeXT and for OneVision."""


@pytest.mark.parametrize(("width", "height", "with_next", "with_onevision"), GOLDEN)
def test_tokens_are_those_of_the_original(width: int, height: int, with_next: int, with_onevision: int) -> None:
    assert NEXT.num_tokens(NEXT.layout(width, height)) == with_next
    assert ONEVISION.num_tokens(ONEVISION.layout(width, height)) == with_onevision


def restated(tiling: Tiling, width: int, height: int) -> int:
    """Tokens by the rules in words: the canvas by trying all, the map cut as an array is, the newlines counted."""
    best, most, least = (0, 0), -1, 0
    for canvas in tiling.canvases:
        scale = min(canvas[0] / width, canvas[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas[0] * canvas[1] - used
        if used > most or (used == most and waste < least):
            best, most, least = canvas, used, waste
    side = math.isqrt(tiling.tile_tokens)
    patches = np.zeros((best[1] // tiling.side * side, best[0] // tiling.side * side))
    rows, columns = patches.shape
    if width / height > columns / rows:
        above = (rows - int(height * (columns / width))) // 2
        patches = patches[above : rows - above]
    else:
        before = (columns - int(width * (rows / height))) // 2
        patches = patches[:, before : columns - before]
    rows, columns = patches.shape
    times = math.sqrt(rows * columns / (9 * side**2)) if tiling.most_tiles else 0
    if times > 1.1:
        rows, columns = int(rows // times), int(columns // times)
    return side**2 + rows * (columns + 1)


@pytest.mark.parametrize("tiling", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_tokens_of_ten_thousand_sizes(tiling: Tiling) -> None:
    sizes = np.random.default_rng(0).integers(1, [700, 700, 4000, 4000], size=(5000, 4)).reshape(-1, 2).tolist()
    wrong = [(w, h) for w, h in sizes if tiling.num_tokens(tiling.layout(w, h)) != restated(tiling, w, h)]
    assert not wrong, wrong[:5]


def kit(name: str) -> tuple[Tiling, dict[str, Any]]:
    facts = json.loads((KIT / f"{name}_images.json").read_text())
    most = 9 if facts["aspect"] == "anyres_max_9" else 0
    canvases = tuple((width, height) for width, height in facts["pinpoints"])
    return Tiling(facts["tile"], facts["patches_per_side"] ** 2, canvases, True, most), facts


@pytest.mark.parametrize("name", ["next", "onevision"])
def test_tiles_of_the_originals_pictures_are_equal_to_the_bit(name: str) -> None:
    tiling, facts = kit(name)
    tiles = load_file(KIT / f"{name}_tiles_u8.safetensors")
    assert len(facts["images"]) == 15
    for each in facts["images"]:
        image = decode(KIT / "images" / each["image"])
        layout = tiling.layout(*image.size)
        found = np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiling.cut(image)])
        expected = tiles[each["image"]]
        assert np.array_equal(found, expected.reshape(found.shape)), each["image"]
        assert (layout.num_tiles, tiling.num_tokens(layout)) == (each["tiles"], each["image_tokens"])
        assert layout.size == (each["rows"], each["cols"])


def test_one_image_is_cut_and_several_are_whole_squares() -> None:
    sizes = {"a": (640, 480), "b": (480, 640)}
    (alone,) = NEXT.views(["a"], sizes.__getitem__)
    assert alone.num_tokens == 2340 and alone.layout.num_tiles == 5 and not alone.has_vanished
    assert [(view.num_tokens, view.layout) for view in NEXT.views(["a", "b"], sizes.__getitem__)] == [(577, WHOLE)] * 2
    square = Tiling(336, 576)
    assert [(view.num_tokens, view.layout) for view in square.views(["a"], {}.__getitem__)] == [(576, WHOLE)]


def test_a_strip_that_leaves_no_token_says_so() -> None:
    (strip,) = NEXT.views(["a"], lambda _: (1000, 1))
    assert strip.has_vanished and strip.num_tokens == 576
