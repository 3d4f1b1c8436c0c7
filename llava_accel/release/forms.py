"""Exports in three forms, each from beginning to end: write next to its place, compare with the source, rename."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import release_memory
from peft import PeftModel
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from llava_accel.checkpoint.model_card import Form, write_model_card
from llava_accel.console.output import Console
from llava_accel.data.labels import Example
from llava_accel.data.tiling import ImageView
from llava_accel.exceptions import UserError
from llava_accel.families.registry import Llava
from llava_accel.inference.dialogue import stop_ids
from llava_accel.inference.origin import Loaded, Trained, load_trained, with_bits
from llava_accel.model import layouts
from llava_accel.model.bases import Base, find_base
from llava_accel.model.build import load_model
from llava_accel.model.files import read_weights
from llava_accel.model.lora import Trainable
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing, load_processing
from llava_accel.model.save import FACTS
from llava_accel.recipe import ModelTable, Recipe
from llava_accel.release import original_llava, verification
from llava_accel.release.from_files import FromFiles, read_trained
from llava_accel.release.merged_model import save_merged, save_peft
from llava_accel.release.second_copy import NO_PLACE, find_place
from llava_accel.release.verification import Reference, check_agreement, compare, plain_outputs
from llava_accel.setup.datasets import build_image_reader, open_corpora
from llava_accel.storage.atomic import beside, commit

_MOST_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Job:
    """The source of an export, and its settings.

    `dtype` is the float type of a whole model on disk; None is the one that the base has on disk. `compares`: the export
    is loaded and compared with what was trained, which takes as much memory and time as using both.
    """

    trained: Trained
    device: torch.device
    console: Console
    dtype: torch.dtype | None = None
    compares: bool = True

    @property
    def stored(self) -> torch.dtype:
        """Float type of the base's weights on disk."""
        folder = find_base(self.trained.recipe.model).folder
        return next(tensor.tensor[0:1].dtype for tensor in read_weights(folder) if tensor.shape)

    @property
    def recipe(self) -> Recipe:
        """The recipe that loads the trained weights on a base of 16 bits."""
        return with_bits(self.trained.recipe, 16)

    def load(self, *, as_trained: bool = False) -> Loaded:
        """The trained model on its 16-bit base, or quantised `as_trained`. A CPU computes in fp32."""
        trained = self.trained if as_trained else replace(self.trained, recipe=self.recipe)
        dtype = torch.float32 if self.device.type == "cpu" else self.stored
        return load_trained(trained, dtype=dtype, device=self.device)

    def examples(self, processing: Processing) -> tuple[list[Example], dict[ImageView, Tensor]]:
        """Examples to compare on, with their images' pixels: one that needs no data, and some of the recipe's data if they
        are still there, held-out ones if there are any."""
        example, pixels = verification.probe_example(processing)
        if self.trained.own is None:
            return [example], pixels
        try:
            train, held_out = open_corpora(self.recipe, processing)
            corpus = train if held_out is None else held_out
            own = [corpus.encode(row).example for row in range(min(_MOST_EXAMPLES, len(corpus)))]
            read = build_image_reader(self.recipe.data, processing)
            pixels |= {view: read(view) for each in own for view in each.images}
        except (UserError, OSError) as error:
            reason = f"as the recipe's data cannot be read: {error}"
            self.console.line(f"note: verified on a built-in example alone, {reason}")
            return [example], pixels
        return [example, *own], pixels

    def reference(
        self, objective: Objective, processing: Processing, examples: list[Example], pixels: dict[ImageView, Tensor]
    ) -> Reference:
        """The outputs of a model for these examples."""
        side = int(processing.base.vision.image_size)  # pyright: ignore[reportArgumentType]
        return verification.take_reference(objective, examples, pixels, (3, side, side), self.device)


def export(job: Job, form: Form, out: Path) -> None:
    """Make an export: complete and checked in its place, or not there at all.

    Args:
        out: A folder that does not exist yet, or an empty one.

    Raises:
        UserError: the place is taken, or the source cannot be put into this form, or the result differs from it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: this folder is not empty. Name a new folder, or remove it")
    if not job.console.is_terminal:
        disable_progress_bar()
    try:
        unfinished = beside(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}). Choose another folder") from None
    try:
        trained, facts = job.trained, {**_FORMS[form](job, unfinished), **job.trained.facts}
        (unfinished / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        if trained.own:
            shutil.copyfile(trained.folder / "recipe.toml", unfinished / "recipe.toml")
        write_model_card(unfinished, form, trained.own, facts, title=out.name)
        commit(unfinished, out, manifest=False)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    job.console.line(f"exported: {out}")


def write_peft(job: Job, folder: Path) -> dict[str, Any]:
    """One adapter with the projector inside, made of the adapter's files."""
    if job.trained.kind != "lora":
        held = "a whole model" if job.trained.kind == "model" else "a projector"
        raise UserError(f"{job.trained.folder} holds {held} and not an adapter. Use --to merged or --to llava")
    base, table = find_base(job.recipe.model), job.recipe.model
    if base.layout == "parts" or (table.vision_tower and not _is_own_tower(table, base)):
        raise UserError(
            f"{job.trained.folder} was trained on {table.named_base} with the vision tower "
            f"{table.vision_tower}, so its base is not one folder. Use --to merged"
        )
    trained = read_trained(job.trained, job.recipe)
    assert isinstance(trained.model, PeftModel)
    if _adapts_another_projector(trained):
        raise UserError(
            f"{job.trained.folder} adapts a projector that is not the one of {table.base}, and peft would adapt that one. "
            "Use --to merged"
        )
    save_peft(folder, trained.model, trained.state, trained.processing)
    if base.layout != "hub":
        job.console.line(
            f"note: transformers cannot load {table.base}, which is in the layout of LLaVA's own code. Convert it once "
            f"and use the result as the base: llava-accel export {table.base} --to merged "
            f"--out {Path(table.base).name}-hf"
        )
    if job.compares:
        _compare_peft(job, folder, base)
    return _facts(job, trained.fingerprint, trained.processing, trained.notes)


def _compare_peft(job: Job, folder: Path, base: Base) -> None:
    """Compare an adapter, through `PeftModel.from_pretrained` over a fresh base, with the trained model."""
    loaded = job.load()
    processing, dtype, vocab_size = loaded.processing, loaded.objective.llava.dtype, loaded.objective.vocab_size
    examples = job.examples(processing)
    reference = job.reference(loaded.objective, processing, *examples)
    del loaded
    release_memory()
    name = "adapter on a fresh base, against the trained model"
    if base.layout == "hub":
        _compare(job, reference, folder, name, dtype, dtype, base=str(base.folder))
        return
    plain = load_model(job.recipe, processing, dtype=dtype, device=None).model
    with warnings.catch_warnings():
        # peft asks for an attribute that transformers 5 is about to rename.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        again = PeftModel.from_pretrained(plain, str(folder)).merge_and_unload()
    assert isinstance(again, Llava)
    restored = job.reference(Objective(again, vocab_size).to(job.device), processing, *examples)
    outputs = {"logits": restored.logits, "answers": restored.answers, "counts": {}}
    check_agreement(reference, outputs, name, dtype, job.console)


def _compare(
    job: Job,
    reference: Reference,
    folder: Path,
    name: str,
    computed: torch.dtype,
    stored: torch.dtype,
    *,
    base: str = "",
) -> tuple[Tensor, float] | None:
    """Compare an export, loaded by transformers and peft alone, with the trained model; the export's logits, and how far
    they are from the trained model's. None where memory has no room for it.

    Args:
        computed: What the trained model computed in.
        stored: The float type of the export.
    """
    place = find_place(folder, base, job.recipe.model.quantization, computed, job.device)
    outputs = None
    if place is not None:
        job.console.line(f"comparing in a process with transformers and peft alone, {place}")
        outputs = plain_outputs(reference, folder, place, base=base)
    if outputs is None:
        job.console.line(f"not compared, as {NO_PLACE}")
        return None
    return outputs["logits"], check_agreement(reference, outputs, name, stored, job.console).difference


def write_merged(job: Job, folder: Path) -> dict[str, Any]:
    """One model folder of transformers, loaded again by transformers alone and compared."""
    bits, quantised, without = job.trained.recipe.model.quantization.bits, None, None
    examples = job.examples(load_processing(job.recipe.model, job.recipe.data.image_aspect))
    if bits < 16 and job.compares:
        loaded = job.load(as_trained=True)
        quantised = job.reference(loaded.objective, loaded.processing, *examples).logits
        del loaded
        release_memory()
    loaded = job.load()
    model, processing = loaded.objective.model, loaded.processing
    facts = _facts(job, loaded.base.fingerprint, processing, loaded.notes)
    assert isinstance(model, Trainable)
    computed, stored = loaded.objective.llava.dtype, job.dtype or job.stored
    reference = job.reference(loaded.objective, processing, *examples) if job.compares else None
    if reference and isinstance(model, PeftModel) and job.recipe.model.lora.bias == "none":
        with model.disable_adapter():  # trained biases could not be disabled
            without = job.reference(loaded.objective, processing, *examples).logits
    save_merged(folder, model, processing, stored, stop_ids(job.recipe, processing))
    del loaded, model
    release_memory()
    is_merged = job.trained.kind == "lora"
    name = "merged model, against 16-bit base + adapter" if is_merged else "exported model, against its source"
    compared = _compare(job, reference, folder, name, computed, stored) if reference else None
    if reference is None or compared is None:
        return facts
    logits, difference = compared
    update = 0.0 if without is None else compare(reference.logits, without).difference
    if stored != torch.float32 and 0 < update < 2 * difference:
        raise UserError(
            f"the merged model is as far from the trained one as the base is: {str(stored).removeprefix('torch.')} is too "
            "coarse for so small an update. Use --dtype fp32, or --to peft"
        )
    if quantised is not None:
        table = job.trained.recipe.model.quantization
        kind, agreement = f" ({table.type})" if bits == 4 else "", compare(quantised, logits)
        job.console.line(
            f"note: the adapter was trained on the base in {bits} bits{kind} and is merged into its 16-bit weights, which "
            "lack the rounding to few bits that the adapter had learned to correct"
        )
        job.console.line(f"merged model, against {bits}-bit base + adapter as trained: {agreement}")
    return facts


def write_llava(job: Job, folder: Path) -> dict[str, Any]:
    """The folder that LLaVA's own code writes, read back and compared weight by weight."""
    trained, is_whole = read_trained(job.trained, job.recipe), job.trained.kind == "model"
    processing = trained.processing
    source = original_llava.Source(processing.base, _origin(job), job.recipe, is_whole)
    tower = original_llava.place_tower(folder, trained.tower, source)
    config = original_llava.original_config(source, tower)
    if isinstance(trained.model, PeftModel):
        written = original_llava.save_original_adapter(folder, trained.model, trained.state, config)
    elif is_whole:
        dtype = job.dtype or job.stored
        written = original_llava.save_original_model(folder, trained.state, processing, config, source, dtype)
    else:
        written = original_llava.save_original_projector(folder, trained.state, config)
    reread = original_llava.read_original(folder)
    if written.keys() != reread.keys() or any(not torch.equal(reread[name], t.cpu()) for name, t in written.items()):
        raise UserError(f"{folder}: weights read back differ from those written. Check the disk, and try again")
    count = len(reread)
    job.console.line(f"LLaVA's layout: {count} weights written, read back and equal; mm_vision_tower is {tower!r}")
    return _facts(job, trained.fingerprint, processing, trained.notes)


_FORMS: dict[Form, Callable[[Job, Path], dict[str, Any]]] = {
    "peft": write_peft, "merged": write_merged, "llava": write_llava
}  # fmt: skip
"""Each writes the weights into a folder that exists, checks them, and returns what it knows of the model."""


def _adapts_another_projector(trained: FromFiles) -> bool:
    """Whether there are LoRA layers on a projector that is not the base's."""
    return any(
        not torch.equal(tensor, trained.stored[layouts.without_peft(name)].read().to(tensor.dtype))
        for name, tensor in trained.state.items()
        if layouts.PROJECTOR in name and name.endswith(".base_layer.weight")
    )


def _is_own_tower(table: ModelTable, base: Base) -> bool:
    """Whether the tower that the recipe names is the one that the base names itself."""
    own = find_base(table.model_copy(update={"vision_tower": ""}), weights=False)
    return base.tower is not None and own.tower is not None and own.tower.resolve() == base.tower.resolve()


def _origin(job: Job) -> Base | None:
    """The base that the model was trained on: itself if it was only converted, None if it is not here any more."""
    trained = job.trained
    if trained.kind != "model" or trained.own is None:
        return find_base(trained.recipe.model, weights=False)
    try:
        return find_base(trained.own.model, weights=False)
    except UserError as error:
        job.console.line(f"note: config.json and tokenizer are made again, as the base cannot be read: {error}")
        return None


def _facts(job: Job, fingerprint: str, processing: Processing, notes: list[str]) -> dict[str, Any]:
    """The known facts about a model that this package has not trained; prints the notes about it."""
    for note in notes:
        job.console.line(note)
    model, kind = job.recipe.model, job.trained.kind
    return {
        "base": model.named_base,
        "base_layout": processing.base.layout,
        "base_fingerprint": fingerprint,
        "train": None if kind == "model" else kind,
        "template": model.template,
    }
