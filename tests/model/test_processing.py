"""The processor counts, tokenises and resizes as training does, and still does so after it was saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from helpers.tiny import NUM_PATCHES, VOCABULARY, make_clip, make_language_model, make_siglip
from llava_accel.data.conversation import IMAGE, TEMPLATES, Piece, Turn
from llava_accel.data.pixels import ImageReader
from llava_accel.model.processing import Processing, load_processing, num_rows
from llava_accel.model.saved_processor import save_processor, save_tokenizer
from llava_accel.recipe import ModelTable

PARITY = Path(__file__).parents[1] / "parity"


def processing_of(image_aspect: str = "pad", **model: object) -> Processing:
    return load_processing(ModelTable(**{name: str(v) for name, v in model.items()}), image_aspect)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_language_model(folder / "language")
    make_clip(folder / "clip")
    make_siglip(folder / "siglip")
    return folder


def image(width: int = 80, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["hub", "original", "clip", "siglip"])
def test_the_processor_expands_a_image_to_the_models_tokens(parts: Path, llava_folder: Path, kind: str) -> None:
    bases: dict[str, dict[str, Any]] = {"hub": {"base": llava_folder}, "original": {"base": PARITY / "llava-orig"}}
    part = {"language_model": parts / "language", "vision_tower": parts / kind}
    processing = processing_of(**bases.get(kind, part))
    batch = processing.processor(images=image(), text="USER: <image>\nHi", return_tensors="pt")  # pyright: ignore[reportCallIssue]
    count = int((batch["input_ids"] == processing.image_token_id).sum())
    assert count == processing.tiling.tile_tokens == NUM_PATCHES
    assert batch["pixel_values"].shape == (1, 3, 56, 56)


def test_the_image_token_takes_the_next_free_row(parts: Path, llava_folder: Path) -> None:
    hub = processing_of(base=llava_folder)
    assert (hub.image_token_id, hub.vocab_size, hub.num_rows) == (VOCABULARY, VOCABULARY + 1, VOCABULARY + 1)
    assert hub.added_ids == [VOCABULARY]
    original = processing_of(base=PARITY / "llava-orig")
    assert (original.image_token_id, original.vocab_size, original.num_rows) == (2000, 2000, 2048)
    assert original.added_ids == list(range(2000, 2048))
    assert num_rows(32000, 32001) == 32064
    assert num_rows(151936, 151666) == 151936, "a spare row is used"


def test_weights_are_not_needed(tmp_path: Path) -> None:
    shutil.copytree(PARITY / "llava-orig", tmp_path / "base")
    shutil.copytree(PARITY / "clip", tmp_path / "clip")
    for file in tmp_path.glob("*/model.safetensors"):
        file.unlink()
    assert processing_of(base=tmp_path / "base").tiling.tile_tokens == NUM_PATCHES


@pytest.mark.parametrize("legacy", [True, False, None])
def test_the_legacy_flag_means_what_it_meant_to_llava_and_outlives_saving(tmp_path: Path, legacy: bool | None) -> None:
    shutil.copytree(PARITY / "llava-orig", tmp_path / "base")
    shutil.copytree(PARITY / "clip", tmp_path / "clip")
    path = tmp_path / "base" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["legacy"]
    path.write_text(json.dumps(config | ({} if legacy is None else {"legacy": legacy})))
    tokenizer = processing_of(base=tmp_path / "base").processor.tokenizer
    means = legacy is not False
    assert tokenizer.legacy is means
    ids = tokenizer("a</s>USER: b").input_ids
    assert ("▁USER" in tokenizer.convert_ids_to_tokens(ids)) == means
    save_tokenizer(tmp_path / "saved", tokenizer)
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved("a</s>USER: b").input_ids == ids
    assert len(saved) == 2001
    assert saved.convert_tokens_to_ids("<image>") == 2000


def test_tokenizers_pad_on_the_right_with_the_unknown_token(parts: Path) -> None:
    models: tuple[dict[str, Any], ...] = (
        {"base": PARITY / "llava-orig"},
        {"language_model": parts / "language", "vision_tower": parts / "clip"},
    )
    for model in models:
        tokenizer = processing_of(**model).processor.tokenizer
        assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<unk>")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_the_saved_processor_treats_images_as_training_does(
    parts: Path, tmp_path: Path, tower: str, aspect: str
) -> None:
    processing = processing_of(aspect, language_model=parts / "language", vision_tower=parts / tower)
    save_processor(tmp_path, processing)
    saved = AutoProcessor.from_pretrained(tmp_path)
    training = ImageReader(processing.processor.image_processor, aspect)  # type: ignore[arg-type]
    for size in ((80, 40), (33, 70), (56, 56)):
        sample = image(*size)
        theirs = saved(images=sample, text="<image>", return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(training.normalise(sample), theirs.float(), rtol=0, atol=1e-6)


def test_an_image_processor_of_another_size_is_refused(tmp_path: Path) -> None:
    shutil.copytree(PARITY / "llava-orig", tmp_path / "base")
    shutil.copytree(PARITY / "clip", tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"crop_size": {"height": 336, "width": 336}}))
    with pytest.raises(ValueError, match=r"336.*the vision tower takes 56 x 56 px"):
        processing_of(base=tmp_path / "base")


def text_of(pieces: list[Piece]) -> str:
    special = {"bos": "<s>", "eos": "</s>"}
    words = {"text": lambda p: p.text, "image": lambda p: IMAGE, "special": lambda p: special.get(p.text, p.text)}
    return "".join(words[piece.kind](piece) for piece in pieces)


CONVERSATIONS = [
    [Turn("user", "<image>\nWhat is it?"), Turn("assistant", "A cat.")],
    [
        Turn("user", "<image>\n<image>\nWhich?"),
        Turn("assistant", "Both."),
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
    ],
    [Turn("system", "Be brief."), Turn("user", "Hello"), Turn("assistant", "Hi")],
]


@pytest.mark.parametrize(
    ("name", "turns"),
    # "plain" captions an image and takes one round without a system prompt.
    [(name, turns) for name in sorted(TEMPLATES) for turns in CONVERSATIONS[: 1 if name == "plain" else 3]],
)
def test_the_chat_template_writes_what_training_reads(name: str, turns: list[Turn]) -> None:
    processor = processing_of(base=PARITY / "llava-orig", template=name).processor
    messages = []
    for turn in turns:
        *images, words = turn.text.split("<image>\n")
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": words}]
        messages.append({"role": turn.role, "content": content if turn.role == "user" else turn.text})
    expected = text_of(TEMPLATES[name](turns, True)).removeprefix("<s>")
    assert processor.apply_chat_template(messages) == expected
    answer = turns[-1].text
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert isinstance(prompt, str)
    assert expected.startswith(prompt)
    assert expected.removeprefix(prompt).lstrip(" ").startswith(answer)


def test_auto_is_the_processors_own_template(llava_folder: Path, parts: Path) -> None:
    processor = processing_of(base=llava_folder, template="auto").processor
    assert processor.apply_chat_template([{"role": "user", "content": "x"}]) == "USER: x "
    bare = processing_of(language_model=parts / "language", vision_tower=parts / "clip", template="auto")
    assert bare.processor.chat_template is None
