"""A model or an adapter that cannot be used is named with its file, before it trains anything, and runs no program."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.broken_images import BROKEN as IMAGES
from helpers.broken_models import ADAPTERS, BASES, NOT_FINITE, copy_spoilt
from helpers.runs import PARITY
from helpers.samples import record
from helpers.verbs import assert_helpful, assert_refused, start, write_recipe

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}


def recipe(folder: Path, base: Path, adapter: Path | str = "", **changes: Any) -> Path:
    model = {"base": str(base), "vision_tower": "", "adapter": str(adapter), "lora": LORA}
    return write_recipe(folder, folder / "data.json", model=model, **changes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data.json").write_text(json.dumps([record("<image>What?", "A cat", image="t0.png", id="one")]))
    return tmp_path


@pytest.mark.parametrize("name", BASES)
def test_broken_input_a_base(data: Path, llava_folder: Path, name: str) -> None:
    spoil, says = BASES[name]
    base = copy_spoilt(llava_folder, data / "base", spoil)
    for verb in ("check", "evaluate" if says is NOT_FINITE else "train"):
        file = recipe(data, base, data={"eval": str(data / "data.json")})
        assert_refused(start(verb, str(file), fresh=True), [str(data), *says])
    if says is NOT_FINITE:  # there the first step says so, with its records, and the recipe has its word
        assert_refused(start("train", str(recipe(data, base)), fresh=True), ["step 1", "not finite", "one"])
    assert not (data / "ran").exists(), "a program from the model's folder was run"
    assert not (data / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ADAPTERS)
def test_broken_input_an_adapter(data: Path, llava_folder: Path, lora_run: Path, name: str) -> None:
    spoil, says = ADAPTERS[name]
    adapter = copy_spoilt(lora_run / "export", data / "adapter", spoil)
    for verb in ("check", "train"):
        assert_refused(start(verb, str(recipe(data, llava_folder, adapter)), fresh=True), [str(data), *says])
    assert not (data / "ran").exists()


@pytest.mark.parametrize("verb", ["check", "train", "evaluate"])
def test_broken_input_an_adapter_of_another_base(data: Path, llava_folder: Path, verb: str) -> None:
    file = recipe(data, llava_folder, PARITY / "adapter_init", data={"eval": str(data / "data.json")})
    assert_refused(start(verb, str(file), fresh=True), [str(PARITY / "adapter_init"), "base"])


@pytest.mark.parametrize("name", ["half the adapter weights", "an adapter for a wider base", "no adapter weights"])
@pytest.mark.parametrize("verb", ["chat", "export"])
def test_broken_input_an_adapter_to_use(data: Path, lora_run: Path, verb: str, name: str) -> None:
    adapter = copy_spoilt(lora_run / "export", data / "adapter", ADAPTERS[name][0])
    arguments = {"chat": ["--adapter", str(adapter), "--once", "?"],
                 "export": [str(adapter), "--to", "merged", "--out", str(data / "out")]}[verb]  # fmt: skip
    assert_refused(start(verb, *arguments, fresh=True), [str(adapter)])
    assert not (data / "out").exists() and not (data / "out.tmp").exists()


@pytest.mark.parametrize("verb", ["chat", "export", "evaluate"])
def test_broken_input_a_folder_of_nothing(data: Path, llava_folder: Path, verb: str) -> None:
    arguments = {"chat": ["--adapter", str(data), "--once", "?"],
                 "export": [str(data), "--to", "merged", "--out", str(data / "out")],
                 "evaluate": [str(recipe(data, llava_folder)), "--adapter", str(data)]}[verb]  # fmt: skip
    assert_refused(start(verb, *arguments), [str(data), "Name a run"])


def test_check_says_all_that_is_wrong_in_one_pass(tmp_path: Path, llava_folder: Path, lora_run: Path) -> None:
    """A recipe, a model, an adapter, records, images and a run folder, each with a fault of its own."""
    base = copy_spoilt(llava_folder, tmp_path / "base", BASES["a weight that is no number"][0])
    BASES["an empty tokenizer"][0](base)
    adapter = copy_spoilt(lora_run / "export", tmp_path / "adapter", ADAPTERS["another rank"][0])
    (tmp_path / "run").write_text("a file where the run folder should be")
    named, make, says = IMAGES["text named .jpg"]
    make(tmp_path / named)
    asked = {"from": "human", "value": "Q"}
    records = [
        record("<image>", "A", id="an image", image=named), {"id": "a record", "conversations": [asked, asked]}
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "eval.json").write_text("[")
    changes = {"data": {"images": str(tmp_path), "eval": str(tmp_path / "eval.json")}, "optim": {"learning_rat": 1}}
    ended = start("check", str(recipe(tmp_path, base, adapter, **changes)), fresh=True)
    assert ended.code == 2 and "Traceback" not in ended.err
    faults = [
        ["optim.learning_rat = 1", "Did you mean optim.learning_rate?"],
        ["run.output_dir", str(tmp_path / "run")],
        [str(base), "tokenizer"],
        [str(base), *BASES["a weight that is no number"][1]],
        [str(adapter), *ADAPTERS["another rank"][1]],
        [str(tmp_path / "eval.json"), "cut off"],
    ]
    assert len(ended.messages) == len(faults), ended.err
    for message, words in zip(ended.messages, faults, strict=True):
        assert_helpful(message, words)
    assert_helpful(ended.out, ["row 1 (id 'an image')", *says, "row 2 (id 'a record')", "must alternate"])


def test_a_good_copy_is_no_broken_one(data: Path, llava_folder: Path, lora_run: Path) -> None:
    base = Path(shutil.copytree(llava_folder, data / "base"))
    adapter = Path(shutil.copytree(lora_run / "export", data / "adapter"))
    for verb in ("check", "train"):
        ended = start(verb, str(recipe(data, base, adapter)), fresh=True)
        assert ended.code == 0, ended.err
