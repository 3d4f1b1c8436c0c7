"""liger-kernel's norm, rotary positions and SwiGLU in a decoder: Triton kernels for GPUs. Adapters and losses stay ours."""

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_accel.exceptions import UserError
from llava_accel.kernels.decoder import SILU, LightAttention, LightGate, LightNorm
from llava_accel.kernels.low_rank import project
from llava_accel.kernels.ways import compute_by

_DEVICES = ("cuda", "xpu")
"""Device types with Triton; those of ROCm are called "cuda", too."""
_DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose modules `decoder.py` knows."""
_REMEDY = 'or set model.kernels = "native"'


def liger_problem(device: torch.device) -> str:
    """Why liger-kernel cannot compute on this device, with the remedy; empty if it can."""
    if device.type not in _DEVICES:
        return (
            f'model.kernels = "liger" needs a GPU that Triton can compile for, and this run is on {device.type}. '
            f"Run it on a GPU, {_REMEDY}"
        )
    missing = next((name for name in ("liger_kernel", "triton") if find_spec(name) is None), None)
    if missing is None:
        return ""
    return (
        f'model.kernels = "liger" needs the package {missing.replace("_", "-")}, which is not installed. '
        f'Install it (pip install "llava-accel[kernels]"), {_REMEDY}'
    )


def require_liger_decoder(text: PreTrainedConfig) -> None:
    """Refuse a language model that liger-kernel would leave as it is.

    Raises:
        UserError: liger-kernel has none of its layers, or not its activation.
    """
    if text.model_type not in _DECODERS or text.hidden_act not in SILU:
        raise UserError(
            f'model.kernels = "liger" is for language models of type {", ".join(_DECODERS)} with silu, and this one is '
            f"{text.model_type} with {getattr(text, 'hidden_act', 'another activation')}. Choose another base, {_REMEDY}"
        )


def use_liger(language_model: nn.Module) -> None:
    """Let a decoder that `lighten_decoder` has prepared compute with liger-kernel; parameters keep their names."""
    ways = {LightAttention: _Attention, LightGate: _Gate, LightNorm: _Norm}
    for module in list(language_model.modules()):
        for light, way in ways.items():
            if isinstance(module, light):
                compute_by(module, way)


class _Attention(LightAttention):
    def rotate(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_rope  # pyright: ignore[reportMissingImports]

        # It takes heads before positions, as views of the tensors given here, and rotates them in place.
        turned = liger_rope(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)


class _Gate(LightGate):
    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu  # pyright: ignore[reportMissingImports]

        return self.down_proj(liger_swiglu(*project((self.gate_proj, self.up_proj), x)))


class _Norm(LightNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_rms_norm  # pyright: ignore[reportMissingImports]

        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon)
