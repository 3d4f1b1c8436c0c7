"""A language model's last layer, computed only where its output is read."""

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

_SAME_FORM = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
"""Layers whose forward pass is that of `LastLayer`; tests compare each of them."""


class LastLayer(GradientCheckpointingLayer):
    """A language model's last layer, computed from its attention on only where its output is read.

    An MLP treats each position by itself, and after the last layer only positions that predict a target are read: for a
    question on an image about three of hundreds. It takes the place of a pre-norm decoder layer and keeps its modules under
    their names, so checkpoints are the same.

    Args:
        layer: One of `_SAME_FORM`.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, _SAME_FORM)
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.train(layer.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "rows seq hidden"],
        *,
        read_positions: Int[Tensor, "read"] | None = None,
        **attention: Any,
    ) -> Float[Tensor, "rows2 read2 hidden"]:
        """The layer's output, [1, read, hidden], at positions in the flattened rows; None reads all of them.

        Args:
            attention: Mask, positions and cache, as transformers gives them to every layer.
        """
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **attention)
        hidden_states = hidden_states + attended
        if read_positions is not None:
            hidden_states = hidden_states.flatten(0, 1)[read_positions][None]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def read_at_positions(language_model: nn.Module) -> None:
    """Let a decoder take `read_positions`; one whose layers have another form ignores them and computes all positions.

    The last layer must not be checkpointed (`memory.enable_checkpointing` leaves it out): nothing would be saved.
    """
    layers = language_model.layers
    assert isinstance(layers, nn.ModuleList)
    if isinstance(layers[-1], _SAME_FORM):
        layers[-1] = LastLayer(layers[-1])
