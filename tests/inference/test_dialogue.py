"""A dialogue's prompts are those of the training, here and in the processor that is saved, and answers come as they go."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from helpers.exported import CPU, ORIGINAL
from helpers.runs import PARITY
from helpers.samples import image_in
from llava_accel.data.conversation import Turn
from llava_accel.data.records import parse_record
from llava_accel.inference.dialogue import Dialogue, _Pieces
from llava_accel.inference.origin import Loaded, Trained, find_trained, load_trained
from llava_accel.model.saved_processor import save_processor
from llava_accel.recipe import dump_recipe, load_recipe
from llava_accel.setup.datasets import build_encoder
from llava_accel.sources.problems import DataError

ONE, TWO = PARITY / "images" / "t0.png", PARITY / "images" / "t3.png"
TEMPLATES = ("v1", "llava_llama_2", "mistral_instruct")


@pytest.fixture(scope="module")
def trained(lora_run: Path) -> Trained:
    return find_trained(str(lora_run))


@pytest.fixture(scope="module")
def loaded(trained: Trained) -> Loaded:
    return load_trained(trained, dtype=torch.float32, device=CPU)


@pytest.fixture
def dialogue(loaded: Loaded, trained: Trained) -> Dialogue:
    return Dialogue(loaded, trained.recipe, 8)


def test_prompt_is_the_beginning_of_the_training_example(loaded: Loaded, trained: Trained, dialogue: Dialogue) -> None:
    first = dialogue.ask("Hello")
    dialogue.show(ONE)
    dialogue.show(TWO)
    second = dialogue.ask("Which is red?")
    dialogue.show(TWO)
    prompt = dialogue.prompt("And this?")
    texts = ["Hello", first, "<image>\n<image>\nWhich is red?", second, "<image>\nAnd this?", "An answer."]
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    raw = {"image": [ONE.name, TWO.name, TWO.name], "conversations": turns}
    record = parse_record(json.dumps(raw).encode(), 1)
    example = build_encoder(trained.recipe, loaded.processing)(record, 0, image_in(ONE.parent)).example
    length = example.prompt_length()
    assert prompt.prompt_length() == length
    assert prompt.input_ids[:length].tolist() == example.input_ids[:length].tolist()
    assert prompt.images == example.images and prompt.image_starts == example.image_starts


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("legacy", [True, False])
def test_saved_processor_writes_the_same_prompt(legacy: bool, template: str, tmp_path: Path) -> None:
    for folder in (ORIGINAL, PARITY / "clip"):
        shutil.copytree(folder, tmp_path / folder.name)
    settings = tmp_path / ORIGINAL.name / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"legacy": legacy}))
    trained = find_trained(base=str(settings.parent), template=template)
    loaded = load_trained(trained, dtype=torch.float32, device=CPU)
    save_processor(tmp_path / "saved", loaded.processing)
    dialogue = Dialogue(loaded, trained.recipe, 4)
    answer = "Two of them."
    dialogue.show(ONE)
    dialogue.show(TWO)
    dialogue._turns += [Turn("user", "How many?"), Turn("assistant", answer)]
    prompt = dialogue.prompt("And what are they?")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "And what are they?"}],
        },
    ]
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.open(path).convert("RGB") for path in (ONE, TWO)]
    ids = processor(images=images, text=text, return_tensors="pt")["input_ids"][0].tolist()
    assert ids == prompt.input_ids[: prompt.prompt_length()].tolist()


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flex_attention"])
def test_what_was_trained_with_a_kernel_of_gpus_answers_without_one(
    kernel: str, lora_run: Path, tmp_path: Path, dialogue: Dialogue
) -> None:
    folder = shutil.copytree(lora_run / "export", tmp_path / "export")
    own = load_recipe(folder / "recipe.toml")
    run, model = own.run.model_copy(update={"precision": "bf16"}), own.model.model_copy(update={"attention": kernel})
    (folder / "recipe.toml").write_text(dump_recipe(own.model_copy(update={"run": run, "model": model})))
    trained = find_trained(str(folder))
    other = Dialogue(load_trained(trained, dtype=torch.float32, device=CPU), trained.recipe, 8)
    assert other.ask("Hello") == dialogue.ask("Hello")


def test_a_small_model_has_room_for_a_question_whatever_the_answers_length(loaded: Loaded, trained: Trained) -> None:
    small = Dialogue(loaded, trained.recipe, 100_000)
    small.show(ONE)
    assert small.prompt("What is it?").images


def test_answer_comes_in_pieces_that_make_the_whole(dialogue: Dialogue) -> None:
    pieces: list[str] = []
    answer = dialogue.ask("Tell me about it.", pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == answer


def test_no_piece_holds_half_a_character(loaded: Loaded) -> None:
    tokenizer, text = loaded.processing.processor.tokenizer, "\u20ac \U0001f600 or not"
    pieces: list[str] = []
    answer = _Pieces(tokenizer, frozenset({7}), pieces.append)
    for token in (*tokenizer(text, add_special_tokens=False)["input_ids"], 7):  # the text, and its end
        answer.add(torch.tensor([token]))
    assert answer.end() == text
    assert pieces[:2] == ["\u20ac", " \U0001f600"]
    assert "".join(pieces) == text


@pytest.mark.parametrize("name", ["~nobody-of-that-name/a.png", "a" * 5000, "a\0.png", "."])
def test_what_can_be_no_file_is_no_image(dialogue: Dialogue, name: str) -> None:
    with pytest.raises(DataError, match="there is no image"):
        dialogue.show(Path(name))
