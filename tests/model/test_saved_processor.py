"""What is saved of a processor opens in transformers 4 and 5 alike."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from helpers.samples import byte_level
from helpers.vocabularies import base_of, texts
from llava_accel.model.processing import Processing, load_processing
from llava_accel.model.saved_processor import save_processor, save_tokenizer
from llava_accel.model.tokenizer import load_tokenizer
from llava_accel.recipe import ModelTable

PARITY = Path(__file__).parents[1] / "parity"
CLASSES = {"CLIPImageProcessor", "LlavaImageProcessor"}
"""Of image processors that transformers 4.57 has."""


def saved(folder: Path, image_aspect: str = "pad", **model: str) -> tuple[Processing, dict[str, dict]]:
    """A processor that was saved, and its JSON files by name."""
    processing = load_processing(ModelTable(**model), image_aspect)  # type: ignore[arg-type]
    save_processor(folder, processing)
    return processing, {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("image_aspect", ["pad", "crop", "stretch"])
def test_the_files_say_what_both_versions_read(tmp_path: Path, hub_or_original: Path, image_aspect: str) -> None:
    processing, files = saved(tmp_path, image_aspect, base=str(hub_or_original))
    tokenizer = files["tokenizer_config.json"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(tokenizer.get("extra_special_tokens", {}), dict)
    assert "image_processor" not in files["processor_config.json"]
    assert files["processor_config.json"]["processor_class"] == "LlavaProcessor"
    assert files["processor_config.json"]["patch_size"] == 14
    assert files["preprocessor_config.json"]["image_processor_type"] in CLASSES
    assert (tmp_path / "chat_template.jinja").read_text() == processing.processor.chat_template


@pytest.mark.parametrize("layout", ["hub", "original"])
def test_what_is_loaded_again_gives_the_same_ids_and_pixels(tmp_path: Path, llava_folder: Path, layout: str) -> None:
    base = llava_folder if layout == "hub" else PARITY / "llava-orig"
    processing, _ = saved(tmp_path, base=str(base))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8))
    batches = [
        processor(images=image, text="USER: <image>\nWhat  is it?</s>USER: x", return_tensors="np")  # pyright: ignore[reportCallIssue]
        for processor in (processing.processor, AutoProcessor.from_pretrained(tmp_path))
    ]
    for name in ("input_ids", "pixel_values"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["llama", "unigram"])
def test_a_saved_tokenizer_is_the_one_that_was_saved(tmp_path: Path, kind: str, legacy: bool) -> None:
    tokenizer, _ = load_tokenizer(base_of(kind, tmp_path / "base", legacy=legacy))
    save_tokenizer(tmp_path / "saved", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    sample = texts(300)
    assert again(sample)["input_ids"] == tokenizer(sample)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    kept = {token.content: token.special for token in again.added_tokens_decoder.values()}
    assert kept == {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert kept["<box>"] is False and kept["</s>"] is True
    assert set(again.all_special_tokens) >= {"<s>", "</s>", "<unk>", "<image>"}
    for each in ("bos", "eos", "unk", "pad"):
        assert getattr(again, f"{each}_token_id") == getattr(tokenizer, f"{each}_token_id")


def test_a_byte_level_tokenizer_outlives_saving_too(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, byte_level())
    again = AutoTokenizer.from_pretrained(tmp_path)
    sample = texts(100)
    assert again(sample)["input_ids"] == byte_level()(sample)["input_ids"]
    assert again.eos_token == "<|im_end|>"
