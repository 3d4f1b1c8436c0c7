"""A language model, a vision tower and a projector, new or trained, become a LLaVA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, MixtralConfig, OPTConfig, PreTrainedConfig

from helpers.tiny import VOCABULARY, make_clip, make_language_model, make_siglip
from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.processing import load_processing
from llava_accel.recipe import make_recipe

PARITY = Path(__file__).parents[1] / "parity"


def load(seed: int = 42, **model: object) -> LoadedModel:
    tables = {"run": {"name": "t", "seed": seed}, "data": {"train": "x.json"}}
    recipe = make_recipe(tables | {"model": {name: str(value) for name, value in model.items()}})
    processing = load_processing(recipe.model, "pad")
    return load_model(recipe, processing, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "language")
    make_language_model(folder / "tied", tied=True)
    make_clip(folder / "clip")
    make_siglip(folder / "siglip")
    return folder


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("language", ["language", "tied"])
def test_parts_become_a_model_that_runs(parts: Path, tower: str, language: str) -> None:
    loaded = load(language_model=parts / language, vision_tower=parts / tower)
    model = loaded.model
    assert loaded.vocab_size == VOCABULARY
    assert model.lm_head.out_features == 384
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == (language == "tied")
    assert any("projector is new" in note for note in loaded.notes)
    ids = torch.tensor([[1, *[model.config.image_token_id] * 16, 9, 8]])
    assert model(input_ids=ids, pixel_values=torch.ones(1, 3, 56, 56)).logits.isfinite().all()


def test_a_new_projector_is_a_function_of_the_seed(parts: Path) -> None:
    def projector(seed: int) -> torch.Tensor:
        loaded = load(seed, language_model=parts / "language", vision_tower=parts / "clip")
        return loaded.model.model.multi_modal_projector.linear_1.weight

    first = projector(1)
    torch.rand(7)
    assert torch.equal(first, projector(1))
    assert not torch.equal(first, projector(2))
    assert 0.9 < first.abs().max() * 64**0.5 <= 1.0, "PyTorch's own range: 1 / sqrt(inputs)"


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_a_trained_projector_is_taken_from_a_file_or_a_folder(parts: Path, tmp_path: Path, ending: str) -> None:
    shapes = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    tensors = {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()}
    file = tmp_path / f"mm_projector.{ending}"
    torch.save(tensors, file) if ending == "bin" else save_file(tensors, file)
    for place in (file, tmp_path):
        loaded = load(language_model=parts / "language", vision_tower=parts / "clip", projector=place)
        projector = loaded.model.model.multi_modal_projector
        assert torch.equal(projector.linear_1.weight, tensors["model.mm_projector.0.weight"])
        assert torch.equal(projector.linear_2.bias, tensors["model.mm_projector.2.bias"])


def test_a_projector_of_another_model_is_refused(parts: Path) -> None:
    with pytest.raises(ValueError, match=r"linear_1.weight is \(48, 32\) in .*projector_final.bin and \(64, 64\)"):
        load(
            language_model=parts / "language",
            vision_tower=parts / "clip",
            projector=PARITY / "projector_final.bin",
        )


SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=32), r"'opt', .* do not fit .*OPTModel.* Name a Llama"),
        (MixtralConfig(**SMALL, intermediate_size=32, num_key_value_heads=2, num_local_experts=2),
         r"lacks 3 weights: .*experts.*Or a 'mixtral' has other weights than a Llama"),
    ],
    ids=["modules", "names"],
)  # fmt: skip
def test_a_language_model_of_another_kind_is_refused_with_those_that_fit(
    parts: Path, tmp_path: Path, config: PreTrainedConfig, says: str
) -> None:
    make_language_model(tmp_path)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        load(language_model=tmp_path, vision_tower=parts / "clip")
