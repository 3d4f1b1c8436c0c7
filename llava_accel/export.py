"""Export a run, a checkpoint or an adapter for peft, transformers or LLaVA's own code, or convert a base.

`--to peft`: one adapter with the projector inside. `--to merged`: one model folder of transformers. `--to llava`: the
folder that LLaVA's own code writes. The first and the last are made of the trained files alone, without loading a base.
`--compare` loads the result and what was trained, and compares what they compute before the export is called done.
"""

from llava_accel.console.command_line import start

if __name__ == "__main__":
    start("export")  # before the imports below, so that help and mistakes are answered at once


import argparse
from dataclasses import replace
from pathlib import Path

from llava_accel.console.output import Console
from llava_accel.exceptions import UserError
from llava_accel.inference.origin import Trained, find_trained
from llava_accel.model.precision import PRECISIONS
from llava_accel.model.processing import load_processing
from llava_accel.model.save import with_step
from llava_accel.release.forms import Job, export
from llava_accel.release.publish import check_login, check_name, push, show_files
from llava_accel.runtime.devices import find_device

_DTYPES = {"auto": None, **PRECISIONS}


def main(arguments: argparse.Namespace) -> None:
    """`llava-accel export RUN_OR_CHECKPOINT`: export it, and push it if the command line says so.

    Raises:
        UserError: the source cannot be read or put into this form, the place is taken, or the hub refused.
    """
    console = Console()
    if arguments.push:
        check_name(arguments.push)
        if not arguments.dry_run:
            check_login()
    trained = find_trained(arguments.source, base=arguments.base, template=arguments.template)
    if trained.kind == "model" and trained.own is None and not arguments.template:
        trained = _with_own_template(trained)
    if _DTYPES[arguments.dtype] and (arguments.to == "peft" or (arguments.to == "llava" and trained.kind != "model")):
        raise UserError(f"--dtype {arguments.dtype}: an adapter stays as it was trained. Leave --dtype out")
    console.line(f"source: {with_step(trained.folder)} ({'whole model' if trained.kind == 'model' else trained.kind})")
    device = find_device()
    # A merge loads the model anyway. The others need not, and on a CPU a comparison takes far longer than they do.
    compares = arguments.compare if arguments.compare is not None else device.type != "cpu" or arguments.to == "merged"
    job = Job(trained, device, console, _DTYPES[arguments.dtype], compares)
    export(job, arguments.to, Path(arguments.out))
    if arguments.push and arguments.dry_run:
        show_files(Path(arguments.out), arguments.push, console)
    elif arguments.push:
        push(Path(arguments.out), arguments.push, console)


def _with_own_template(trained: Trained) -> Trained:
    """A base that is only converted keeps its own chat template, if it has one."""
    model = trained.recipe.model.model_copy(update={"template": "auto"})
    if load_processing(model, trained.recipe.data.image_aspect).processor.chat_template is None:
        return trained
    return replace(trained, recipe=trained.recipe.model_copy(update={"model": model}))
