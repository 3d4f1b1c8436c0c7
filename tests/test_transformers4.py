"""Exports in transformers 4.57, where many serve models: the same ids, pixels and logits as in training.

`launch/test.sh` installs that version into .transformers4, or TRANSFORMERS_4 names another folder with it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import version_4
from helpers.bases import Kind, make_base
from helpers.exported import assert_same, export, fine_tune, logits, probe_inputs
from helpers.vocabularies import base_of, texts
from llava_accel.model.processing import load_processing
from llava_accel.model.saved_processor import save_processor, save_tokenizer
from llava_accel.model.tokenizer import load_tokenizer
from llava_accel.recipe import ModelTable

pytestmark = pytest.mark.slow

FOLDER = os.environ.get("TRANSFORMERS_4") or Path(__file__).parents[1] / ".transformers4"
Ask = Callable[[str, Path, Path], object]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Lets a process with that version do a job of helpers/version_4.py."""
    assert Path(FOLDER).is_dir(), "bash launch/test.sh --setup-only installs transformers 4.57 beside the environment"
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "HF_HUB_OFFLINE": "1"}
    # -P: the program's own folder holds modules of ours, which must not be found.
    command = [sys.executable, "-P", version_4.__file__]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        to, answers = process.stdin, process.stdout

        def do(kind: str, folder: Path, file: Path) -> object:
            print(json.dumps([kind, str(folder), str(file)]), file=to, flush=True)
            return json.loads(answers.readline())

        yield do


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bpe", "unigram"])
def test_a_tokenizer_model_gives_the_same_ids(ask: Ask, tmp_path: Path, kind: str, legacy: bool) -> None:
    tokenizer, _ = load_tokenizer(base_of(kind, tmp_path / "base", legacy=legacy))
    save_tokenizer(tmp_path / "saved", tokenizer)
    sample = texts(1000)
    (tmp_path / "texts.json").write_text(json.dumps(sample))
    assert ask("tokenize", tmp_path / "saved", tmp_path / "texts.json") == tokenizer(sample)["input_ids"]


@pytest.mark.parametrize("image_aspect", ["pad", "crop", "stretch"])
def test_a_processor_gives_the_same_ids_and_pixels(
    ask: Ask, tmp_path: Path, hub_or_original: Path, image_aspect: str
) -> None:
    processing = load_processing(ModelTable(base=str(hub_or_original)), image_aspect)
    processor = processing.processor
    save_processor(tmp_path / "saved", processing)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 81, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    ours = processor(images=image, text="USER: <image>\nWhat  is it?</s>USER: x", return_tensors="np")  # pyright: ignore[reportCallIssue]
    theirs = ask("process", tmp_path / "saved", tmp_path / "image.png")
    assert isinstance(theirs, list)
    assert theirs[:2] == [
        processor.apply_chat_template([version_4.MESSAGE], add_generation_prompt=True), ours["input_ids"].tolist()
    ]  # fmt: skip
    np.testing.assert_allclose(np.array(theirs[2]), ours["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "trains"),
    [
        (Kind("clip", "original", "llama3", "sentencepiece"), False),  # scaled positions
        (Kind("siglip", "hub", "mistral", "unigram"), False),
        (Kind("clip", "hub", "qwen", "byte"), True),
    ],
    ids=str,
)
def test_a_whole_model_gives_the_same_logits(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, trains: bool
) -> None:
    keys = make_base(tmp_path / "made", kind)
    with_theta(Path(keys["base"]), 3e5)
    folder = fine_tune(tmp_path, model={**keys, "train": "full"}, checkpoint={"verify": False}) if trains else None
    saved = folder / "export" if folder else export(monkeypatch, keys["base"], "merged", tmp_path / "saved")
    processing = load_processing(ModelTable(base=str(saved)), "pad")
    torch.save(probe_inputs(processing), tmp_path / "inputs.pt")
    theirs = ask("answer", saved, tmp_path / "inputs.pt")
    assert isinstance(theirs, list)
    assert_same(logits(saved), torch.tensor(theirs[0])[:, : processing.vocab_size], 1e-4)


def test_an_adapter_gives_the_same_logits(ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_base(tmp_path / "made", Kind("clip", "hub", "llama", "byte"))["base"]
    base = str(export(monkeypatch, made, "merged", tmp_path / "base"))
    run = fine_tune(tmp_path, model={"base": base}, checkpoint={"verify": False})
    processing = load_processing(ModelTable(base=base), "pad")
    torch.save({"base": base, "inputs": dict(probe_inputs(processing))}, tmp_path / "job.pt")
    theirs = ask("adapt", run / "export", tmp_path / "job.pt")
    assert_same(logits(run), torch.tensor(theirs)[:, : processing.vocab_size], 1e-4)


def with_theta(base: Path, theta: float) -> None:
    """Give a base another wavelength of positions than the default, where its config has it."""
    path = base / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    text.get("rope_parameters", text)["rope_theta"] = theta
    path.write_text(json.dumps(config))
