"""Adapters of every origin continue, plain peft loads ours, and one that does not fit is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from helpers.prepared import logits, prepare, random_step, trained
from helpers.runs import recipe
from helpers.tiny import make_llava
from llava_accel.inference.origin import find_trained, load_trained
from llava_accel.model.adapters import check_kept
from llava_accel.model.lora import Trainable, language_model_linears, split_state
from llava_accel.release.from_files import read_trained
from llava_accel.train import train

PARITY = Path(__file__).parents[1] / "parity"
ORIGINAL: dict[str, Any] = {"base": str(PARITY / "llava-orig"), "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("biased"), biases=True)


def in_plain_peft(base: Path, folder: Path) -> Tensor:
    """Logits of a checkpoint as a user of peft loads it. test_export.py does so where this package is not imported."""
    model = LlavaForConditionalGeneration.from_pretrained(base)
    left = model.load_state_dict(load_file(folder / "non_lora_trainables.safetensors"), strict=False)
    assert not left.unexpected_keys, left
    return logits(PeftModel.from_pretrained(model, str(folder)))


def save_as_a_checkpoint_does(model: Trainable, folder: Path) -> None:
    assert isinstance(model, PeftModel)
    adapter, rest = split_state(model, model.state_dict())
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    save_file(rest, folder / "non_lora_trainables.safetensors")
    model.peft_config["default"].save_pretrained(str(folder))


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_plain_peft_gets_the_same_logits(biased: Path, tmp_path: Path, variant: str) -> None:
    model = prepare(base=str(biased), lora={"rank": 4, "alpha": 8, "variant": variant, "bias": "lora_only"})
    random_step(model)
    folder = tmp_path / variant
    save_as_a_checkpoint_does(model, folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(biased)
    assert any(name.endswith("q_proj.bias") for name in load_file(folder / "non_lora_trainables.safetensors"))
    ours, base = logits(model), logits(LlavaForConditionalGeneration.from_pretrained(biased))
    assert not torch.allclose(base, ours, atol=1e-2)
    torch.testing.assert_close(in_plain_peft(biased, folder), ours, rtol=1e-5, atol=1e-5)


def test_an_original_adapter_adds_exactly_its_update() -> None:
    model = prepare(**ORIGINAL, adapter=str(PARITY / "adapter_final"))
    stored = load_file(PARITY / "adapter_final" / "adapter_model.safetensors")
    base = load_file(PARITY / "llava-orig" / "model.safetensors")
    rest = torch.load(PARITY / "adapter_final" / "non_lora_trainables.bin", weights_only=True)
    assert isinstance(model, PeftModel)
    paths = language_model_linears(LlavaForConditionalGeneration(model.config))
    assert len(paths) == 14
    merged = model.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    for path in paths:
        name = "base_model.model.model." + path.removeprefix("model.language_model.")
        update = 2.0 * stored[f"{name}.lora_B.weight"] @ stored[f"{name}.lora_A.weight"]
        weight = base[f"model.{path.removeprefix('model.language_model.')}.weight"]
        torch.testing.assert_close(merged[f"{path}.weight"], weight + update)
        assert update.abs().max() > 1e-3
    projector = rest["base_model.model.model.mm_projector.2.bias"]
    assert torch.equal(merged["model.multi_modal_projector.linear_2.bias"], projector)


def test_our_own_adapter_and_older_names_continue(biased: Path, tmp_path: Path) -> None:
    model = prepare(base=str(biased))
    assert isinstance(model, PeftModel)
    random_step(model)
    adapter, rest = split_state(model, model.state_dict())
    model.peft_config["default"].save_pretrained(str(tmp_path))
    save_file(rest, tmp_path / "non_lora_trainables.safetensors")
    for old, new in (("", ""), ("model.language_model.", "language_model.model.")):
        named = {name.replace(f"base_model.model.{old}", f"base_model.model.{new}"): t for name, t in adapter.items()}
        save_file(named, tmp_path / "adapter_model.safetensors")
        assert torch.equal(logits(prepare(base=str(biased), adapter=str(tmp_path))), logits(model))
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(adapter, tmp_path / "adapter_model.bin")
    assert torch.equal(logits(prepare(base=str(biased), adapter=str(tmp_path))), logits(model))


def test_pefts_adapter_with_a_projector_inside_continues(biased: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
    )
    theirs = get_peft_model(LlavaForConditionalGeneration.from_pretrained(biased), config)
    random_step(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = prepare(base=str(biased), adapter=str(tmp_path))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    adapted = {name.split(".lora_")[0] for name in trained(ours) if ".lora_" in name}
    assert {name.rsplit(".", 1)[1] for name in adapted} == {"q_proj", "v_proj"}, "it keeps the adapter's layers"


def copy_adapter(folder: Path, **config: object) -> Path:
    shutil.copytree(PARITY / "adapter_init", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8}, r"model\.lora\.rank is 4.*was made with 8"),
        ({"lora_alpha": 16}, r"model\.lora\.alpha is 8.*was made with 16"),
        ({"use_dora": True}, r"model\.lora\.variant is 'lora'.*was made with 'dora'"),
        ({"use_rslora": True}, r"model\.lora\.variant is 'lora'.*was made with 'rslora'"),
        ({"bias": "lora_only"}, r"model\.lora\.bias is 'none'.*was made with 'lora_only'"),
        ({"peft_type": "IA3"}, "only LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"use_dora": True, "use_rslora": True}, "use_dora with use_rslora, which no recipe can express"),
        ({"bias": "all"}, "bias 'all', which no recipe can express"),
        ({"lora_alpha": 8.5}, r"lora_alpha 8\.5, which no recipe can express"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which no recipe can express"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices, which no recipe can express"),
    ],
)
def test_an_adapter_made_with_other_settings_is_refused(
    tmp_path: Path, config: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(**ORIGINAL, adapter=str(copy_adapter(tmp_path / "a", **config)))


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"target_modules": ["q_proj"]}, "the vision tower"),  # the tower has layers of that name
        ({"target_modules": ["q_proj", "lm_head"], "exclude_modules": ".*vision_tower.*"}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "the embeddings"),
    ],
)
def test_an_adapter_on_layers_that_get_none_here_is_refused(
    biased: Path, tmp_path: Path, settings: dict[str, Any], layers: str
) -> None:
    theirs = get_peft_model(LlavaForConditionalGeneration.from_pretrained(biased), LoraConfig(r=4, **settings))
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ValueError, match=f"LoRA layers on {layers}, .*Merge it into its base with peft"):
        find_trained(str(tmp_path), base=str(biased))


@pytest.mark.parametrize("module", ["lm_head", "vision_tower", "multi_modal_projector"])
def test_an_adapter_whose_other_weights_would_not_be_saved_is_used_and_not_continued(
    biased: Path, tmp_path: Path, module: str
) -> None:
    settings: dict[str, Any] = {"target_modules": r".*language_model.*q_proj", "modules_to_save": [module]}
    theirs = get_peft_model(LlavaForConditionalGeneration.from_pretrained(biased), LoraConfig(r=4, **settings))
    random_step(theirs)
    theirs.save_pretrained(str(tmp_path))
    trained = find_trained(str(tmp_path), base=str(biased))
    ours = load_trained(trained, dtype=torch.float32, device=torch.device("cpu")).objective.model
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    if module == "multi_modal_projector":
        check_kept(trained.recipe.model)
        return
    remedy = "Set model.train_vision = true, or merge" if module == "vision_tower" else "Merge"
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0}
    model = {"base": str(biased), "vision_tower": "", "adapter": str(tmp_path), "lora": lora}
    with pytest.raises(ValueError, match=rf"{module}.*would be without\. {remedy} the adapter first .*--to merged"):
        train(recipe(tmp_path / "train", model=model))
    with pytest.raises(ValueError, match="Use --to merged"):
        read_trained(trained, trained.recipe)
    if module == "vision_tower":
        check_kept(trained.recipe.model.model_copy(update={"train_vision": True}))


@pytest.mark.parametrize("projector", [False, True])
def test_an_adapter_says_whether_it_adapts_the_projector(biased: Path, tmp_path: Path, projector: bool) -> None:
    lora = {"rank": 4, "alpha": 8, "projector": projector}
    model = prepare(base=str(biased), lora=lora)
    random_step(model)
    save_as_a_checkpoint_does(model, tmp_path / "adapter")
    again = prepare(base=str(biased), lora=lora, adapter=str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))
    was, then = str(not projector).lower(), str(projector).lower()
    with pytest.raises(ValueError, match=rf"projector is {was}, .* with {then}\. Set model\.lora\.projector = {then}"):
        prepare(base=str(biased), lora=lora | {"projector": not projector}, adapter=str(tmp_path / "adapter"))


def test_an_adapter_with_a_key_that_fits_nowhere_is_refused(tmp_path: Path) -> None:
    folder = copy_adapter(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    stray = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
    save_file(tensors | {stray: torch.ones(4, 48)}, path)
    with pytest.raises(ValueError, match=r"no place for 1 of its weights, such as .*layers\.9\.mlp\.up_proj"):
        prepare(**ORIGINAL, adapter=str(folder))
    with pytest.raises(ValueError, match=r"no place for 24 of its weights"):
        lora = {"rank": 4, "alpha": 8, "targets": [r".*\.q_proj"]}
        path.write_bytes((PARITY / "adapter_init" / "adapter_model.safetensors").read_bytes())
        prepare(**{**ORIGINAL, "lora": lora}, adapter=str(folder))
    save_file({"transformer.h.0.lora_A.weight": torch.ones(4, 48)}, path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*base_model\.model\."):
        prepare(**ORIGINAL, adapter=str(folder))
    save_file({stray: torch.ones(4, 48)}, path)
    with pytest.raises(ValueError, match=r"does not adapt any layer of this model.*layers\.9\.mlp\.up_proj"):
        prepare(**ORIGINAL, adapter=str(folder))
    save_file({"base_model.model.lm_head.weight": torch.ones(4, 48)}, path)
    with pytest.raises(ValueError, match="holds no LoRA weights"):
        prepare(**ORIGINAL, adapter=str(folder))


def test_an_adapter_of_another_base_is_refused(biased: Path) -> None:
    with pytest.raises(ValueError, match=r"lora_A\.weight is \(4, 96\).*another base"):
        prepare(base=str(biased), adapter=str(PARITY / "adapter_init"))


def test_a_stage_1_folder_is_no_adapter(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"no adapter.*model\.projector"):
        prepare(**ORIGINAL, adapter=str(tmp_path))


def test_an_intermediate_checkpoint_of_llava_without_its_projector_is_refused(tmp_path: Path) -> None:
    folder = copy_adapter(tmp_path / "a")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"no non_lora_trainables\.bin.*projector.*lost"):
        prepare(**ORIGINAL, adapter=str(folder))
