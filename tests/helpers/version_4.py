"""What transformers 4.57 makes of saved files, for tests/test_transformers4.py. It answers each line of its input with one.

A line is a job: its kind, a folder of `save_pretrained`, and a file. Starting the library takes longer than all jobs.
"""

import json
import sys
from typing import Any

import transformers
from PIL import Image

MESSAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}


def tokenize(folder: str, texts: str) -> list[list[int]]:
    """Ids of each text."""
    with open(texts) as file:
        return transformers.AutoTokenizer.from_pretrained(folder)(json.load(file))["input_ids"]


def process(folder: str, image: str) -> list[Any]:
    """The prompt of a message, and ids and pixels of a text with an image."""
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    batch = processor(images=Image.open(image), text="USER: <image>\nWhat  is it?</s>USER: x", return_tensors="np")
    prompt = processor.apply_chat_template([MESSAGE], add_generation_prompt=True)
    return [prompt, batch["input_ids"].tolist(), batch["pixel_values"].astype("float64").tolist()]


if __name__ == "__main__":
    assert transformers.__version__.startswith("4.57"), transformers.__version__
    for line in sys.stdin:
        kind, folder, file = json.loads(line)
        print(json.dumps({"tokenize": tokenize, "process": process}[kind](folder, file)), flush=True)
