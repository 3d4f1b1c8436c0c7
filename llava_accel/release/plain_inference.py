"""Loads an export with transformers and peft alone and computes with it: run as a program that reads the job's path.

It may be started before there is a job, as the libraries take seconds. If no path comes, it ends.

Nothing of this package is imported here: users of the export may not have it. `verification.py` compares.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig

_OF_TOKENS = ("input_ids", "attention_mask")


def compute(path: Path) -> None:
    """Write logits, answers and the counts of loaded weights to the file that the job names."""
    job = json.loads(path.read_bytes())
    torch.set_num_threads(job["num_threads"])
    model, counts = _load(job)
    model.eval()
    logits, answers = [], []
    for inputs, positions in torch.load(job["inputs"], weights_only=True):
        given = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].to(getattr(torch, job["dtype"]))
        with torch.no_grad():
            targets = model(**given, use_cache=False).logits[0, positions.to(model.device), : job["vocab_size"]]
            logits.append(targets.float().cpu())
            answers.append(_answer(model, given, int(positions[0]) + 1, job))
    torch.save({"logits": torch.cat(logits), "answers": answers, "counts": counts}, job["out"])


def _load(job: dict[str, Any]) -> tuple[Any, dict[str, tuple[int, int]]]:
    folder, dtype = Path(job["folder"]), getattr(torch, job["dtype"])
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": job["device"]}}
    if not job["base"]:
        return AutoModelForImageTextToText.from_pretrained(folder, **kwargs), {}
    if job["quantization"]:
        keys = {
            key: getattr(torch, value) if key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage") else value
            for key, value in job["quantization"].items()
        }
        kwargs["quantization_config"] = BitsAndBytesConfig(**keys)
    model: Any = AutoModelForImageTextToText.from_pretrained(job["base"], **kwargs)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would round the scales of the 4-bit weights
    counts: dict[str, tuple[int, int]] = {}
    rest = folder / "non_lora_trainables.safetensors"
    if rest.is_file():
        stored = load_file(rest)
        unexpected = set(model.load_state_dict(stored, strict=False).unexpected_keys)
        counts[rest.name] = (len(stored.keys() - unexpected), len(stored))
    if (folder / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(model, str(folder))
        stored = load_file(folder / "adapter_model.safetensors")
        counts["adapter_model.safetensors"] = (_num_loaded(model, stored), len(stored))
    return model, counts


def _num_loaded(model: nn.Module, stored: dict[str, torch.Tensor]) -> int:
    """How many weights of the file the model now holds: peft silently leaves out those that it finds no place for."""
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    return sum(
        name in held and torch.equal(held[name].cpu().float(), tensor.to(held[name].dtype).float())
        for name, tensor in stored.items()
    )


def _answer(model: Any, given: dict[str, torch.Tensor], length: int, job: dict[str, Any]) -> list[int]:
    prompt = {name: tensor[:, :length] if name in _OF_TOKENS else tensor for name, tensor in given.items()}
    stops, longest, never = job["stop_ids"], job["max_new_tokens"], job["never"]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=longest, eos_token_id=stops, pad_token_id=stops[0], suppress_tokens=never
    )
    ids = model.generate(**prompt, generation_config=config)[0, length:].tolist()
    return next((ids[:place] for place, token in enumerate(ids) if token in stops), ids)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays: going through it takes a second when the process ends
    if named := sys.stdin.readline().rstrip("\n"):
        compute(Path(named))
    assert not any(name.startswith("llava_accel") for name in sys.modules)
