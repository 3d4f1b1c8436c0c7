"""A tower that was left on disk costs nothing, and is the same as one that was loaded once an image needs it."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from helpers.prepared import load, recipe_of
from helpers.tiny import make_clip, make_language_model, make_siglip
from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.lora import prepare_trainable
from llava_accel.model.processing import load_processing
from llava_accel.model.tower import tower_features
from llava_accel.setup.assembly import trainable_summary

PARITY = Path(__file__).parents[1] / "parity"
CPU = torch.device("cpu")
BASES = ("hub", "4 bits", "a tower beside it", "CLIP", "SigLIP")


@pytest.fixture(scope="module")
def bases(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """[model] of a recipe for every kind of place that a tower comes from."""
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "language")
    parts = {"language_model": str(folder / "language")}
    return {
        "hub": {"base": str(llava_folder)},
        "4 bits": {"base": str(llava_folder), "quantization": {"bits": 4}},
        "a tower beside it": {"base": str(PARITY / "llava-orig"), "vision_tower": str(PARITY / "clip")},
        "CLIP": parts | {"vision_tower": str(make_clip(folder / "clip"))},
        "SigLIP": parts | {"vision_tower": str(make_siglip(folder / "siglip"))},
    }


def left(model: dict[str, object], dtype: torch.dtype = torch.float32) -> LoadedModel:
    recipe = recipe_of(**model)
    processing = load_processing(recipe.model, "pad")
    return load_model(recipe, processing, dtype=dtype, device=CPU, leave_tower=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_tower_that_is_read_later_is_the_one_that_is_loaded(
    bases: dict[str, dict[str, object]], base: str, dtype: torch.dtype
) -> None:
    whole, loaded = load(recipe_of(**bases[base]), dtype), left(bases[base], dtype)
    expected = whole.model.model.vision_tower
    assert loaded.tower is not None and isinstance(expected, PreTrainedModel)
    for name, weight in expected.named_parameters():
        assert torch.equal(loaded.tower.weight(name), weight)
    random = torch.get_rng_state()
    tower = loaded.tower.on(CPU)
    assert torch.equal(torch.get_rng_state(), random), "dropout would draw other numbers"
    assert tower is loaded.tower.on(CPU), "it is read once"
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    ours, theirs = (dict((*m.named_parameters(), *m.named_buffers())) for m in (tower, expected))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    side = expected.config.image_size
    pixels = torch.randn(2, 3, side, side)
    found = [tower_features(each, whole.model.config, pixels) for each in (tower, expected)]
    assert torch.equal(*found)


@pytest.mark.parametrize("base", BASES)
def test_leaving_the_tower_changes_nothing_else(bases: dict[str, dict[str, object]], base: str) -> None:
    whole, loaded = load(recipe_of(**bases[base])), left(bases[base])
    # As bytes: packed weights, seen as floats, may be no numbers.
    found = {name: p.detach().view(torch.uint8) for name, p in loaded.model.named_parameters()}
    expected = {name: p.detach().view(torch.uint8) for name, p in whole.model.named_parameters() if name in found}
    assert found.keys() == {name for name, _ in whole.model.named_parameters() if "vision_tower" not in name}
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert loaded.fingerprint == whole.fingerprint and loaded.vocab_size == whole.vocab_size
    assert loaded.model.config.to_dict() == whole.model.config.to_dict()


def test_a_tower_that_is_left_is_not_read(llava_folder: Path, tower_reads: list[str]) -> None:
    loaded = left({"base": str(llava_folder)}, torch.bfloat16)
    assert loaded.tower is not None and tower_reads == []
    loaded.tower.on(CPU)
    assert len(tower_reads) == len(set(tower_reads)) == len(loaded.tower.stored) > 0


def test_a_tower_on_disk_counts_as_a_part_and_not_as_memory(llava_folder: Path) -> None:
    recipe = recipe_of(base=str(llava_folder))
    whole, loaded = load(recipe), left({"base": str(llava_folder)})
    assert loaded.tower is not None
    expected = trainable_summary(prepare_trainable(whole.model, recipe))
    found = trainable_summary(prepare_trainable(loaded.model, recipe), loaded.tower.module)
    assert found.parts == expected.parts
    (tower,) = [row for row in expected.parts if row.part == "vision tower"]
    assert found.types[0].parameters == expected.types[0].parameters - tower.total
    assert found.types[0].bytes == expected.types[0].bytes - 4 * tower.total
    loaded.tower.on(CPU)
    assert trainable_summary(loaded.model, loaded.tower.module).types == expected.types
