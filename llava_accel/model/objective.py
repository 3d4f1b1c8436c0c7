"""The module that is trained: a batch in, the summed cross-entropy over its targets out.

Work that cannot change the gradient is left out: each tile runs through the tower once, and only the hidden states at
target positions reach the last MLP and `lm_head`. No token of a record attends to padding.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llava_accel import compat
from llava_accel.data.feature_store import FeatureWriter
from llava_accel.data.tiling import WHOLE, ImageLayout
from llava_accel.families.registry import Llava
from llava_accel.kernels.decoder import lighten_decoder
from llava_accel.kernels.low_rank import lighten_lora
from llava_accel.model.last_layer import read_at_positions
from llava_accel.model.masks import attention_mask
from llava_accel.model.merging import TileMerger
from llava_accel.model.precision import computed_in
from llava_accel.model.tower import ParkedTower, tower_features

LOGITS_AT_ONCE = 1 << 26
"""Entries: 256 MiB in fp32. Their gradient and their softmax take as much again, each."""


def _ignore(_phase: str) -> None:
    """`enter` of callers without a clock."""


def cross_entropy(logits: Float[Tensor, "targets vocab"], ids: Int[Tensor, "targets"]) -> Float[Tensor, "targets"]:
    """The cross-entropy of each target, in nats."""
    return F.cross_entropy(logits, ids, reduction="none")


class Objective(nn.Module):
    """Wraps a LLaVA, with or without LoRA layers in it. Its loss is the cross-entropy over the targets.

    Another loss is a class that inherits from this one, with a `loss` and, where that is not divided by the weight of the
    targets, a `count` of its own (`preference.py` has both).

    Args:
        model: A LLaVA, or peft's model around one.
        vocab_size: Rows of `lm_head` that take part in the softmax. Rows after them were added for the image token and
            must not change the loss of a base that never had them.
        compute_dtype: Type that the forward pass is computed in. 16 bits run under autocast, whatever the backend.
        tower_on_every_rank: Run the tower even when the micro-batch has no image. Needed where its weights are trained
            or gathered from other ranks, which would otherwise wait for this one for ever.
        tower_batch: Tiles that run through the tower at once; 0 = all of a micro-batch.
    """

    MEASURES: tuple[str, ...] = ()
    """Names of further numbers that a loss gives, for log lines and the report: see `measured`."""

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        compute_dtype: torch.dtype = torch.float32,
        tower_on_every_rank: bool = False,
        tower_batch: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.merger = TileMerger(getattr(self.llava.model, "image_newline", None))
        self.vocab_size = vocab_size
        self.compute_dtype = compute_dtype
        self.tower_on_every_rank = tower_on_every_rank
        self.tower_batch = tower_batch
        self.measured: dict[str, Float[Tensor, ""]] = {}
        """A sum for each of `MEASURES`, of the last micro-batch; `train_step` divides it as it does the loss."""
        self.features: FeatureWriter | None = None
        """Stores the features of a frozen tower for later epochs and runs."""
        self.tower_name = ""
        """Tells this tower and its layer from others: see `setup/vision_cache.py`."""
        self.parked: ParkedTower | None = None
        """A frozen tower that was taken out of the model; it runs when an image has no stored features."""
        self.is_sharded = False
        """Whether ranks hold parts of each weight (set by `runtime/engines.py`): then all run every module together."""
        lighten_lora(model)
        lighten_decoder(self.llava.model.language_model)
        read_at_positions(self.llava.model.language_model)

    @property
    def llava(self) -> Llava:
        """The model without peft's wrapper; LoRA layers live inside its modules."""
        model = self.model if isinstance(self.model, Llava) else self.model.get_base_model()  # pyright: ignore[reportCallIssue]
        assert isinstance(model, Llava)
        return model

    def flush_features(self) -> None:
        """Write the features that still wait in memory."""
        if self.features is not None:
            self.features.flush()

    @property
    def tower(self) -> PreTrainedModel:
        """The vision tower, wherever it is: on the meta device if its weights have not been read."""
        tower = self.parked.module if self.parked else self.llava.model.vision_tower
        assert isinstance(tower, PreTrainedModel)
        return tower

    def count(self, batch: Mapping[str, Any]) -> Float[Tensor, "*terms"]:
        """This micro-batch's part of the divisor of the loss, which is summed over the step's micro-batches and ranks."""
        return batch["target_weights"].sum()

    def loss(self, hidden: Float[Tensor, "targets hidden"], batch: Mapping[str, Any]) -> Float[Tensor, "*terms"]:
        """The sum of weight x cross-entropy over the targets.

        Args:
            hidden: The state that each target is predicted from.
            batch: The fields of `collate.Batch`.

        Returns:
            One sum, or several with different divisors: `count` returns as many.
        """
        losses = self.for_each_target(cross_entropy, hidden, batch["target_ids"])
        return (losses * batch["target_weights"]).sum()

    def forward(self, enter: Callable[[str], None] = _ignore, **batch: Any) -> Float[Tensor, "*terms"]:
        """The loss of a micro-batch, whose fields are those of `collate.Batch`.

        Args:
            enter: Told the phase of the step that begins, for the clock of the run (`runtime/timing.py`).
        """
        with computed_in(self.compute_dtype, batch["input_ids"].device):
            hidden, zero = self.hidden_at_targets(enter=enter, **batch)
            return self.loss(hidden, batch) + zero

    def hidden_at_targets(
        self,
        *,
        input_ids: Int[Tensor, "rows seq"],
        position_ids: Int[Tensor, "rows seq"],
        subtree_end: Int[Tensor, "rows seq"],
        branched: bool,
        pixel_values: Float[Tensor, "tiles 3 height width"],
        image_positions: Int[Tensor, "places"],
        image_index: Int[Tensor, "places"],
        target_reads: Int[Tensor, "targets"],
        read_positions: Int[Tensor, "read"],
        tower_features: Float[Tensor, "cached tokens channels"],
        image_names: UInt8[Tensor, "named digest"],
        tile_order: Int[Tensor, "all_tiles"],
        image_layouts: Sequence[ImageLayout],
        enter: Callable[[str], None] = _ignore,
        **_: Tensor,
    ) -> tuple[Float[Tensor, "targets hidden"], Float[Tensor, ""]]:
        """The state that each target is predicted from, and a zero that a loss has to be added to."""
        embeds, decoder = self.llava.get_input_embeddings()(input_ids), self.llava.model.language_model
        enter("vision")
        features = self.image_features(pixel_values, tower_features, image_names, tile_order, image_layouts)
        enter("forward")
        embeds = place_features(embeds, features[image_index], image_positions)
        kernel = compat.attention_kernel(decoder.config)
        with compat.one_sequence_a_row():  # rows of several sequences have a mask
            hidden = decoder(
                inputs_embeds=embeds,
                attention_mask=attention_mask(subtree_end, kernel, self.compute_dtype) if branched else None,
                position_ids=position_ids,
                use_cache=False,
                read_positions=read_positions,
            ).last_hidden_state.flatten(0, 1)
        # A language model whose last layer has another form gives the hidden states of all positions.
        read = hidden if len(hidden) == len(read_positions) else hidden[read_positions]
        # The factor 0 ties the projector to the loss of a micro-batch without images: every rank needs its gradient.
        # fp32, as in fp16 the sum may be infinite, and 0 times that is NaN.
        return read[target_reads], 0.0 * features.sum(dtype=torch.float32)

    def logits(self, hidden: Float[Tensor, "some hidden"]) -> Float[Tensor, "some vocab"]:
        """Logits in fp32, without those of rows of lm_head after the end of the vocabulary."""
        return self.llava.lm_head(hidden)[:, : self.vocab_size].float()

    def for_each_target(
        self,
        compute: Callable[[Tensor, Tensor], Tensor],
        hidden: Float[Tensor, "targets hidden"],
        ids: Int[Tensor, "targets"],
    ) -> Float[Tensor, "targets"]:
        """`compute` applied to the logits, in fp32, and the id of each target.

        Logits of many targets are computed in parts, and once more in the backward pass.
        """
        size = max(1, LOGITS_AT_ONCE // self.vocab_size)

        def part(hidden: Tensor, ids: Tensor) -> Tensor:
            return compute(self.logits(hidden), ids)

        # Ranks that share each weight must call lm_head equally often, and have unequal numbers of targets.
        if len(ids) <= size or self.is_sharded:
            return part(hidden, ids)
        parts = zip(hidden.split(size), ids.split(size), strict=True)
        return torch.cat([checkpoint(part, *each, use_reentrant=False) for each in parts])

    def image_features(
        self,
        pixel_values: Float[Tensor, "tiles 3 h w"],
        tower_features: Float[Tensor, "cached tokens channels"],
        image_names: UInt8[Tensor, "named digest"],
        order: Int[Tensor, "all_tiles"],
        layouts: Sequence[ImageLayout],
    ) -> Float[Tensor, "image_tokens hidden"]:
        """The image tokens of a batch, in the order that `Batch.image_index` counts them in.

        Without any image, those of a blank one, so that the graph is the same on every rank.
        """
        projector = self.llava.model.multi_modal_projector
        weight = next(projector.parameters())
        parts = [tower_features] if len(tower_features) else []
        if len(pixel_values):
            parts.insert(0, self.encode(pixel_values, image_names))
        elif self.tower_on_every_rank and not self.parked:
            # The tower's own size: a batch without images does not have it.
            side = self.llava.config.vision_config.image_size  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            blank = self.encode(pixel_values.new_zeros((1, 3, side, side)), image_names)
            parts = parts or [blank]
        parts = parts or [weight.new_zeros((1, 1, projector.linear_1.in_features))]
        joined = torch.cat([features.to(weight) for features in parts])
        projected = projector(joined if len(parts) == 1 else joined[order])
        return self.merger(projected, layouts or [WHOLE])

    def encode(
        self, pixel_values: Float[Tensor, "tiles 3 h w"], names: UInt8[Tensor, "named digest"]
    ) -> Float[Tensor, "tiles tokens channels"]:
        """The tower's features, which are stored if there is a cache and the tiles have names."""
        device = self.llava.device
        tower = self.parked.on(device) if self.parked else self.tower
        features = self._in_parts(partial(tower_features, tower, self.llava.config), pixel_values.to(device))
        if self.features is not None and len(names):
            self.features.put(names, features)
        return features

    def _in_parts(self, encode: Callable[[Tensor], Tensor], tiles: Tensor) -> Tensor:
        """Encode few tiles at a time, to bound the tower's memory; the backward pass computes each part once more."""
        size = self.tower_batch or len(tiles)
        # Ranks that share each weight must run the tower equally often, and have unequal numbers of tiles.
        if len(tiles) <= size or (self.is_sharded and not self.parked):
            return encode(tiles)
        return torch.cat([checkpoint(encode, part, use_reentrant=False) for part in tiles.split(size)])


def place_features(
    embeds: Float[Tensor, "rows seq hidden"],
    features: Float[Tensor, "places hidden"],
    positions: Int[Tensor, "places"],
) -> Float[Tensor, "rows seq hidden"]:
    """Put image tokens at their places in the flattened rows."""
    if not len(positions):
        # An empty sum keeps the graph the same with and without images: FSDP orders its reductions by it.
        return embeds + features.sum().to(embeds.dtype)
    seq = embeds.shape[1]
    # Not a view of flattened rows: torch.compile would make further graphs for a first layer whose input is a view.
    return embeds.index_put((positions // seq, positions % seq), features.to(embeds.dtype))
