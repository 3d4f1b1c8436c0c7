"""Our loop, data included. At the word "cold" a step finds an empty cache of features, at "warm" a full one."""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bench.peer_steps.gate import save_gradients
from bench.peer_steps.turnstile import NUM_LOSSES, PAIRS, Turnstile, rows, settings
from llava_accel.console.output import Console
from llava_accel.measurement.probe import Job, first_windows, with_own_folders
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe, make_recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import open_data
from llava_accel.setup.reference import attach_reference

FIGURES = ("grad_norm", "reward_margin", "chosen_reward", "chosen_log_prob", "rejected_log_prob")


def make_own_recipe(given: dict[str, str]) -> Recipe:
    """The settings of all peers, in our words."""
    folder = Path(given["out"])
    folder.mkdir()
    records = []
    for number, row in enumerate(rows()):
        turns = [{"from": "human", "value": f"<image>\n{row['question']}"}, {"from": "gpt", "value": row["answer"]}]
        record = {"id": str(number), "image": Path(row["image"]).name, "conversations": turns}
        records.append(record | ({"rejected": row["rejected"]} if given["pairs"] else {}))
    (folder / "data.json").write_text(json.dumps(records))
    rate = float(given["learning_rate"])
    lora = {"rank": int(given["rank"]), "alpha": int(given["alpha"]), "dropout": float(given["dropout"])}
    return make_recipe(
        {
            "run": {"name": "peers", "output_dir": str(folder / "run"), "precision": "fp32"},
            "model": {"base": given["base"], "lora": lora},
            "data": {
                "train": str(folder / "data.json"),
                "images": str(Path(given["rows"]).parent),
                "image_aspect": "crop",
                "workers": 0,
                "share_prefix": given["share_prefix"] == "true",
            },
            "optim": {
                "learning_rate": rate,
                "projector_learning_rate": rate,
                "schedule": "constant",
                "warmup_fraction": 0.0,
            },
            "train": {
                "per_device_batch_size": int(given["batch"]),
                "objective": "dpo" if given["pairs"] else "answers",
            },
            **({"preference": PAIRS[given["pairs"]]} if given["pairs"] else {}),
        }
    )


def keep_gradients(objective: nn.Module, path: Path) -> None:
    """Gradients of the last step that is compared, clipped, go to a file."""
    left = iter(range(NUM_LOSSES))

    def keep(*_: object) -> None:
        if next(left) == NUM_LOSSES - 1:
            save_gradients(objective, path)
            hook.remove()

    hook = register_optimizer_step_pre_hook(keep)


def main() -> None:
    given, turnstile = settings(), Turnstile()
    recipe = make_own_recipe(given)
    accelerator, console = build_accelerator(recipe), Console(False)
    processing = load_processing(recipe.model, recipe.data.image_aspect)
    with tempfile.TemporaryDirectory(dir=given["out"]) as folder:
        own = with_own_folders(recipe, Path(folder))
        run = RunContext(own, accelerator, console)
        training, _ = open_data(run, processing)
        objective, loaded = build_objective(run, processing)
        attach_reference(run, objective, loaded, processing, (training,))
        if given["pairs"]:
            keep_gradients(objective, Path(f"{given['out']}.grads"))
        job = Job(run, processing, objective, training, first_windows(run, training, 1))
        turnstile.ready(
            trained=sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad),
            dtypes=sorted({str(parameter.dtype) for parameter in objective.parameters()}),
            versions={name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        )
        number = 0
        while word := turnstile.next():
            if word == "cold":
                job.forget_features(number)
                number += 1
            turnstile.start()
            job.loop()
            lines = (Path(own.run.output_dir) / "metrics.jsonl").read_text().splitlines()
            line = json.loads(lines[-1])
            turnstile.passed(line["loss"], **{name: line[name] for name in FIGURES if name in line})


if __name__ == "__main__":
    main()
