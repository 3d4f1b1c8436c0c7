"""Proof that an export is what was trained: another process loads it with transformers and peft alone, and its logits
and answers on a few examples are those of the trained model.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import BitsAndBytesConfig

from llava_accel.data.collate import collate
from llava_accel.data.images import Picture
from llava_accel.data.labels import Example
from llava_accel.data.questions import ask
from llava_accel.data.records import Record
from llava_accel.data.trie import chain
from llava_accel.model import elsewhere
from llava_accel.model.agreement import Agreement, compare
from llava_accel.model.answering import answer_batch, target_logits
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.console import Screen
from llava_accel.run.datasets import Part
from llava_accel.run.evaluation import choose_rows

_MOST_EXAMPLES = 3
_MOST_TARGETS = 64  # of one example: a row of logits is as long as the vocabulary
_MAX_NEW_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A few examples, and what the trained model makes of them."""

    inputs: list[tuple[dict[str, Tensor], Tensor]]
    """What transformers' forward pass takes, and at which places it is compared."""
    logits: Float[Tensor, "targets vocab"]
    """In fp32, on the CPU, of all examples one after the other."""
    answers: list[list[int]]
    stop_ids: list[int]
    vocab_size: int
    never: list[int]
    """Tokens that no answer may hold."""


def examples_of(part: Part, recipe: Recipe) -> tuple[list[Example], dict[str, Tensor]]:
    """A few examples of the data, the same in every run of a recipe, and their pictures' pixels."""
    rows = choose_rows(part.rows, _MOST_EXAMPLES, recipe.run.seed)[:_MOST_EXAMPLES]
    examples = [part.corpus.encode(int(row)).example for row in rows]
    return examples, {name: part.pictures(Path(name)) for example in examples for name in example.images}


def take_sample(
    objective: Objective,
    examples: Sequence[Example],
    pixels: dict[str, Tensor],
    image_shape: tuple[int, ...],
    device: torch.device,
) -> Sample:
    """What the model makes of the examples. Ranks that share each weight must all call it, inside `whole_root`.

    Args:
        objective: In any mode, which is restored.
        pixels: By the names that the examples give.
    """
    was_training = objective.training
    objective.eval()
    kept = [_last_answer(example, number) for number, example in enumerate(examples)]
    rows = [chain(example) for example in kept]
    batch = collate(rows, {name: Picture(tensor) for name, tensor in pixels.items()}, image_shape)
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    records = {example.index: Record(id="", turns=()) for example in kept}
    questions = ask(rows, {example.index: example for example in kept}, records)
    stop_ids = frozenset(int(example.input_ids[example.is_target][-1]) for example in examples)
    answered = answer_batch(objective, batch, questions, stop_ids=stop_ids, max_new_tokens=_MAX_NEW_TOKENS)
    logits = target_logits(objective, batch).cpu()
    objective.train(was_training)
    image_token_id, num_rows = int(objective.llava.config.image_token_index), objective.llava.lm_head.out_features
    return Sample(
        inputs=[(_inputs(example, pixels), torch.from_numpy(np.nonzero(example.is_target)[0] - 1)) for example in kept],
        logits=logits,
        answers=answered.ids,
        stop_ids=sorted(stop_ids),
        vocab_size=objective.vocab_size,
        never=sorted({image_token_id, *range(objective.vocab_size, num_rows)}),
    )


def compute_elsewhere(
    sample: Sample,
    folder: Path,
    *,
    dtype: torch.dtype,
    base: str = "",
    quantization: BitsAndBytesConfig | None = None,
    use_gpu: bool,
) -> dict[str, Any]:
    """What a process with transformers and peft alone makes of the sample: "logits", "answers" and "counts".

    Args:
        folder: The export.
        base: Folder or hub id of what an adapter is loaded on; empty where the export is a whole model.

    Raises:
        ValueError: it cannot load the export, or not all of its weights.
    """
    with tempfile.TemporaryDirectory() as place:
        inputs, out = Path(place, "inputs.pt"), Path(place, "out.pt")
        torch.save(sample.inputs, inputs)
        job = {
            "folder": str(folder), "base": base, "dtype": str(dtype).removeprefix("torch."), "use_gpu": use_gpu,
            "quantization": _keys(quantization), "inputs": str(inputs), "out": str(out),
            "vocab_size": sample.vocab_size, "stop_ids": sample.stop_ids, "never": sample.never,
            "max_new_tokens": _MAX_NEW_TOKENS, "num_threads": torch.get_num_threads(),
        }  # fmt: skip
        Path(place, "job.json").write_text(json.dumps(job))
        done = _start(Path(place, "job.json"))
        if done.returncode or not out.is_file():
            reason = "\n".join(done.stderr.strip().splitlines()[-3:]) or f"exit code {done.returncode}"
            raise ValueError(f"{folder}: transformers and peft cannot load it: {reason}")
        found = torch.load(out, weights_only=True)
    for file, (loaded, stored) in found["counts"].items():
        if not stored or loaded < stored:
            raise ValueError(
                f"{folder}: transformers and peft load {loaded} of {stored} weights of {file}; the others have no place "
                "under their names"
            )
    return found


def prove(sample: Sample, found: dict[str, Any], name: str, dtype: torch.dtype, screen: Screen) -> Agreement:
    """Print how far `compute_elsewhere` came from the trained model.

    Raises:
        ValueError: rounding to `dtype` does not explain it.
    """
    agreement = compare(sample.logits, found["logits"])
    same = sum(ours == theirs for ours, theirs in zip(sample.answers, found["answers"], strict=True))
    number = sum(loaded for loaded, _ in found["counts"].values())
    weights = f"{number:,} trained weights loaded; " if found["counts"] else ""
    screen.line(f"{name}: {weights}{agreement}; {same} of {len(sample.answers)} answers are the same")
    if not agreement.within(dtype) or (dtype == torch.float32 and same < len(sample.answers)):
        raise ValueError(f"{name}: the export does not compute what was trained ({agreement})")
    return agreement


def _start(job: Path) -> subprocess.CompletedProcess[str]:
    # -P: the program's own folder holds modules of ours, which must not be found.
    command = [sys.executable, "-P", elsewhere.__file__, str(job)]
    return subprocess.run(command, capture_output=True, text=True, env=_environment())


def _last_answer(example: Example, number: int) -> Example:
    """The example with its last answer as its only one, or the beginning of that."""
    first = example.prompt_length()
    end = min(len(example.input_ids), first + _MOST_TARGETS)
    is_target = example.is_target[:end] & (np.arange(end) >= first)
    return replace(example, input_ids=example.input_ids[:end], is_target=is_target, index=number)


def _inputs(example: Example, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    input_ids = torch.from_numpy(example.input_ids)[None]
    pictures = {"pixel_values": torch.stack([pixels[name] for name in example.images])} if example.images else {}
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pictures}


def _keys(quantization: BitsAndBytesConfig | None) -> dict[str, Any] | None:
    return None if quantization is None else json.loads(quantization.to_json_string(use_diff=True))


def _environment() -> dict[str, str]:
    """This process's, less what a launcher says of ranks: the other one stands alone."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    names = {key for key in os.environ if key in ranks or key.startswith(("ACCELERATE_", "FSDP_", "TORCHELASTIC_"))}
    return {key: value for key, value in os.environ.items() if key not in names}
