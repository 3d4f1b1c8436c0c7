"""Whether two models are one: their logits for a picture and a text that need no data."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava_accel.data.labels import Example
from llava_accel.model.processing import Processing

_TEXT = (
    "What is in the picture? A red square on the left of two small circles, and behind them a tree. How many people "
    "are there? Three: a woman with a dog, and a child in a blue coat. Where was it taken? In a street at night."
)
_PROMPT = 8  # tokens
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


def probe_inputs(processing: Processing) -> dict[str, Tensor]:
    """A picture and a text as transformers' forward pass takes them."""
    tokenizer = processing.processor.tokenizer
    words = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    ids = [processing.image_token_id] * processing.num_image_tokens + list(words)
    if tokenizer.bos_token_id is not None:
        ids.insert(0, tokenizer.bos_token_id)
    vertical, round_ = Image.linear_gradient("L"), Image.radial_gradient("L")
    picture = Image.merge("RGB", (vertical, round_, vertical.transpose(Image.Transpose.ROTATE_90)))
    pixels = processing.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    input_ids = torch.tensor([ids])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}


def probe_example(processing: Processing) -> tuple[Example, dict[str, Tensor]]:
    """The same as an example whose answer is most of its text, and its picture's pixels."""
    inputs = probe_inputs(processing)
    ids = inputs["input_ids"][0].numpy()
    start = int(np.argmax(ids == processing.image_token_id))
    is_target = np.arange(len(ids)) > start + processing.num_image_tokens + _PROMPT
    example = Example(input_ids=ids, is_target=is_target, image_starts=(start,), images=("probe",))
    return example, {"probe": inputs["pixel_values"][0]}


@torch.no_grad()
def probe(model: LlavaForConditionalGeneration, processing: Processing) -> Float[Tensor, "seq vocab"]:
    """Logits through transformers' own forward pass, as whoever loads an export gets them; on the CPU, in fp32."""
    inputs = {name: tensor.to(model.device) for name, tensor in probe_inputs(processing).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.model.vision_tower.dtype)
    was_training = model.training
    model.eval()
    logits = model(**inputs, use_cache=False).logits
    model.train(was_training)
    return logits[0, :, : processing.vocab_size].float().cpu()


def compare(expected: Float[Tensor, "seq vocab"], found: Float[Tensor, "seq vocab"]) -> Agreement:
    """Compare two results of `probe`. A logit that is not finite on one side is an infinite difference."""
    difference = (expected - found).abs().max()
    return Agreement(
        difference=float(difference) if difference.isfinite() else float("inf"),
        largest=float(expected.abs().max()),
        same_choice=float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        num_tokens=len(expected),
    )
