"""The curves that LLaVA-NeXT's own train() computed (tests/parity/next): recipes that follow them, and where they end."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.runs import PARITY, trained

NEXT = PARITY / "next"
CURVES = NEXT / "curves"
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 1e-4
STRAY_TOLERANCE, STRAYS = 2e-4, 1e-3
"""In fp32 such a share of the numbers may be a little further away, as processors round differently. In next_lora_accum the
gradient of one number is 1.1e-8 at the second step, a millionth of its neighbours'; Adam divides it by its size, and so
rounding by 3e-9 moves that number, and three others with it, by up to 1.8e-4. In fp64 none is further away than 2.1e-5."""

LORA: dict[str, Any] = {
    "model": {"train": "lora", "adapter": str(CURVES / "adapter_init")},
    "optim": {"learning_rate": 5e-3, "projector_learning_rate": 1e-3},
}
FULL: dict[str, Any] = {"train": "full", "train_vision": True, "adapter": ""}
RUNS: dict[str, dict[str, Any]] = {
    "next_lora": {**LORA, "train": {"per_device_batch_size": 8}},
    "next_lora_accum": {
        **LORA,
        "train": {"per_device_batch_size": 2, "accumulation_steps": 4, "loss": "micro_batch_mean"},
    },
    "next_full": {
        "model": FULL,
        "optim": {
            "learning_rate": 1e-3, "projector_learning_rate": 1e-3, "vision_learning_rate": 2e-4, "weight_decay": 0.1,
        },
        "train": {"per_device_batch_size": 8},
    },
    "onevision_full": {
        "model": FULL | {"template": "qwen_1_5"},
        "data": {"labels": "original"},
        "optim": {
            "learning_rate": 1e-3, "projector_learning_rate": 5e-4, "vision_learning_rate": 2e-4, "weight_decay": 0.05,
        },
        "train": {"per_device_batch_size": 8},
    },
    "onevision_projector": {
        "model": {"train": "projector", "template": "plain", "adapter": ""},
        "optim": {"learning_rate": 2e-3, "projector_learning_rate": 2e-3},
        "train": {"per_device_batch_size": 6},
    },
}  # fmt: skip


def settings(name: str) -> dict[str, dict[str, Any]]:
    """The recipe's tables of a curve, less what all short runs have."""
    bases = NEXT / "bases"
    base, tower = ("onevision-qwen", "siglip") if name.startswith("onevision") else ("next-vicuna", "clip")
    own = RUNS[name]
    return {
        "model": {"base": str(bases / base), "vision_tower": str(bases / tower), **own["model"]},
        "data": {
            "images": str(NEXT / "images"), "max_length": 8192, "shuffle": False, "group_by_length": False,
            **own.get("data", {}),
        },
        "optim": {"decay": "original", "warmup_fraction": 0.1, **own["optim"]},
        "train": {"epochs": 20, **own["train"]},
    }  # fmt: skip


def records(name: str) -> Path:
    return CURVES / f"traj_{name.removesuffix('_accum')}.json"


def reference(name: str) -> list[dict[str, Any]]:
    return json.loads((CURVES / f"traj_{name}_ref.json").read_text())["steps"]


TO_ORIGINAL = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "vision_tower.vision_model.": "model.vision_tower.vision_tower.vision_model.",
    "image_newline": "model.image_newline",
}
"""How names of adapters and of whole models begin, and the original's for it: the package's map is tested too."""


def as_original(name: str) -> str:
    bare = name.removeprefix("base_model.model.")
    begin = next((each for each in TO_ORIGINAL if bare.startswith(each)), "")
    return name[: len(name) - len(bare)] + TO_ORIGINAL.get(begin, "") + bare.removeprefix(begin)


def final(name: str) -> dict[str, Tensor]:
    if name.startswith("next_lora"):
        folder = CURVES / ("adapter_final_accum" if name.endswith("accum") else "adapter_final")
        rest = load_file(folder / "non_lora_trainables.safetensors")
        bare = {key.removeprefix("base_model.model."): tensor for key, tensor in rest.items()}
        return load_file(folder / "adapter_model.safetensors") | bare
    return load_file(CURVES / f"{name}_final.safetensors")


def weights(run: Path) -> dict[str, Tensor]:
    """What a run has trained, under the original's names."""
    whole = run / "export" / "model.safetensors"
    found = load_file(whole) if whole.exists() else trained(run / "export")
    return {as_original(key): tensor for key, tensor in found.items()}


def distances(run: Path, name: str) -> Tensor:
    """How far each number that a run has trained is from the original's after the last step."""
    ours, theirs = weights(run), final(name)
    assert theirs.keys() <= ours.keys(), sorted(theirs.keys() - ours.keys())[:5]
    # An embedding may have grown by a row for the image token.
    return torch.cat([(ours[key][: len(tensor)] - tensor).abs().flatten() for key, tensor in theirs.items()])


def assert_final_weights(run: Path, name: str, strays: float = STRAYS) -> None:
    """A run has ended at the original's weights, but for such a share of the numbers."""
    apart = distances(run, name)
    assert float(apart.max()) < STRAY_TOLERANCE
    assert (apart >= WEIGHT_TOLERANCE).double().mean() <= strays
