"""Floating-point operations of a step, by a formula: what the mathematics takes, not what a kernel happens to do.

With N weights in a matrix and T tokens, a product is 2 N T. A frozen matrix is used twice (forward, and the gradient of
its input), a trained one three times. Attention over a sequence of length L in a layer of width H is 4 L^2 H, half of
it below the diagonal, and its backward pass twice the forward pass. Embeddings, norms and softmax are left out, as is
what gradient checkpointing computes again. Features that come from the cache cost nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from llava_accel.model.lora import LANGUAGE_MODEL, PROJECTOR
from llava_accel.model.processing import Processing
from llava_accel.model.tower import num_tower_layers


@dataclass(frozen=True, slots=True)
class Costs:
    """What one token, one target and one picture cost, in floating-point operations."""

    token: int
    """In the matrices of the language model's layers, forward and backward."""
    square: int
    """Of a sequence's squared length, forward and backward, in all layers' attention."""
    target: int
    """In lm_head."""
    projector: int
    """In the projector, a picture."""
    tower: int
    """In the tower up to the selected layer, a picture; forward only, where it is frozen."""

    def batch(self, lengths: Sequence[int], num_targets: int, num_pictures: int, num_encoded: int) -> int:
        """A step on sequences of these lengths.

        Args:
            num_encoded: Pictures that the tower saw.
        """
        return (
            self.token * sum(lengths)
            + self.square * sum(length * length for length in lengths)
            + self.target * num_targets
            + self.projector * num_pictures
            + self.tower * num_encoded
        )


def costs(model: nn.Module, processing: Processing) -> Costs:
    """Of a model, be it on the meta device; 4-bit weights must not be packed."""
    text, vision, config = processing.base.text, processing.base.vision, processing.base.config
    token = projector = 0
    layers, positions = num_tower_layers(config), processing.num_image_tokens
    tower_linear = 0
    tower_trained = False
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        uses = 3 if module.weight.requires_grad else 2
        if LANGUAGE_MODEL in name:
            token += 2 * module.weight.numel() * uses
        elif PROJECTOR in name:
            projector += 2 * module.weight.numel() * uses * positions
        elif "vision_tower.encoder.layers." in name and _layer(name) < layers:
            tower_linear += module.weight.numel()
            tower_trained |= module.weight.requires_grad
    width = int(vision.hidden_size)
    tower = 2 * tower_linear * positions + 4 * positions**2 * width * layers
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    assert isinstance(head, nn.Linear)
    attention = int(text.num_attention_heads) * int(text.hidden_size // text.num_attention_heads)
    return Costs(
        token=token,
        square=3 * 2 * attention * int(text.num_hidden_layers),
        target=2 * head.weight.numel() * (3 if head.weight.requires_grad else 2),
        projector=projector,
        tower=tower * (3 if tower_trained else 1),
    )


def _layer(name: str) -> int:
    return int(name.partition("vision_tower.encoder.layers.")[2].split(".")[0])
