"""An export computes what was trained, in the program that it is for, and there is no half of one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from helpers.exported import CPU, ORIGINAL, assert_same, export, fine_tune, logits, probe_inputs, prove_here, without_us
from helpers.runs import PARITY
from helpers.tiny import make_llava
from llava_accel.inference.dialogue import Dialogue
from llava_accel.inference.origin import find_trained, load_trained
from llava_accel.model.files import StoredTensor
from llava_accel.release import forms
from llava_accel.release import verification as agreement

pytestmark = pytest.mark.slow

IMAGE = PARITY / "images" / "t3.png"
QUESTION = "What is in the image?"  # of the model card


@pytest.fixture(scope="module")
def elsewhere(
    lora_run: Path, lora_exports: dict[str, Path], llava_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process says that knows transformers and peft alone."""
    loaded = load_trained(find_trained(str(lora_run)), dtype=torch.float32, device=CPU)
    return without_us(
        tmp_path_factory.mktemp("elsewhere"),
        probe_inputs(loaded.processing),
        {"peft": (llava_folder, lora_exports["peft"]), "merged": (lora_exports["merged"], None)},
        {"checkpoint": lora_run / "best", "peft": lora_exports["peft"], "merged": lora_exports["merged"]},
        IMAGE,
    )


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_transformers_and_peft_alone_compute_what_was_trained(
    form: str, lora_run: Path, elsewhere: dict[str, Any]
) -> None:
    assert_same(logits(lora_run), torch.tensor(elsewhere["logits"][form]))


@pytest.mark.parametrize("place", ["checkpoint", "peft", "merged"])
def test_lines_of_the_model_card_give_the_answer_of_chat(place: str, lora_run: Path, elsewhere: dict[str, Any]) -> None:
    trained = find_trained(str(lora_run))
    dialogue = Dialogue(load_trained(trained, dtype=torch.float32, device=CPU), trained.recipe, 64)
    dialogue.show(lora_run / "best" / "image.jpg")
    answer = dialogue.ask(QUESTION)
    assert answer
    assert elsewhere["said"][place] == f"{answer}\n"


def test_adapter_trains_something_that_a_merge_could_lose(lora_run: Path, llava_folder: Path) -> None:
    assert float((logits(lora_run) - logits(llava_folder)).abs().max()) > 1e-2


@pytest.mark.parametrize("form", ["peft", "merged", "llava"])
def test_every_export_is_a_source_again(form: str, lora_run: Path, lora_exports: dict[str, Path]) -> None:
    assert_same(logits(lora_run), logits(lora_exports[form]))


def test_merged_export_generates_sanely(lora_exports: dict[str, Path]) -> None:
    config = GenerationConfig.from_pretrained(lora_exports["merged"])
    config.validate(strict=True)
    assert config.temperature is None and config.top_p is None and not config.do_sample
    image_token = json.loads((lora_exports["merged"] / "config.json").read_text())["image_token_index"]
    assert image_token in (config.suppress_tokens or [])


def test_quantised_run_is_merged_into_16_bits_and_measured_against_both(
    tmp_path: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    model = {"base": str(llava_folder), "quantization": {"bits": 4}}
    run = fine_tune(tmp_path, model=model, checkpoint={"verify": True})
    proved = capsys.readouterr().out
    assert re.search(r"export in plain transformers and peft.*: \d+ trained weights loaded; logits differ by", proved)
    assert "the adapter was trained on the base in 4 bits" not in proved
    merged = export(monkeypatch, run, "merged", tmp_path / "merged")
    assert_same(logits(run, bits=16), logits(merged))
    said = capsys.readouterr().out
    assert "the adapter was trained on the base in 4 bits (nf4) and is merged into its 16-bit weights" in said
    close, far = (
        float(re.search(rf"against {name}.*?differ by (\S+)", said)[1])  # pyright: ignore[reportOptionalSubscript]
        for name in ("16-bit base", "4-bit base")
    )
    assert close < 1e-5 < 1e-2 < far
    assert "load_in_4bit=True" in (run / "export" / "README.md").read_text()


@pytest.mark.parametrize("variant", ["dora", "rslora", "pissa"])
def test_variants_and_biases_and_towers_survive_every_form(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    base = make_llava(tmp_path / "base", biases=True)
    lora = {"variant": variant, "bias": "lora_only"}
    run = fine_tune(tmp_path, model={"base": str(base), "train_vision": True, "lora": lora})
    for form in ("peft", "merged"):
        assert_same(logits(run), logits(export(monkeypatch, run, form, tmp_path / form)))
    with pytest.raises(SystemExit):
        export(monkeypatch, run, "llava", tmp_path / "llava")
    said = capsys.readouterr().err
    assert f"model.lora.variant = '{variant}'" in said and "--to merged, and that folder --to llava" in said
    assert_same(logits(run), logits(export(monkeypatch, tmp_path / "merged", "llava", tmp_path / "llava")))


def test_base_of_the_original_converts_to_the_hubs_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)
    converted = export(monkeypatch, ORIGINAL, "merged", tmp_path / "converted")
    assert_same(logits(ORIGINAL), logits(converted))
    theirs = PARITY / "adapter_final"
    over_original, over_converted = (logits(theirs, base=str(base)) for base in (ORIGINAL, converted))
    assert_same(over_original, over_converted)


def test_failed_comparison_leaves_nothing(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    monkeypatch.setitem(agreement._TOLERANCE, torch.float32, -1.0)
    for form in ("merged", "peft"):
        with pytest.raises(SystemExit, match="2"):
            export(monkeypatch, lora_run, form, tmp_path / form, "--compare")
        assert "does not compute what was trained" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_merge_that_rounds_the_adapter_away_is_refused(
    tmp_path: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    optim = {"learning_rate": 1e-7, "projector_learning_rate": 0.0}
    run = fine_tune(tmp_path, model={"base": str(llava_folder)}, optim=optim)
    with pytest.raises(SystemExit):
        export(monkeypatch, run, "merged", tmp_path / "merged", "--dtype", "bf16")
    assert "--dtype fp32" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("form", ["peft", "llava"])
def test_without_a_gpu_no_base_is_loaded_to_rename_an_adapter(
    form: str, lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[str] = []

    def reading(self: StoredTensor) -> torch.Tensor:
        read.append(self.name)
        return whole(self)

    whole = StoredTensor.read
    monkeypatch.setattr(StoredTensor, "read", reading)
    monkeypatch.setattr(forms, "load_trained", None)
    export(monkeypatch, lora_run, form, tmp_path / form)
    assert "logits" not in capsys.readouterr().out
    wanted = (".lora_", "projector", *(("vision_tower.",) if form == "llava" else ()))  # a tower has a folder there
    assert read and not [name for name in read if not any(part in name for part in wanted)]


def test_a_comparison_that_is_asked_for_is_made(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    export(monkeypatch, lora_run, "peft", tmp_path / "peft", "--compare")
    said = capsys.readouterr().out
    assert "comparing in a process with transformers and peft alone, on the CPU" in said
    assert "adapter on a fresh base, against the trained model: " in said
    export(monkeypatch, lora_run, "merged", tmp_path / "merged", "--no-compare")
    assert "logits" not in capsys.readouterr().out


def test_nothing_is_overwritten(lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        export(monkeypatch, lora_run, "merged", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("source", "to", "options", "said"),
    [
        ("nowhere", "peft", (), "there is no folder"),
        ("adapter_final", "peft", (), "--base"),
        ("llava-orig", "peft", (), "holds a whole model and not an adapter"),
        ("llava-orig", "merged", ("--base", "x"), "Leave --base out"),
        ("images", "merged", (), "no adapter and no checkpoint"),
        ("llava-orig", "merged", ("--push", "x"), "ORG/NAME"),
        ("adapter_final", "peft", ("--base", str(ORIGINAL), "--dtype", "bf16"), "Leave --dtype out"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_remedy(
    source: str,
    to: str,
    options: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        export(monkeypatch, f"{PARITY}/{source}", to, tmp_path / "out", *options)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
