"""Forward passes over the modules of transformers' decoder layers that share inputs and keep less for the backward pass.

Weights and their names stay. Tests compare each class with transformers' own.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from llava_accel import compat
from llava_accel.kernels.elementwise import normed, rotated
from llava_accel.kernels.low_rank import project
from llava_accel.kernels.ways import compute_by


class LightAttention(nn.Module):
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = hidden_states.shape[:-1]
        made = project((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        query, key, value = (each.view(*shape, -1, self.head_dim) for each in made)
        if isinstance(self, Qwen3Attention):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (each.transpose(1, 2) for each in (*self.rotate(query, key, position_embeddings), value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(compat.attention_kernel(self.config), eager_attention_forward)
        if not isinstance(self, LlamaAttention):
            window = self.config.sliding_window if isinstance(self, MistralAttention) else self.sliding_window
            settings["sliding_window"] = window
        dropout = self.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **settings
        )
        return self.o_proj(attended.reshape(*shape, -1)), weights

    def rotate(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Apply rotary positions to both, [rows, seq, heads, size]."""
        return rotated(query, *position_embeddings), rotated(key, *position_embeddings)


class LightGate(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project((self.gate_proj, self.up_proj), x)
        return project((self.down_proj,), gate, up)[0]


class LightNorm(nn.Module):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return normed(hidden_states, self.weight, self.variance_epsilon)


_LIGHT = {
    **dict.fromkeys((LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention), LightAttention),
    **dict.fromkeys((LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP), LightGate),
    **dict.fromkeys((LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm), LightNorm),
}

SILU = ("silu", "swish")
"""Names that configs have for that activation."""


def lighten_decoder(language_model: nn.Module) -> None:
    """Let the modules of a decoder compute by the classes above; those of unknown classes stay as they are."""
    for module in list(language_model.modules()):
        config: Any = getattr(module, "config", None)
        light = _LIGHT.get(type(module))
        if light is None or (light is LightGate and config.hidden_act not in SILU):
            continue
        compute_by(module, light)
