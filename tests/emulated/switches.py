"""What is run on the emulated device, and what is seen of it. Nothing here imports torch.

A new way to train, or a new switch, is one line in `RUNS`: its name and the keys of the recipe that differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"
Keys = Mapping[str, Mapping[str, Any]]

STEPS, WINDOW = 3, 2
"""Steps of a run, and micro-batches of a step."""
TOKENS = 3
"""Of an answer, at most."""
RUNS: dict[str, Keys] = {
    "lora": {},
    "lora, shared": {"data": {"share_prefix": True}, "model": {"lora": {"bias": "lora_only"}}},
    "lora, no cache": {"data": {"cache_features": False}, "model": {"tower_batch": 1, "lora": {"variant": "rslora"}}},
    "lora, dropout, checkpointing": {"model": {"gradient_checkpointing": True, "lora": {"dropout": 0.3}}},
    "lora, logits in parts": {"model": {"lora": {"dropout": 0.3, "variant": "olora"}}, "data": {"workers": 1}},
    "lora on the projector": {"model": {"lora": {"projector": True}, "attention": "sdpa"}},
    "lora and the tower": {"model": {"train_vision": True, "train_projector": False}, "log": {"every": 2}},
    "dora": {"model": {"lora": {"variant": "dora"}, "gradient_checkpointing": 2}},
    "pissa": {"model": {"lora": {"variant": "pissa"}}, "optim": {"schedule": "constant"}},
    "projector": {"model": {"train": "projector"}, "train": {"spike_factor": 2.0}},
    "full": {"model": {"train": "full"}, "optim": {"weight_decay": 0.1, "decay": "original"}},
    "weighted answers": {"data": {"share_prefix": True, "answers": "weighted"}},
    "text alone, eager": {"model": {"attention": "eager"}, "data": {"train": "text.json"}},
    "eager, shared": {"model": {"attention": "eager"}, "data": {"share_prefix": True}, "optim": {"optimizer": "sgd"}},
    "sources, means": {
        "data": {"train": [{"path": "mixed.json"}, {"path": "text.json", "limit": 4}], "group_by_length": False},
        "train": {"loss": "micro_batch_mean"},
    },
    "added tokens": {"model": {"base": "task", "added_tokens": ["<box>", "<loc_*>"]}, "data": {"train": "task.json"}},
    "next": {"model": {"base": "next-vicuna", "tower_batch": 2}, "data": {"cache_features": False}},
    "next, shared": {"model": {"base": "next-vicuna"}, "data": {"share_prefix": True}},
    "onevision": {"model": {"base": "onevision-qwen", "template": "qwen_1_5", "train": "full", "train_vision": True}},
    "onevision, lora": {"model": {"base": "onevision-qwen", "template": "qwen_1_5"}, "data": {"share_prefix": True}},
    "pairs": {
        "data": {"train": "pairs.json", "share_prefix": True},
        "train": {"objective": "dpo"}, "preference": {"bco_weight": 0.2, "sft_weight": 1.0},
    },
    "pairs, a robust loss": {
        "data": {"train": "pairs.json"}, "train": {"objective": "dpo"},
        "preference": {"loss": "robust", "label_smoothing": 0.1}, "log": {"every": 2},
    },
    "a loss of one's own": {"train": {"objective": f"{RECIPES / 'my_loss.py'}:Focal"}},
    "an optimizer of one's own": {"optim": {"optimizer": "own.py:build"}},
    "data in other ways": {
        "data": {
            "eval_fraction": 0.2, "shuffle": False, "group_by_length": False, "exif": "apply", "image_aspect": "crop",
            "image_placement": "start", "labels": "original", "on_too_long": "drop_turns", "workers": 2,
            "reader": "own.py:read",
        },
    },
    "compiled": {
        "model": {"compile": True, "gradient_checkpointing": True, "lora": {"dropout": 0.3}}, "data": {"share_prefix": True},
    },
    "deterministic": {"run": {"deterministic": True}, "data": {"share_prefix": True}},
    "deterministic, onevision": {
        "run": {"deterministic": True},
        "model": {"base": "onevision-qwen", "template": "qwen_1_5", "train": "full", "train_vision": True},
    },
    "saved while it goes on": {"checkpoint": {"background": True, "every": 1}},
}  # fmt: skip
"""Changes of the recipe. Files of records and bases are those of `cases.prepare`, or bases of tests/parity/next."""


@dataclass(frozen=True)
class Wait:
    """A point where the host waited for the device."""

    kind: str
    place: str
    """The line of the package that led to it; "" where none did."""
    stage: str
    """One of the values of `device.STAGES`; "" outside of them."""


@dataclass(frozen=True)
class Seen:
    """A run on the CPU or on the emulated device."""

    losses: list[float]
    waits: list[Wait]
    lines: int
    """Of the log."""
    steps: int

    def at(self, stage: str) -> list[Wait]:
        """The waits of one stage."""
        return [wait for wait in self.waits if wait.stage == stage]


@dataclass(frozen=True)
class Life:
    """What a run with evaluations leaves, from its start to its proof and what is made of it."""

    lines: list[dict[str, Any]]
    predictions: list[dict[str, Any]]
    said: str
    waits: list[Wait]
    answered: int
    """Batches of all its evaluations."""
    verbs: dict[str, tuple[int, str, str]]
    """Exit code and what was printed, of verbs that used the run."""
    served: str
    """What `serve` answered."""
