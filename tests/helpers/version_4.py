"""What transformers 4.57 makes of saved files, for tests/test_transformers4.py. It answers each line of its input with one.

A line is a job: its kind, a folder of `save_pretrained`, and a file. Starting the library takes longer than all jobs.
"""

import json
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers
from PIL import Image

MESSAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}


def tokenize(folder: str, texts: str) -> list[list[int]]:
    """Ids of each text."""
    with open(texts) as file:
        return transformers.AutoTokenizer.from_pretrained(folder)(json.load(file))["input_ids"]


def process(folder: str, image: str) -> list[Any]:
    """The prompt of a message, and ids and pixels of a text with an image: all that a processor makes."""
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    batch = processor(images=Image.open(image), text="USER: <image>\nWhat  is it?</s>USER: x", return_tensors="np")
    prompt = processor.apply_chat_template([MESSAGE], add_generation_prompt=True)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}, list(batch)
    return [prompt, batch["input_ids"].tolist(), batch["pixel_values"].astype("float64").tolist()]


def answer(folder: str, inputs: str) -> list[Any]:
    """The logits of a prompt with an image, and the ids that are generated after it."""
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    model, info = cast(Any, loaded)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    batch = torch.load(inputs)
    written = model.generate(**batch, do_sample=False, max_new_tokens=3)
    return [model(**batch).logits[0].tolist(), written[0].tolist()]


def adapt(folder: str, job: str) -> list[Any]:
    """The logits of a base with an adapter, by the lines of the README."""
    from peft import PeftModel
    from safetensors.torch import load_file

    given = torch.load(job)
    base = transformers.LlavaForConditionalGeneration.from_pretrained(given["base"])
    trained = load_file(f"{folder}/non_lora_trainables.safetensors")
    left = base.load_state_dict(trained, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys
    with torch.no_grad():
        return PeftModel.from_pretrained(base, folder)(**given["inputs"]).logits[0].tolist()


JOBS: dict[str, Callable[[str, str], list[Any]]] = {
    "tokenize": tokenize,
    "process": process,
    "answer": answer,
    "adapt": adapt,
}

if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    for line in sys.stdin:
        kind, folder, file = json.loads(line)
        print(json.dumps(JOBS[kind](folder, file)), flush=True)
