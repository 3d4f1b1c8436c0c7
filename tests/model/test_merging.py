"""Image tokens are those that the original merges: each patch in its place, newlines, shrunk maps, whole squares."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_convert

from data.test_tiling import kit
from llava_accel.data.tiling import WHOLE, ImageLayout
from llava_accel.model.merging import TileMerger

NEWLINE = torch.tensor([-1.0, -2.0])


def merge(tiles: Tensor, layouts: Sequence[ImageLayout], newline: Tensor | None) -> Tensor:
    return TileMerger(None if newline is None else nn.Parameter(newline))(tiles, layouts).detach()


def numbered(layout: ImageLayout, side: int) -> Tensor:
    """Patches whose features are their row and column in the map; those of the whole image in their square."""
    rows, columns = max(1, layout.rows), max(1, layout.columns)
    ranges = (torch.arange(n * side, dtype=torch.float32) for n in (rows, columns))
    places = torch.cartesian_prod(*ranges).view(rows, side, columns, side, 2).transpose(1, 2)
    tiles = places.reshape(rows * columns, side**2, 2)
    return torch.cat([tiles[:1], tiles]) if layout.rows else tiles


@pytest.mark.parametrize("name", ["next", "onevision"])
def test_every_token_stands_for_the_patch_that_the_original_names(name: str) -> None:
    tiling, facts = kit(name)
    images: list[dict[str, Any]] = facts["images"]
    layouts = [tiling.layout(*each["size"]) for each in images]
    side = facts["patches_per_side"]
    tiles = torch.cat([numbered(layout, side) for layout in layouts])
    merged = merge(tiles, layouts, NEWLINE).split([each["image_tokens"] for each in images])
    assert {each["interpolated"] for each in images} == ({False} if name == "next" else {False, True})
    for each, found in zip(images, merged, strict=True):
        assert torch.equal(found[: side**2], numbered(WHOLE, side)[0])
        grid = found[side**2 :].view(each["rows"], each["cols"] + 1, 2)
        assert torch.equal(grid[:, -1], NEWLINE.expand(each["rows"], 2))
        expected = torch.cartesian_prod(torch.tensor(each["grid_rows"]), torch.tensor(each["grid_cols"]))
        assert torch.allclose(grid[:, :-1].reshape(-1, 2), expected.view(-1, 2), atol=1e-5, rtol=0), each["image"]


def test_a_whole_square_ends_with_a_newline_and_one_of_llava_1_5_does_not() -> None:
    tiles = torch.cat([numbered(WHOLE, 2)] * 2)
    with_ends = merge(tiles, [WHOLE, WHOLE], NEWLINE)
    assert torch.equal(with_ends, torch.cat([tiles[0], NEWLINE[None], tiles[1], NEWLINE[None]]))
    assert torch.equal(merge(tiles, [WHOLE, WHOLE], None), tiles.flatten(0, 1))


def test_the_newline_has_a_gradient_even_where_a_strip_has_no_row() -> None:
    newline = nn.Parameter(NEWLINE)
    merger = TileMerger(newline)
    vanished = ImageLayout(rows=1, columns=3, window=(2, 0, 0, 12), size=(0, 12))
    tokens = merger(torch.randn(4, 16, 2), default_convert([vanished]))  # as it comes out of a loader
    assert len(tokens) == 16
    tokens.sum().backward()
    assert newline.grad is not None and torch.equal(newline.grad, torch.zeros(2))
