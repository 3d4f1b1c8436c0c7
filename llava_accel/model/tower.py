"""The vision tower up to the layer that LLaVA uses."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaConfig


def num_tower_layers(config: LlavaConfig) -> int:
    """Layers of the tower that its selected features depend on; LLaVA takes those of the last but one."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert isinstance(layer, int)
    return layer if layer >= 0 else depth + 1 + layer


def tower_features(
    tower: nn.Module, config: LlavaConfig, pixel_values: Float[Tensor, "pictures 3 height width"]
) -> Float[Tensor, "pictures tokens channels"]:
    """Hidden states of the vision tower at the layer that the config selects, in the tower's type.

    Layers behind the selected one are not computed. The class token is left out where the config says so.
    """
    weight = next(tower.parameters())
    trained = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        hidden = tower.embeddings(pixel_values.to(weight.dtype))  # pyright: ignore[reportCallIssue]
        if isinstance(tower, CLIPVisionModel):
            hidden = tower.pre_layrnorm(hidden)
        for layer in tower.encoder.layers[: num_tower_layers(config)]:  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
            hidden = layer(hidden, None)  # pyright: ignore[reportCallIssue]
    return (hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden).to(weight.dtype)
