"""Main memory of loading, sharding and saving a base of 500 M weights: peaks of each rank, ours and a naive full gather.

    python tests/bench/memory.py make BASE
    accelerate launch --config_file launch/zero3.yaml --num_processes 2 tests/bench/memory.py measure BASE
    python tests/bench/memory.py load BASE [--to cpu]

Not part of the suite: the base takes 2 GB of disk, and a measurement about a minute. "own" is memory of the process alone
(RssAnon), "mapped" are pages of the checkpoint's file, which ranks share and the kernel takes back when it needs them.
`load` reads the base in bf16, which is not the type of its file, into main memory and then to a card. PyTorch's meta device
stands in for the card: each weight is read and converted in main memory, and leaves it. It cannot show the card's own.
"""

import argparse
import gc
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1]))

from llava_accel import compat
from llava_accel.console.output import Console
from llava_accel.loop.optimizer import build_optimizer, build_scheduler
from llava_accel.model.build import load_model
from llava_accel.model.processing import load_processing
from llava_accel.model.save import is_saved
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator, gathered_weights, is_sharded, prepare
from llava_accel.setup.assembly import build_objective

MIB = 2**20


class Peak:
    """Own and mapped memory, sampled a hundred times a second; `take` gives both peaks since the last call, in MiB."""

    def __init__(self) -> None:
        self._own = self._mapped = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def take(self) -> dict[str, int]:
        time.sleep(0.05)
        peaks = {"own": self._own // 1024, "mapped": self._mapped // 1024}
        self._own = self._mapped = 0
        return peaks

    def _sample(self) -> None:
        while True:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self._own = max(self._own, int(lines["RssAnon"].split()[0]))
            self._mapped = max(self._mapped, int(lines["RssFile"].split()[0]))
            time.sleep(0.01)


def make(folder: Path) -> None:
    """A base of 480 M weights in fp32: the tests' tiny LLaVA with 24 layers of 1,280."""
    from helpers.tiny import make_llava

    make_llava(folder)
    raw = json.loads((folder / "config.json").read_text())
    size = {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 24, "num_attention_heads": 20}
    raw["text_config"] |= size | {"num_key_value_heads": 20, "head_dim": 64}
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig.from_dict(raw)).save_pretrained(folder)


def recipe(base: Path, out: str) -> Recipe:
    return make_recipe(
        {
            "run": {"name": "memory", "output_dir": out, "precision": "fp32"},
            "model": {"base": str(base), "template": "v1", "lora": {"rank": 8, "alpha": 16}},
            "data": {"train": "unused.json", "cache_features": False},
            "train": {"per_device_batch_size": 1},
        }
    )


def measure(base: Path, naive: bool) -> None:
    """Print a JSON line for each rank: peaks while loading, while preparing, and while what is saved is gathered."""
    peak = Peak()
    with tempfile.TemporaryDirectory() as out:
        settings = recipe(base, out)
        accelerator = build_accelerator(settings)
        processing = load_processing(settings.model, settings.data.image_aspect)
        found: dict[str, object] = {"rank": accelerator.process_index, "start": peak.take()}
        objective, _ = build_objective(RunContext(settings, accelerator, Console(False)), processing)
        found["load"] = peak.take()
        optimizer = build_optimizer(objective, settings.optim)
        scheduler = build_scheduler(optimizer, settings.optim, 10)
        model: Any = prepare(accelerator, objective, optimizer, scheduler).model
        found["prepare"] = peak.take()
        accelerator.wait_for_everyone()
        found["rest"] = peak.take()
        started = time.perf_counter()
        if naive:
            # Other ranks of ZeRO-3 get none.
            state: dict[str, Tensor] = accelerator.get_state_dict(model) or {}  # pyright: ignore[reportAssignmentType]
        else:
            state = gathered_weights(accelerator, model, is_saved(objective, settings))
        # What engines that keep a whole model return is the model's own memory here, and a copy where that is a GPU's.
        copies = [] if is_sharded(accelerator) else [tensor.clone() for tensor in state.values()]
        found["seconds"] = round(time.perf_counter() - started, 3)
        found["naive gather" if naive else "gather"] = peak.take()
        found["gathered_mib"] = sum(tensor.nbytes for tensor in state.values()) // MIB
        del copies
        print(json.dumps(found), flush=True)
        accelerator.wait_for_everyone()
        accelerator.end_training()


class Converted:
    """A weight on disk that is in bf16 once it is read: moving to the meta device alone would read nothing."""

    def __init__(self, stored: Any) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, key: object) -> Tensor:
        return self._stored[key].to(torch.bfloat16)


def load(base: Path, device: str) -> None:
    """Print a JSON line: the peak of loading, on top of what was there before."""
    from_state = compat.load_model

    def converting(kind: Any, config: Any, state: Any, *arguments: Any, **keys: Any) -> Any:
        return from_state(kind, config, {n: Converted(each) for n, each in state.items()}, *arguments, **keys)

    settings = recipe(base, "unused")
    processing = load_processing(settings.model, settings.data.image_aspect)
    load_model(settings, processing, dtype=torch.float32, device=None)  # imports; its weights stay mapped
    gc.collect()
    compat.load_model = converting
    peak = Peak()
    before = peak.take()
    model = load_model(settings, processing, dtype=torch.bfloat16, device=torch.device(device)).model
    found = peak.take()
    weights = sum(parameter.nbytes for parameter in model.parameters()) // MIB
    print(json.dumps({"to": device, "weights": weights, "own": found["own"] - before["own"]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "measure", "load"])
    parser.add_argument("base", type=Path)
    parser.add_argument("--naive", action="store_true", help="gather everything, not only what is saved")
    parser.add_argument(
        "--to", default="meta", choices=["meta", "cpu"], help="of load: the card's stand-in, or main memory"
    )
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.base)
    elif arguments.action == "load":
        load(arguments.base, arguments.to)
    else:
        measure(arguments.base, arguments.naive)


if __name__ == "__main__":
    main()
