"""Main memory and time of building the objective on a base with a CLIP-L of 303 M weights, without and with its features.

    python tests/bench/tower.py make BASE
    python tests/bench/tower.py measure BASE CACHE

`measure` prints a line for each of three starts, in MiB: with the tower loaded, with the tower left on disk and, where CACHE
is new, read through for its name, and once more with the name known. Not part of the suite: the base takes 0.6 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.memory import Peak
from llava_accel.console.output import Console
from llava_accel.model.processing import load_processing
from llava_accel.recipe import make_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective


def make(folder: Path) -> None:
    """The tests' tiny LLaVA with the tower of LLaVA-1.5 at a smaller image size, in bf16."""
    from helpers.tiny import make_llava

    make_llava(folder)
    raw = json.loads((folder / "config.json").read_text())
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    raw["vision_config"] |= size
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig.from_dict(raw)).to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]


def measure(base: Path, cache: Path, features: bool) -> dict[str, object]:
    """What one start takes, besides Python and the libraries; in fp32, as on a CPU."""
    with tempfile.TemporaryDirectory() as out:
        recipe = make_recipe(
            {
                "run": {"name": "tower", "output_dir": out, "precision": "fp32"},
                "model": {"base": str(base), "template": "v1"},
                "data": {"train": "unused.json", "cache_dir": str(cache), "cache_features": features},
            }
        )
        accelerator = build_accelerator(recipe)
        processing = load_processing(recipe.model, recipe.data.image_aspect)
        peak = Peak()
        before, since = peak.take(), time.perf_counter()
        build_objective(RunContext(recipe, accelerator, Console(False)), processing)
        seconds, after = time.perf_counter() - since, peak.take()
    return {**{name: after[name] - before[name] for name in after}, "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "measure"])
    parser.add_argument("base", type=Path)
    parser.add_argument("cache", type=Path, nargs="?", default=Path("cache"))
    parser.add_argument("--features", choices=["on", "off"], help="measure one of them, in this process")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.base)
    elif arguments.features:
        print(json.dumps(measure(arguments.base, arguments.cache, arguments.features == "on")))
    else:
        for name, features in (("loaded", "off"), ("left", "on"), ("left again", "on")):
            command = [sys.executable, __file__, "measure", str(arguments.base), str(arguments.cache)]
            done = subprocess.run([*command, "--features", features], capture_output=True, text=True, check=True)
            print(name, done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
