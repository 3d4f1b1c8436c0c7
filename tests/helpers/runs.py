"""Short runs for tests: recipes on the parity base, what a run leaves behind, and how far two runs are apart."""

import copy
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.forked import run
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.runtime.timing import PHASES

PARITY = Path(__file__).parents[1] / "parity"
MEASURED = ("seconds", "tokens_per_s", "answers_per_s", "peak_memory_gib", *(f"{phase}_s" for phase in PHASES))

Tables = dict[str, dict[str, Any]]


def tables(folder: Path, records: Path | None = None, /, **changes: Mapping[str, Any]) -> Tables:
    """A LoRA recipe on the parity base, in seconds on a CPU: no evaluation, one checkpoint at the end.

    Args:
        folder: Parent of the run folder `run` and of the cache.
        records: The training file; by default the eight records of the LoRA trajectory.
        changes: Keys of each table that differ.
    """
    result: Tables = {
        "run": {"name": "run", "output_dir": str(folder / "run")},
        "model": {
            "base": str(PARITY / "llava-orig"),
            "vision_tower": str(PARITY / "clip"),
            "adapter": str(PARITY / "adapter_init"),
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        },
        "data": {
            "train": str(records or PARITY / "traj_lora.json"),
            "images": str(PARITY / "images"),
            "cache_dir": str(folder / "cache"),
            "workers": 0,
        },
        "optim": {"learning_rate": 2e-2, "projector_learning_rate": 2e-3, "warmup_fraction": 0.1},
        "train": {"per_device_batch_size": 8},
        "eval": {"at_start": False, "every": 1000, "max_new_tokens": 4, "train_limit": 0},
        "checkpoint": {"every": 1000, "verify": False},
    }
    for table, keys in changes.items():
        target = result.setdefault(table, {})
        for key, value in keys.items():
            target[key] = {**target[key], **value} if isinstance(target.get(key), dict) else copy.copy(value)
    return result


def recipe(folder: Path, records: Path | None = None, /, **changes: Mapping[str, Any]) -> Recipe:
    """`tables` as a recipe."""
    return make_recipe(tables(folder, records, **changes))


def write_records(path: Path, records: Sequence[Mapping[str, object]]) -> Path:
    """A training file."""
    path.write_text(json.dumps(list(records)))
    return path


def talk(number: int | str, question: str, answer: str, *images: str) -> dict[str, object]:
    """One record of one round; each image stands before the question."""
    named: dict[str, object] = {"image": list(images)} if images else {}
    value = "<image>\n" * len(images) + question
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", **named, "conversations": turns}


def mixed_records(count: int) -> list[dict[str, object]]:
    """Records with unequal numbers of targets: most with an image, some with two, every fourth without any."""
    words = "red green blue a small circle on the left of two squares and nothing else".split()
    records = []
    for number in range(count):
        images = [f"t{number % 8}.png"] * (number % 4 != 3) + [f"t{(number + 3) % 8}.png"] * (number % 5 == 4)
        answer = " ".join(words[(number + step) % len(words)] for step in range(1 + 3 * number % 11))
        records.append(talk(number, "What do you see?" if number % 2 else "Tell me.", answer, *images))
    return records


def pairs(count: int) -> list[dict[str, object]]:
    """Pairs of unequal lengths: several on an image, every fifth without one."""
    words = "red green blue a small circle on the left of two squares and nothing else".split()
    records: list[dict[str, object]] = []
    for number in range(count):
        image: dict[str, object] = {"image": f"t{number % 3}.png"} if number % 5 else {}
        chosen = " ".join(words[(number + step) % len(words)] for step in range(1 + 3 * number % 7))
        rejected = " ".join(words[(2 * number + step + 5) % len(words)] for step in range(1 + 2 * number % 5))
        records.append({"id": f"p{number}", **image, "question": f"Which {number % 4}?", "chosen": chosen,
                        "rejected": rejected})  # fmt: skip
    return records


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metric lines less what a clock and the machine's memory decide."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def predictions(file: Path) -> tuple[list[dict[str, Any]], list[float]]:
    """The lines of a file of predictions, and apart from them their losses, which are rounded differently by batches."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return rows, [row.pop("loss") for row in rows]


def losses(run: Path) -> list[float]:
    """Training loss of every logged step."""
    return [line["loss"] for line in metrics(run) if "loss" in line]


def trained(folder: Path) -> dict[str, Tensor]:
    """Every trained tensor of an export or a checkpoint."""
    files = [folder / name for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors")]
    found = {name: tensor for file in files if file.is_file() for name, tensor in load_file(file).items()}
    assert found, f"{folder} holds no weights"
    return found


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest relative distance |a - b| / |b| of two tensors of the same name.

    Biases of attention keys are left out: a softmax does not depend on them, so their gradient is rounding noise, which
    Adam scales up to the size of a step.
    """
    assert one.keys() == other.keys()
    names = [name for name in other if not name.endswith("k_proj.bias")]
    return max(float(torch.dist(one[name], other[name]) / other[name].norm()) for name in names)


def command(file: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """`python -m llava_accel.train` in a process of its own."""
    return run([sys.executable, "-m", "llava_accel.train", str(file), *overrides], cwd=PARITY.parents[1])


def on_tiny(base: Path, folder: Path, records: Path, **changes: dict[str, object]) -> Tables:
    """A LoRA recipe on a base in the hub's layout."""
    model: dict[str, object] = {"base": str(base), "vision_tower": "", "adapter": "", **changes.pop("model", {})}
    return tables(folder, records, model=model, **changes)
