"""An image in memory is seen as the file that it was read from is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_accel.data.images import decode
from llava_accel.inference.ask import Answerer
from llava_accel.inference.dialogue import Dialogue

GRADIENT = np.linspace(0, 65535, 64).reshape(8, 8)
COLOURS = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L")])


class Shown(Dialogue):
    """Keeps the pixels of what it is shown."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []

    def reset(self) -> None:
        pass

    def show(self, path: Path) -> None:
        self.pixels.append(np.asarray(decode(path)))

    def ask(self, text: str, on_text: Callable[[str], None] | None = None) -> str:
        return text


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(GRADIENT.astype(np.uint16)), COLOURS.convert("P"),
     COLOURS.convert("LA"), COLOURS.convert("1"), COLOURS],
    ids=["16 bits", "palette", "grey with transparency", "black and white", "colours"],
)  # fmt: skip
def test_an_image_in_memory_is_seen_as_its_file_is(image: Image.Image, tmp_path: Path) -> None:
    file, shown = tmp_path / "image.png", Shown()
    image.save(file)
    with Image.open(file) as opened:
        assert Answerer(shown, []).answer([file, opened], "What is it?") == "What is it?"
    of_file, in_memory = shown.pixels
    assert np.array_equal(of_file, in_memory) and len(np.unique(of_file)) > 1
