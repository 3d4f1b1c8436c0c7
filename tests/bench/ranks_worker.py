"""The same steps on one process and on several, under each launch profile: time of a step, and bytes sent in it.

The global batch and the threads of all processes together are the same throughout.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.traffic import Traffic
from llava_accel.console.output import Console
from llava_accel.measurement.probe import Job, first_windows
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe, dump_recipe, load_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import open_data

_LONGEST_S = 240.0


def compare_ranks(recipe: Recipe, profiles: Sequence[Path], processes: int, steps: int, rounds: int) -> dict[str, dict]:
    """Time the first steps of a recipe under each profile, and print them beside those of one process.

    Returns:
        By profile, and by "one process": "step_s", "bytes" (sent by a rank in a step), "sent" (the same by kind).

    Raises:
        ValueError: the batch cannot be divided, or a launch failed; with the end of its output.
    """
    size = recipe.train.per_device_batch_size
    if size % processes:
        raise ValueError(
            f"--processes {processes}: train.per_device_batch_size = {size} cannot be divided among them. "
            f"Set train.per_device_batch_size to a multiple of {processes}"
        )
    threads = max(1, (os.cpu_count() or 1) // processes)
    found = {"one process": _launch(recipe, [sys.executable], 1, threads * processes, steps, rounds)}
    for profile in profiles:
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(profile)]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
        found[profile.stem] = _launch(recipe, launcher, processes, threads, steps, rounds)
    alone = found["one process"]["step_s"]
    Console().table(
        f"{processes} processes of {threads} threads, and one of {processes * threads}",
        ["", "step", "over one process", "sent by a rank in a step"],
        [
            [name, f"{each['step_s']:.3f} s", f"{each['step_s'] / alone:.2f} x", f"{each['bytes'] / 2**20:,.2f} MiB"]
            for name, each in found.items()
        ],
    )
    return found


def _launch(recipe: Recipe, launcher: list[str], processes: int, threads: int, steps: int, rounds: int) -> dict:
    size = recipe.train.per_device_batch_size // processes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = recipe.model_copy(
            update={
                "run": recipe.run.model_copy(update={"output_dir": str(folder)}),
                "train": recipe.train.model_copy(update={"per_device_batch_size": size}),
                "log": recipe.log.model_copy(update={"trackers": ()}),
            }
        )
        (folder / "recipe.toml").write_text(dump_recipe(own))
        numbers = [str(steps), str(rounds)]
        command = [*launcher, str(Path(__file__)), str(folder), *numbers]
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        output = _output(command, environment)
        if not (folder / "measured.json").exists():
            raise ValueError(f"{' '.join(command[:8])} failed:\n{output[-3000:]}")
        return json.loads((folder / "measured.json").read_text())


def _output(command: list[str], environment: dict[str, str]) -> str:
    """What a launch prints. It is ended after a while: gloo has hung in its own end, when all was measured."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            return process.communicate(timeout=_LONGEST_S)[0]
        except subprocess.TimeoutExpired:
            process.terminate()  # a launcher ends its ranks then
            return process.communicate()[0]


def measure(folder: Path, steps: int, rounds: int) -> None:
    """What every process of a launch does: the steps of `folder / "recipe.toml"`, into `folder / "measured.json"`."""
    recipe = load_recipe(folder / "recipe.toml")
    accelerator, console = build_accelerator(recipe), Console(False)
    data = recipe.data.model_copy(update={"cache_dir": str(folder / f"cache-{accelerator.process_index}")})
    recipe = recipe.model_copy(update={"data": data})
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    run = RunContext(recipe, accelerator, console)
    training, _ = open_data(run, processing)
    objective, _ = build_objective(run, processing)
    windows = first_windows(run, training, steps)
    job = Job(run, processing, objective, training, windows)
    job.forget_features(0)
    job.loop()  # fills the cache of features
    seconds = [job.loop().seconds for _ in range(rounds)]
    with Traffic() as traffic:
        job.loop()
    if accelerator.is_main_process:
        sent = {kind: count / len(windows) for kind, count in traffic.sent.items()}
        found = {"step_s": median(seconds) / len(windows), "bytes": sum(sent.values()), "sent": sent}
        (folder / "measured.json").write_text(json.dumps(found))
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    measure(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
