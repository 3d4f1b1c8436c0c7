"""Logits of folders by LLaVA's own `load_pretrained_model`, in its environment and in fp32.

    python load_llava.py < JOBS

A job is a line of JSON: folder, base (null for a whole model), inputs (a file of torch with "ids" and "pixels"), out.
"""

import importlib
import json
import os
import sys
from typing import Any

import torch

builder: Any = importlib.import_module("llava.model.builder")
names: Any = importlib.import_module("llava.mm_utils")


class _Fp32:
    """torch, but that its half precision is single precision: the loader asks for fp16, which no CPU computes exactly."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def main() -> None:
    builder.torch = _Fp32()
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job["folder"])  # a tower inside a folder is named as it lies there
        name = names.get_model_name_from_path(job["folder"])
        _, model, _, _ = builder.load_pretrained_model(job["folder"], job["base"], name, device_map="cpu", device="cpu")
        tower, inputs = model.get_vision_tower(), torch.load(job["inputs"])
        if not tower.is_loaded:
            tower.load_model()
        tower.float()
        with torch.no_grad():
            out = model.float().eval()(input_ids=inputs["ids"], images=inputs["pixels"], use_cache=False)
        torch.save(out.logits[0], job["out"])


if __name__ == "__main__":
    main()
