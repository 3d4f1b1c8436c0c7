"""Checks that an export computes what was trained: both models' logits and answers on a few examples."""

import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import BitsAndBytesConfig

from llava_accel.console.output import Console
from llava_accel.data.labels import Example
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.tiling import ImageView
from llava_accel.exceptions import UserError
from llava_accel.inference.answering import answer_batch, question_batch
from llava_accel.model.bases import find_base
from llava_accel.model.memory import quantization_config
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.release.other_process import computed, other_process
from llava_accel.release.plain_images import plain_images
from llava_accel.release.second_copy import NO_PLACE, Place, find_place
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import autocast, resolve_precision, whole_root
from llava_accel.runtime.signals import Interruption
from llava_accel.scoring.held_out import choose_rows
from llava_accel.setup.datasets import Part

_TEXT = (
    "What is in the image? A red square on the left of two small circles, and behind them a tree. How many people "
    "are there? Three: a woman with a dog, and a child in a blue coat. Where was it taken? In a street at night."
)
_PROMPT = 8  # tokens
_MOST_EXAMPLES = 3
_MOST_TARGETS = 64  # of one example: a row of logits is as long as the vocabulary
_MAX_NEW_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Share of the largest logit: rounding of every weight to that type, as it adds up over some forty layers."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far apart the logits of two models are.

    `difference` and `largest` are the largest |a - b| and |a| over `num_tokens` positions and the vocabulary;
    `same_choice` is the share of positions at which both would write the same token.
    """

    difference: float
    largest: float
    same_choice: float
    num_tokens: int

    def within(self, dtype: torch.dtype) -> bool:
        """Whether rounding to `dtype` explains the difference."""
        return self.difference <= _TOLERANCE[dtype] * self.largest

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.1e} at most and reach {self.largest:.1e}; "
            f"same next token at {self.same_choice:.1%} of {self.num_tokens} positions"
        )


def probe_example(processing: Processing) -> tuple[Example, dict[ImageView, Tensor]]:
    """An example that needs no data, an image before a text that is mostly its answer; and its image's pixels.

    Without the image where transformers' model would cut it, and the model was trained on whole squares.
    """
    tokenizer, tiling = processing.processor.tokenizer, processing.tiling
    vertical, round_ = Image.linear_gradient("L"), Image.radial_gradient("L")
    image = Image.merge("RGB", (vertical, round_, vertical.transpose(Image.Transpose.ROTATE_90)))
    if tiling.canvases:
        image = image.resize((2 * tiling.side, tiling.side * 3 // 2))  # larger than a tile, and no shape of a canvas
    views = tiling.views(["probe"], lambda _: image.size)
    if processing.base.family.is_tiled and not tiling.canvases:
        views = ()
    squares = tiling.cut(image) if tiling.canvases else [image]
    pixels = {
        view: processing.processor.image_processor(squares, return_tensors="pt")["pixel_values"] for view in views
    }
    start, num_tokens = int(tokenizer.bos_token_id is not None), sum(view.num_tokens for view in views)
    words = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    ids = np.array([tokenizer.bos_token_id] * start + [processing.image_token_id] * num_tokens + list(words))
    is_target = np.arange(len(ids)) > start + num_tokens + _PROMPT
    example = Example(input_ids=ids, is_target=is_target, image_starts=(start,) * len(views), images=views)
    return example, pixels


def compare(expected: Float[Tensor, "targets vocab"], actual: Float[Tensor, "targets vocab"]) -> Agreement:
    """Compare two models' logits. A logit that is not finite on one side is an infinite difference."""
    difference = (expected - actual).abs().max()
    return Agreement(
        difference=float(difference) if difference.isfinite() else float("inf"),
        largest=float(expected.abs().max()),
        same_choice=float((expected.argmax(-1) == actual.argmax(-1)).float().mean()),
        num_tokens=len(expected),
    )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A few examples, and the trained model's outputs for them."""

    inputs: list[tuple[dict[str, Tensor], Tensor]]
    """Arguments of transformers' forward pass, and the positions at which it is compared."""
    logits: Float[Tensor, "targets vocab"]
    """The trained model's logits in fp32, on the CPU, of all examples one after the other."""
    answers: list[list[int]]
    stop_ids: list[int]
    vocab_size: int
    never: list[int]
    """Tokens that no answer may hold."""


@torch.no_grad()
def take_reference(
    objective: Objective,
    examples: Sequence[Example],
    pixels: Mapping[ImageView, Tensor],
    image_shape: tuple[int, ...],
    device: torch.device,
) -> Reference:
    """The model's outputs for those examples whose images transformers' model sees alike. Ranks that share each weight must
    all call it, inside `whole_root`.

    Args:
        objective: In any mode, which is restored.
        pixels: The pixels of every image of the examples.
    """
    shown = [(example, plain_images(example.images, pixels, objective.llava.config)) for example in examples]
    alike = [(example, images) for example, images in shown if images is not None]
    if not alike:
        return Reference(inputs=[], logits=torch.empty(0, 0), answers=[], stop_ids=[], vocab_size=0, never=[])
    was_training = objective.training
    objective.eval()
    kept = [_last_answer(example, number) for number, (example, _) in enumerate(alike)]
    images = {view: LoadedImage(tensor) for view, tensor in pixels.items()}
    batch, questions = question_batch(kept, images, image_shape, device)
    stop_ids = frozenset(example.end_id for example, _ in alike)
    answered = answer_batch(objective, batch, questions, stop_ids=stop_ids, max_new_tokens=_MAX_NEW_TOKENS)
    hidden, _ = objective.hidden_at_targets(**batch)  # pyright: ignore[reportArgumentType]
    logits = objective.logits(hidden).cpu()
    objective.train(was_training)
    image_token_id, num_rows = int(objective.llava.config.image_token_index), objective.llava.lm_head.out_features
    return Reference(
        inputs=[
            (_inputs(example, taken), torch.from_numpy(np.nonzero(example.is_target)[0] - 1))
            for example, (_, taken) in zip(kept, alike, strict=True)
        ],
        logits=logits,
        answers=answered.ids,
        stop_ids=sorted(stop_ids),
        vocab_size=objective.vocab_size,
        never=sorted({image_token_id, *range(objective.vocab_size, num_rows)}),
    )


def plain_outputs(
    reference: Reference,
    folder: Path,
    place: Place,
    *,
    base: str = "",
    quantization: BitsAndBytesConfig | None = None,
    is_asked: Callable[[], bool] = bool,
    process: subprocess.Popen[str] | None = None,
) -> dict[str, Any] | None:
    """The outputs of a process with transformers and peft alone for the examples: "logits", "answers" and "counts".

    Args:
        folder: The export.
        base: Folder or hub id of the base of an adapter; empty where the export is a whole model.
        is_asked: Whether this process has been asked to end.
        process: One of `other_process`; without it one is started.

    Returns:
        None if that process was stopped because this one was asked to end, or if it was killed, mostly for lack of memory.

    Raises:
        UserError: it cannot load the export, or not all of its weights.
    """
    with tempfile.TemporaryDirectory() as work:
        inputs, out = Path(work, "inputs.pt"), Path(work, "out.pt")
        torch.save(reference.inputs, inputs)
        keys = None if quantization is None else json.loads(quantization.to_json_string(use_diff=True))
        job = {
            "folder": str(folder), "base": base, "dtype": str(place.dtype).removeprefix("torch."),
            "device": place.device, "quantization": keys, "inputs": str(inputs), "out": str(out),
            "vocab_size": reference.vocab_size, "stop_ids": reference.stop_ids, "never": reference.never,
            "max_new_tokens": _MAX_NEW_TOKENS, "num_threads": torch.get_num_threads(),
        }  # fmt: skip
        Path(work, "job.json").write_text(json.dumps(job))
        with nullcontext(process) if process else other_process() as computer:
            done = computed(Path(work, "job.json"), computer, is_asked)
        if done is None or done.returncode == -signal.SIGKILL or "OutOfMemoryError" in done.stderr:
            return None
        if done.returncode or not out.is_file():
            reason = "\n".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
            raise UserError(f"{folder}: transformers and peft cannot load it: {reason}")
        outputs = torch.load(out, weights_only=True)
    for file, (loaded, stored) in outputs["counts"].items():
        if not stored or loaded < stored:
            raise UserError(
                f"{folder}: transformers and peft load {loaded} of {stored} weights of {file}; the others have names that "
                "the model does not have"
            )
    return outputs


def check_agreement(
    reference: Reference, outputs: dict[str, Any], name: str, dtype: torch.dtype, console: Console
) -> Agreement:
    """Print how far the outputs of an export (`plain_outputs`) are from those of the trained model.

    Raises:
        UserError: rounding to `dtype` does not explain it.
    """
    agreement = compare(reference.logits, outputs["logits"])
    same = sum(ours == theirs for ours, theirs in zip(reference.answers, outputs["answers"], strict=True))
    number = sum(loaded for loaded, _ in outputs["counts"].values())
    weights = f"{number:,} trained weights loaded; " if outputs["counts"] else ""
    console.line(f"{name}: {weights}{agreement}; {same} of {len(reference.answers)} answers are the same")
    if not agreement.within(dtype) or (dtype == torch.float32 and same < len(reference.answers)):
        raise UserError(f"{name}: the export does not compute what was trained ({agreement})")
    return agreement


def _last_answer(example: Example, number: int) -> Example:
    """The example with its last answer, or the beginning of that, as its only target."""
    first = example.prompt_length()
    end = min(len(example.input_ids), first + _MOST_TARGETS)
    is_target = example.is_target[:end] & (np.arange(end) >= first)
    return replace(example, input_ids=example.input_ids[:end], is_target=is_target, is_answer=None, index=number)


def _inputs(example: Example, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    input_ids = torch.from_numpy(example.input_ids)[None]
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}


def reference_outputs(recipe: Recipe, objective: Objective, part: Part, accelerator: Accelerator) -> Reference:
    """The trained model's outputs for a few examples of the data, the same ones in every run of a recipe.

    Every rank must call it, while its backend is still there.
    """
    rows = choose_rows(part.rows, _MOST_EXAMPLES, recipe.run.seed)[:_MOST_EXAMPLES]
    examples = [part.corpus.encode(int(row)).example for row in rows]
    pixels = {view: part.image_reader(view) for example in examples for view in example.images}
    with torch.no_grad(), autocast(recipe, accelerator), whole_root(objective):
        return take_reference(objective, examples, pixels, part.image_reader.shape, accelerator.device)


def standing_by(run: RunContext) -> AbstractContextManager[subprocess.Popen[str] | None]:
    """For the end of a run: the process that `verify` will need, which imports its libraries meanwhile, or None if it will
    need none. The process uses no GPU before it has a job."""
    is_needed = run.recipe.checkpoint.verify and run.accelerator.is_main_process and not _not_plain(run.recipe)
    return other_process() if is_needed else nullcontext()


def verify(
    reference: Reference,
    export: Path,
    run: RunContext,
    interruption: Interruption,
    process: subprocess.Popen[str] | None = None,
) -> None:
    """Load the export in another process, and compare. For the main process, after `engines.release`.

    If the run is asked to end meanwhile, or memory holds no second copy, a line says that this was left out.

    Args:
        process: That of `standing_by`.

    Raises:
        UserError: it does not load, or does not compute the same.
    """
    recipe, console = run.recipe, run.console
    reason = _not_plain(recipe)
    if not reason and not reference.inputs:
        reason = "transformers' model sees all images that it would be compared on differently from the trained model"
    if reason:
        console.line(f"{export}: not verified in a process with transformers and peft alone, as {reason}")
        return
    dtype = resolve_precision(recipe.run.precision, run.accelerator.device)
    base = "" if recipe.model.train == "full" else str(find_base(recipe.model, weights=False).folder)
    place = find_place(export, base, recipe.model.quantization, dtype, run.accelerator.device)
    if place is None:
        console.line(f"{export}: not verified, as {NO_PLACE}. `llava-accel export` compares it elsewhere")
        return
    console.line(f"verifying {export} in a process with transformers and peft alone, {place}. Ctrl-C skips it")
    since = time.perf_counter()
    quantization = quantization_config(recipe.model.quantization, place.dtype)
    outputs = plain_outputs(
        reference,
        export,
        place,
        base=base,
        quantization=quantization,
        is_asked=lambda: interruption.is_asked,
        process=process,
    )
    if outputs is None:
        reason = "this run was asked to end" if interruption.is_asked else "the memory was too small after all"
        console.line(f"{export}: not verified, as {reason}. It is complete")
        return
    name = f"{export} in plain transformers and peft, against the trained model"
    check_agreement(reference, outputs, f"{name}, in {time.perf_counter() - since:,.0f} s", dtype, console)


def _not_plain(recipe: Recipe) -> str:
    """Why transformers cannot load what an adapter was trained on; empty where it can."""
    model = recipe.model
    if model.train == "full":
        return ""
    if not model.base:
        return f"its base is made of parts ({model.language_model}): `llava_accel.export --to merged` joins them"
    base = find_base(model, weights=False)
    if base.layout != "hub":
        return f"{model.base} is in the layout of LLaVA's own code: `llava_accel.export --to merged` converts it"
    if base.tower_overridden:
        return f"it was trained with the vision tower {model.vision_tower}: `llava_accel.export --to merged` keeps that"
    return ""
