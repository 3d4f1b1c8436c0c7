"""Floating-point operations of a step by a formula: counts in micro-batches (`Work`) times the cost of each (`Costs`).

It counts what the mathematics takes, not what a kernel happens to do. With N weights in a matrix and T tokens, a product
is 2 N T. A frozen matrix is used twice (forward, and the gradient of its input), a trained one three times. A pair of a
token and one that it attends to takes 4 H in a layer of width H, and twice as much in the backward pass. Embeddings, norms
and softmax are left out, as are padding and what gradient checkpointing computes again. The last MLP counts where its
output is read, a shared prefix once, and features from the cache cost nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_accel.model.layouts import LANGUAGE_MODEL, PROJECTOR
from llava_accel.model.processing import Processing
from llava_accel.model.tower import num_tower_layers


@dataclass(frozen=True, slots=True)
class Work:
    """What micro-batches hold, as counts."""

    tokens: int
    """In all rows, without padding."""
    pairs: int
    """Pairs of a token and one that it attends to, itself included."""
    targets: int
    read: int
    """Positions that predict targets, at which alone the last MLP is computed."""
    tiles: int
    """Tiles whose features are projected."""
    encoded: int
    """Tiles that the tower sees."""

    @classmethod
    def of(cls, batches: Iterable[Mapping[str, object]]) -> "Work":
        """The work in batches, which have the fields of `collate.Batch`. It looks at values, so it waits for the device."""
        sums = torch.zeros(6, dtype=torch.int64)
        for batch in batches:
            ends, depths = batch["subtree_end"], batch["position_ids"]
            names = ("target_ids", "read_positions", "pixel_values", "tower_features")
            assert isinstance(ends, Tensor) and isinstance(depths, Tensor)
            targets, read, pixels, features = (len(value) for name in names if isinstance(value := batch[name], Tensor))
            real = ends > 0
            pairs = int((depths + 1)[real].sum())
            sums += torch.tensor([int(real.sum()), pairs, targets, read, pixels + features, pixels])
        return cls(*sums.tolist())

    @classmethod
    def of_examples(cls, lengths: np.ndarray, targets: int, tiles: int, encoded: int) -> "Work":
        """The work in examples that share nothing."""
        whole = lengths.astype(np.int64)
        return cls(int(whole.sum()), int((whole * (whole + 1) // 2).sum()), targets, targets, tiles, encoded)


@dataclass(frozen=True, slots=True)
class Costs:
    """What one token, one pair, one target and one tile cost, in floating-point operations."""

    token: int
    """In the matrices of the language model's layers but the last MLP, forward and backward."""
    read: int
    """In the last MLP."""
    pair: int
    """In all layers' attention, forward and backward."""
    target: int
    """In lm_head."""
    projector: int
    """In the projector, per tile."""
    tower: int
    """In the tower up to the selected layer, per tile; forward only, if it is frozen."""

    def of(self, work: Work) -> int:
        """Number of operations for this work, of one step or of many."""
        language = self.token * work.tokens + self.pair * work.pairs + self.read * work.read
        return language + self.target * work.targets + self.projector * work.tiles + self.tower * work.encoded


def head_width(text: PreTrainedConfig) -> int:
    """Channels of an attention head of a language model, which need not divide its width."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def costs(model: nn.Module, processing: Processing) -> Costs:
    """The costs of a model, which may be on the meta device; 4-bit weights must not be packed."""
    text, vision, config = processing.base.text, processing.base.vision, processing.base.config
    token = read = projector = tower_linear = 0
    tower_trained = False
    last_mlp = f"layers.{int(text.num_hidden_layers) - 1}.mlp."
    layers, positions = num_tower_layers(config), processing.tiling.tile_tokens
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        uses = 3 if module.weight.requires_grad else 2
        if LANGUAGE_MODEL in name and last_mlp in name:
            read += 2 * module.weight.numel() * uses
        elif LANGUAGE_MODEL in name:
            token += 2 * module.weight.numel() * uses
        elif PROJECTOR in name:
            projector += 2 * module.weight.numel() * uses * positions
        elif (after := name.partition("vision_tower.encoder.layers.")[2]) and int(after.split(".")[0]) < layers:
            tower_linear += module.weight.numel()
            tower_trained |= module.weight.requires_grad
    tower = 2 * tower_linear * positions + 4 * positions**2 * int(vision.hidden_size) * layers
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    assert isinstance(head, nn.Linear)
    attention = int(text.num_attention_heads) * head_width(text)
    return Costs(
        token=token,
        read=read,
        pair=3 * 4 * attention * int(text.num_hidden_layers),
        target=2 * head.weight.numel() * (3 if head.weight.requires_grad else 2),
        projector=projector,
        tower=tower * (3 if tower_trained else 1),
    )
