"""The quickstart's training with every switch of "no wasted work" on, and with all of them off, in turn.

    python -m llava_accel.prepare easy-vqa --out data/easy_vqa
    OMP_NUM_THREADS=2 python tests/bench/switches.py FOLDER [--rounds 2] [KEY=VALUE ...]

A round takes a run of each; on the first one with the switches on, the tower's features are computed and kept.
Evaluation, which both do alike, and saving are left out of the seconds.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
SWITCHES = ("share_prefix", "cache_features", "group_by_length")
ELSEWHERE = ("evaluation_s", "saving_s")


def train(folder: Path, on: bool, keys: list[str]) -> tuple[float, float]:
    """Seconds of training, and the accuracy at its end."""
    run = folder / ("on" if on else "off")
    shutil.rmtree(run, ignore_errors=True)
    switches = [f"data.{name}={str(on).lower()}" for name in SWITCHES]
    places = [f"run.output_dir={run}", f"data.cache_dir={folder / 'cache'}", "eval.at_start=false", "eval.every=100000"]
    command = [sys.executable, "-m", "llava_accel.train", "recipes/quickstart.toml", *places, *switches, *keys]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "eval" not in line]
    seconds = sum(line["seconds"] - sum(line[name] for name in ELSEWHERE) for line in steps)
    return seconds, [line["eval"]["vqa_accuracy"] for line in lines if "eval" in line][-1]


def main() -> None:
    """Print each run, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="changes to the recipe of both")
    arguments = parser.parse_intermixed_args()
    ratios = []
    for number in range(arguments.rounds):
        taken = {}
        for on in (True, False):
            taken[on], accuracy = train(arguments.folder, on, arguments.keys)
            print(
                f"round {number + 1}, {'on' if on else 'off'}: {taken[on]:.1f} s, accuracy {accuracy:.1%}", flush=True
            )
        ratios.append(taken[False] / taken[True])
    print(f"{median(ratios):.2f} x faster with the switches on (median; {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
