"""What 4 and 8 bits touch: every linear layer of the language model, and nothing else."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from helpers.tiny import make_llava
from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.lora import language_model_linears, prepare_trainable
from llava_accel.model.processing import load_processing
from llava_accel.recipe import make_recipe
from llava_accel.setup.assembly import trainable_summary


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


def recipe_for(base: Path, **quantization: object):
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    return make_recipe(
        {
            "run": {"name": "t"},
            "model": {"base": str(base), "quantization": quantization, "lora": lora},
            "data": {"train": "x.json"},
        }
    )


def load(base: Path, dtype: torch.dtype = torch.float32, **quantization: object) -> LoadedModel:
    recipe = recipe_for(base, **quantization)
    return load_model(recipe, load_processing(recipe.model, "pad"), dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(("bits", "kind"), [(4, Linear4bit), (8, Linear8bitLt)])
def test_exactly_the_linear_layers_of_the_language_model_are_quantised(base: Path, bits: int, kind: type) -> None:
    model = load(base, bits=bits).model
    quantised = [name for name, module in model.named_modules() if isinstance(module, kind)]
    assert quantised == [
        f"model.language_model.layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    ]
    assert quantised == language_model_linears(model)


def test_everything_else_keeps_the_storage_type(base: Path) -> None:
    model = load(base, torch.bfloat16, bits=4).model
    others = {p.dtype for n, p in model.named_parameters() if "_proj.weight" not in n or "language_model" not in n}
    assert others == {torch.bfloat16}


def test_the_storage_of_4_bit_weights_has_the_compute_type(base: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = load(base, dtype, bits=4).model.model.language_model.layers[0].self_attn.q_proj
        assert isinstance(layer, Linear4bit)
        assert layer.weight.dtype == layer.compute_dtype == dtype


@pytest.mark.parametrize(("settings", "kind"), [({"type": "nf4"}, "nf4"), ({"type": "fp4", "double": False}, "fp4")])
def test_the_recipe_chooses_the_code(base: Path, settings: dict[str, object], kind: str) -> None:
    layer = load(base, bits=4, **settings).model.model.language_model.layers[0].self_attn.q_proj
    assert isinstance(layer, Linear4bit)
    assert layer.weight.quant_type == kind
    assert layer.weight.compress_statistics == settings.get("double", True)


def test_a_quantised_model_computes_nearly_the_same(base: Path) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        exact, eight, four = (load(base, bits=bits).model(input_ids=ids).logits for bits in (16, 8, 4))
    scale = exact.std()
    assert 1e-4 < (eight - exact).std() / scale < 0.05
    assert 1e-3 < (four - exact).std() / scale < 0.4


def test_4_bit_weights_count_as_what_they_stand_for(base: Path) -> None:
    plain, four = (trainable_summary(load(base, bits=bits).model) for bits in (16, 4))
    assert [row.total for row in four.parts] == [row.total for row in plain.parts]
    packed = next(row for row in four.types if row.dtype == "nf4")
    assert packed.parameters == 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert packed.bytes * 2 == packed.parameters


def test_a_qlora_step_changes_adapter_and_projector_only(base: Path) -> None:
    recipe = recipe_for(base, bits=4)
    processing = load_processing(recipe.model, "pad")
    loaded = load_model(recipe, processing, dtype=torch.float32, device=None)
    model = prepare_trainable(loaded.model, recipe)
    # Bytes, because 4-bit codes that are stored as floats may spell NaN, which equals nothing.
    before = {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}
    ids = torch.tensor([[1, *[processing.image_token_id] * 16, 9, 8, 7, 6]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # lora_A has no gradient before lora_B has left zero
        model(input_ids=ids, pixel_values=torch.ones(1, 3, 56, 56), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {name: p.detach().view(torch.uint8) for name, p in model.named_parameters()}
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if ".lora_" in name or "multi_modal_projector" in name}
