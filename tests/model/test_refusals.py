"""A base that cannot be used is one error, which names the file or the key and what to do."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny import make_clip, make_language_model
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing
from llava_accel.recipe import make_recipe

PARITY = Path(__file__).parents[1] / "parity"


def load(**model: object) -> None:
    tables = {name: str(value) for name, value in model.items()}
    recipe = make_recipe({"run": {"name": "t"}, "model": tables, "data": {"train": "x.json"}})
    load_model(recipe, load_processing(recipe.model, "pad"), dtype=torch.float32, device=None)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "language")
    make_clip(folder / "clip")
    return folder


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A copy that tests may spoil: the base and, beside it, the tower that its config names."""
    shutil.copytree(PARITY / "llava-orig", tmp_path / "base")
    shutil.copytree(PARITY / "clip", tmp_path / "clip")
    return tmp_path / "base"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_projector_type": "identity"}, "mm_projector_type is 'identity'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_patch_merge_type": "spatial"}, "'spatial' with image_aspect_ratio.*none of the ways"),
        ({"image_aspect_ratio": "anyres"}, "'flat' with image_aspect_ratio 'anyres' is none of the ways"),
        ({"model_type": "llava_mpt"}, "llava_mpt"),
        ({"quantization_config": {"load_in_4bit": True}}, "16-bit model"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "16-bit model"),
    ],
)
def test_what_the_model_class_cannot_hold_is_refused_before_weights_are_read(
    original: Path, change: dict[str, object], reason: str
) -> None:
    edit_config(original, **change)
    (original / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=reason):
        load(base=original)


def test_a_tower_that_is_stored_quantised_is_refused(original: Path) -> None:
    edit_config(original, quantization_config=None)
    load(base=original)
    edit_config(original.parent / "clip", quantization_config={"load_in_4bit": True})
    with pytest.raises(ValueError, match=r"clip/config\.json: the model is stored quantised.*16-bit model"):
        load(base=original)


def test_a_language_model_is_no_base(parts: Path, llava_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"not a LLaVA.*model\.language_model.*model\.vision_tower"):
        load(base=parts / "language")
    with pytest.raises(ValueError, match=r"Name it in model\.base"):
        load(language_model=llava_folder, vision_tower=parts / "clip")
    with pytest.raises(ValueError, match=r"adapter.*model\.adapter"):
        load(base=PARITY / "adapter_init")
    with pytest.raises(ValueError, match="cannot be used as a vision tower"):
        load(language_model=parts / "language", vision_tower=parts / "language")
    with pytest.raises(ValueError, match="holds a 'llava', which cannot be used as a vision tower"):
        load(language_model=parts / "language", vision_tower=llava_folder)
    with pytest.raises(ValueError, match=r"model\.base: there is no folder"):
        load(base="/nowhere/at/all")


def test_a_pickle_that_could_run_a_program_is_not_opened(original: Path, tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    (original / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Program()}, original / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*Convert it to safetensors"):
        load(base=original)
    (original / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Program()}))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        load(base=original)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "lying", "huge", "empty"])
def test_a_damaged_file_is_one_error_with_its_name(original: Path, damage: str) -> None:
    path = original / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if damage == "lying":
        header["model.norm.weight"]["shape"] = [96]
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    path.write_bytes(
        {"cut": data[:-100], "lying": data, "huge": (2**62).to_bytes(8, "little") + data[8:], "empty": b""}[damage]
    )
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged.*again"):
        load(base=original)


def test_weights_that_are_missing_left_over_or_of_another_shape_are_named(original: Path) -> None:
    tensors = load_file(original / "model.safetensors")
    path = original / "model.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, path)
    with pytest.raises(ValueError, match=r"base lacks 1 weights: model\.language_model\.norm\.weight"):
        load(base=original)
    save_file(tensors | {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ValueError, match=r"no place for 1 weights: model\.layers\.7\.mlp\.up_proj\.weight in .*base"):
        load(base=original)
    save_file(tensors | {"model.norm.weight": torch.ones(47)}, path)
    with pytest.raises(ValueError, match=r"norm\.weight is \(47,\) in .*model\.safetensors and \(48,\)"):
        load(base=original)
    save_file(tensors | {"model.norm.weight": torch.ones(48, dtype=torch.int8)}, path)
    with pytest.raises(ValueError, match="16-bit model"):
        load(base=original)
