"""Exports in transformers 4.57, where many serve models: the same ids and the same pixels as in training.

It needs a folder with that version, named by TRANSFORMERS_4:
pip install --target FOLDER transformers==4.57.1 tokenizers==0.22.1 huggingface_hub==0.36.0 requests
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.vocabularies import base_of, texts
from llava_accel.model.processing import load_processing
from llava_accel.model.saved_processor import save_processor, save_tokenizer
from llava_accel.model.tokenizer import load_tokenizer
from llava_accel.recipe import ModelTable

PARITY = Path(__file__).parent / "parity"
FOLDER = os.environ.get("TRANSFORMERS_4", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="TRANSFORMERS_4 names no folder")

_TOKENIZE = """
import json, sys, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps(tokenizer(json.load(open(sys.argv[2])))["input_ids"]))
"""
_PROCESS = """
import json, sys, transformers
from PIL import Image
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1])
image = Image.open(sys.argv[2])
batch = processor(images=image, text="USER: <image>\\nWhat  is it?</s>USER: x", return_tensors="np")
message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
prompt = processor.apply_chat_template([message], add_generation_prompt=True)
print(json.dumps([prompt, batch["input_ids"].tolist(), batch["pixel_values"].astype("float64").tolist()]))
"""


def in_version_4(program: str, *arguments: Path) -> object:
    """What a program prints as JSON."""
    environment = os.environ | {"PYTHONPATH": FOLDER, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("kind", ["llama", "bpe", "unigram"])
def test_a_tokenizer_model_gives_the_same_ids(tmp_path: Path, kind: str, legacy: bool) -> None:
    tokenizer, _ = load_tokenizer(base_of(kind, tmp_path / "base", legacy=legacy))
    save_tokenizer(tmp_path / "saved", tokenizer)
    sample = texts(1000)
    (tmp_path / "texts.json").write_text(json.dumps(sample))
    theirs = in_version_4(_TOKENIZE, tmp_path / "saved", tmp_path / "texts.json")
    assert theirs == tokenizer(sample)["input_ids"]


@pytest.mark.parametrize("image_aspect", ["pad", "crop", "stretch"])
@pytest.mark.parametrize("layout", ["hub", "original"])
def test_a_processor_gives_the_same_ids_and_pixels(
    tmp_path: Path, llava_folder: Path, layout: str, image_aspect: str
) -> None:
    base = llava_folder if layout == "hub" else PARITY / "llava-orig"
    processor = load_processing(ModelTable(base=str(base)), image_aspect).processor
    save_processor(tmp_path / "saved", processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 81, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    ours = processor(images=image, text="USER: <image>\nWhat  is it?</s>USER: x", return_tensors="np")  # pyright: ignore[reportCallIssue]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    theirs = in_version_4(_PROCESS, tmp_path / "saved", tmp_path / "image.png")
    assert isinstance(theirs, list)
    assert theirs[:2] == [
        processor.apply_chat_template([message], add_generation_prompt=True), ours["input_ids"].tolist()
    ]  # fmt: skip
    np.testing.assert_allclose(np.array(theirs[2]), ours["pixel_values"], rtol=0, atol=1e-6)
