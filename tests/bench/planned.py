"""Planned against measured memory, for each way to train: the base of 80 M weights, batches of 4, on a CPU.

    OMP_NUM_THREADS=1 python tests/bench/planned.py [one | ranks] [--keep FOLDER]

"one" takes a row a recipe on one process, "ranks" a row a launch profile on two. Every row is
`python -m llava_accel.plan RECIPE --probe`, under `accelerate launch` where there are two processes.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.eighty_million import make_base, make_data
from llava_accel.recipe import dump_recipe, make_recipe

LAUNCH = Path(__file__).parents[2] / "launch"
FULL = "model.train=full"
ONE = {
    "LoRA, dropout 0.05": ["model.lora.dropout=0.05"],
    "LoRA, dropout 0": [],
    "LoRA, `gradient_checkpointing = true`": ["model.gradient_checkpointing=true"],
    "LoRA, `gradient_checkpointing = 2`": ["model.gradient_checkpointing=2"],
    "LoRA, 2 micro-batches a step": ["train.accumulation_steps=2"],
    "LoRA, `adamw_8bit`": ["optim.optimizer=adamw_8bit"],
    "QLoRA nf4": ["model.quantization.bits=4"],
    "projector": ["model.train=projector"],
    "full": [FULL],
    "full, 2 micro-batches a step": [FULL, "train.accumulation_steps=2"],
    "full, `gradient_checkpointing = true`": [FULL, "model.gradient_checkpointing=true"],
    "full, `adamw_8bit`": [FULL, "optim.optimizer=adamw_8bit"],
    "full, tower trained": [FULL, "model.train_vision=true"],
}
RANKS = {
    f"{profile}, {name}": (profile, overrides)
    for profile in ("ddp", "zero2", "zero3", "fsdp2")
    for name, overrides in {
        "LoRA": [],
        "full": [FULL],
        "full, 2 micro-batches": [FULL, "train.accumulation_steps=2"],
    }.items()
}
_FOUND = re.compile(r"measured ([\d.,]+) MiB at most, planned ([\d.,]+) \((.*)\)")


def row(recipe: Path, profile: str, overrides: list[str]) -> list[str]:
    """Planned and measured MiB, and how far apart they are."""
    launcher = [sys.executable]
    if profile:
        launcher += ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
        launcher += ["--config_file", str(LAUNCH / f"{profile}.yaml"), "--main_process_port", "0"]
    command = [*launcher, "-m", "llava_accel.plan", str(recipe), "--probe", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = _FOUND.search(done.stdout)
    if found is None:
        raise SystemExit(done.stdout + done.stderr)
    measured, planned, away = found.groups()
    return [f"{float(number.replace(',', '')):,.0f}" for number in (planned, measured)] + [away]


def main() -> None:
    """Print a row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=["one", "ranks"], help="one kind alone")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--keep", type=Path, help="folder for base and data, which are made once")
    options = parser.parse_args()
    rows = {name: ("", overrides) for name, overrides in ONE.items()} if options.kind != "ranks" else {}
    rows |= RANKS if options.kind != "one" else {}
    with tempfile.TemporaryDirectory() as place:
        folder = options.keep or Path(place)
        if not (folder / "recipe.toml").exists():
            recipe = make_recipe(
                {
                    "run": {"name": "planned", "output_dir": str(folder / "run"), "precision": "fp32"},
                    "model": {
                        "base": str(make_base(folder / "base")),
                        "lora": {"rank": 8, "alpha": 16, "dropout": 0.0},
                    },
                    "data": {
                        "train": str(make_data(folder / "data", "one", 8)),
                        "workers": 0,
                        "cache_dir": str(folder / "cache"),
                    },
                    "train": {"per_device_batch_size": 4},
                }
            )
            (folder / "recipe.toml").write_text(dump_recipe(recipe))
        print("| | planned MiB | measured MiB | |\n|---|---|---|---|")
        for name, (profile, overrides) in rows.items():
            if options.only in name:
                print(f"| {' | '.join([name, *row(folder / 'recipe.toml', profile, overrides)])} |", flush=True)


if __name__ == "__main__":
    main()
