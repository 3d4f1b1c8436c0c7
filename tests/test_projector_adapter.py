"""LoRA layers on the projector (model.lora.projector): trained, resumed, exported in every form, and as vLLM names them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.exported import assert_same, export, fine_tune, logits, prove_here
from helpers.interrupted import assert_same_run, settings, train, train_until
from helpers.prepared import recipe_of
from helpers.runs import metrics
from helpers.tiny import make_llava
from llava_accel.estimate.peak_memory import count_weights
from llava_accel.estimate.trace import build_meta
from llava_accel.loop.optimizer import part_of
from llava_accel.model.layouts import PEFT_PREFIX, PROJECTOR
from llava_accel.model.processing import load_processing
from llava_accel.recipe import dump_recipe, load_recipe

LINEARS = ("linear_1", "linear_2")


@pytest.mark.parametrize("bits", [16, 4])
def test_the_plan_counts_what_is_trained_and_the_projector_is_never_quantised(llava_folder: Path, bits: int) -> None:
    found = []
    for model in ({"lora": {"rank": 4, "projector": True}}, {"lora": {"rank": 4}, "train_projector": False}):
        recipe = recipe_of(base=str(llava_folder), quantization={"bits": bits}, **model)
        meta = build_meta(recipe, load_processing(recipe.model, "pad"), torch.bfloat16)
        found.append(count_weights(meta, recipe))
    with_projector, without = found
    config = load_processing(recipe.model, "pad").base.config
    tower, text = int(config.vision_config.hidden_size), int(config.text_config.hidden_size)  # pyright: ignore
    assert with_projector.trained - without.trained == 4 * (tower + text) + 4 * (text + text)
    assert with_projector.total - with_projector.trained == without.total - without.trained


def test_the_projector_is_not_trained_in_full_then_and_the_written_recipe_says_so(tmp_path: Path) -> None:
    recipe = recipe_of(base="b", lora={"projector": True})
    assert recipe.model.train_projector is False and recipe.model.adapts_projector
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    full = recipe_of(base="b", train="full", lora={"projector": True})
    assert full.model.train_projector and not full.model.adapts_projector
    assert part_of(f"model.{PEFT_PREFIX}{PROJECTOR}linear_1.lora_A.default.weight") == "projector"


def vllms_module(name: str) -> str:
    """The module that vLLM puts a LoRA tensor into, by its own rules.

    Read in vllm-project/vllm: `parse_fine_tuned_lora_name` in vllm/lora/utils.py (001e63a, and the caller in
    vllm/lora/lora_model.py, 532cc25) and `hf_to_vllm_mapper` of LlavaForConditionalGeneration and
    LlavaNextForConditionalGeneration. Their `get_mm_mapping` names multi_modal_projector as the connector since pull
    requests 31513 and 49788; `--enable-tower-connector-lora` lets it take LoRA weights.
    """
    prefixes = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    assert "base_model.model." in name
    name = name.replace("base_model.model.", "")
    name = next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)
    *module, kind, last = name.split(".")
    assert kind in ("lora_A", "lora_B") and last == "weight", f"{name} is unsupported LoRA weight"
    return ".".join(module)


@pytest.mark.slow
def test_a_run_is_exported_in_every_form_and_vllm_knows_each_name(
    tmp_path: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_here(monkeypatch)
    model = {"base": str(llava_folder), "lora": {"rank": 4, "alpha": 8, "projector": True}}
    run = fine_tune(tmp_path, model=model, checkpoint={"verify": True}, optim={"projector_learning_rate": 2e-2})
    assert metrics(run)[-2]["learning_rate/projector"] > 0
    peft = export(monkeypatch, run, "peft", tmp_path / "peft")
    for folder in (run / "export", peft):
        stored = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["modules_to_save"] is None and not config["use_dora"] and config["bias"] == "none"
        modules = {vllms_module(name) for name in stored}
        assert {f"multi_modal_projector.{linear}" for linear in LINEARS} <= modules
        assert all(module.startswith(("language_model.model.layers.", "multi_modal_projector.")) for module in modules)
        assert stored[f"{PEFT_PREFIX}{PROJECTOR}linear_1.lora_B.weight"].abs().max() > 0
        assert "vllm serve" in (folder / "README.md").read_text()
    for form in ("peft", "merged", "llava"):
        out = peft if form == "peft" else export(monkeypatch, run, form, tmp_path / form)
        assert_same(logits(run), logits(out))
    assert not any("projector" in name for name in load_file(tmp_path / "llava" / "adapter_model.safetensors"))
    learnt = torch.load(tmp_path / "llava" / "non_lora_trainables.bin", weights_only=True)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    ours = learnt[f"{PEFT_PREFIX}model.mm_projector.0.weight"]
    torch.testing.assert_close(ours, merged["multi_modal_projector.linear_1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dora", "pissa"])
def test_variants_and_biases_on_the_projector_survive_every_form(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_here(monkeypatch)
    lora = {"variant": variant, "bias": "lora_only", "projector": True}
    base = make_llava(tmp_path / "base", biases=True)
    run = fine_tune(tmp_path, model={"base": str(base), "lora": lora}, checkpoint={"verify": True})
    for form, source in (("peft", run), ("merged", run), ("llava", tmp_path / "merged")):
        assert_same(logits(run), logits(export(monkeypatch, source, form, tmp_path / form)))


@pytest.mark.slow
def test_an_adapted_projector_of_another_file_is_no_adapter_for_peft_alone(
    tmp_path: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    first = fine_tune(tmp_path / "first", model={"base": str(llava_folder), "train": "projector"})
    lora = {"rank": 4, "projector": True}
    model = {"base": str(llava_folder), "projector": str(first), "lora": lora}
    run = fine_tune(tmp_path / "second", model=model)
    assert_same(logits(run), logits(export(monkeypatch, run, "merged", tmp_path / "merged")))
    with pytest.raises(SystemExit):
        export(monkeypatch, run, "peft", tmp_path / "peft")
    assert "adapts a projector that is not the one of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_means_of_micro_batches_and_an_adapted_projector_goes_on_bit_for_bit(
    data: Path, tmp_path: Path
) -> None:
    changes = {
        "model": {"base": str(make_llava(tmp_path / "base")), "lora": {"rank": 4, "dropout": 0.2, "projector": True}},
        "optim": {"decay": "original", "weight_decay": 0.1, "learning_rate": 2e-2},
        "log": {"every": 3},
    }
    folders = [tmp_path / name for name in ("whole", "broken")]
    runs = [settings(folder, data, **changes) for folder in folders]
    for tables in runs:
        tables["train"]["loss"] = "micro_batch_mean"
        tables["model"] |= {"vision_tower": "", "adapter": ""}
    uninterrupted = train(runs[0])
    train_until(runs[1], 5)  # between two lines of the log
    assert_same_run(train(runs[1]), uninterrupted)
