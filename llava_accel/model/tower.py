"""The vision tower up to the layer that LLaVA uses, and the tower taken out of a model until an image needs it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_accel import compat
from llava_accel.families.registry import Config, Llava
from llava_accel.model.weights import Stored, straight_to


def num_tower_layers(config: Config) -> int:
    """Number of the tower's layers that its selected features depend on; LLaVA's own are those of the last layer but one."""
    layer, depth = config.vision_feature_layer, config.vision_config.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
    assert isinstance(layer, int)
    return layer if layer >= 0 else depth + 1 + layer


def used_tower_parameters(tower: nn.Module, config: Config) -> dict[str, nn.Parameter]:
    """The tower's parameters that its selected features depend on, by their names in it.

    Weights after the selected layer get no gradient, and ranks would wait for one for ever.
    """
    depth = len(tower.encoder.layers)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    unused = [f"encoder.layers.{number}." for number in range(num_tower_layers(config), depth)]
    left_out = (*unused, "post_layernorm.", "head.")
    return {name: weight for name, weight in tower.named_parameters() if not name.startswith(left_out)}


def tower_features(
    tower: nn.Module, config: Config, pixel_values: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images tokens channels"]:
    """Hidden states of the vision tower at the layer that the config selects, in the tower's type.

    Layers after the selected one are not computed. The class token is left out where the config says so.
    """
    weight = next(tower.parameters())
    trained = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        hidden = compat.tower_states(tower, pixel_values.to(weight.dtype), num_tower_layers(config))
    return (hidden[:, 1:] if config.vision_feature_select_strategy == "default" else hidden).to(weight.dtype)


class ParkedTower:
    """Takes the tower out of a model. It is not a module, so no engine moves, shards or saves what is in it.

    Args:
        model: An empty module takes the tower's place in it.
        stored: The tower's weights on disk, by their names in it, where the model was loaded without them.
    """

    def __init__(self, model: Llava, stored: Stored | None = None) -> None:
        module = model.model.vision_tower
        assert isinstance(module, PreTrainedModel)
        model.model.vision_tower = nn.Module()
        self.module: PreTrainedModel = module.to("meta" if stored else "cpu").requires_grad_(False)  # pyright: ignore[reportArgumentType]
        """On the meta device as long as its weights have not been read."""
        self.stored = stored or {}

    def on(self, device: torch.device) -> PreTrainedModel:
        """The tower on `device`, read from disk if this is the first call.

        Ranks need not agree on when they call it.
        """
        if self.module.device.type == "meta":
            self.module = self._read(device)
        if self.module.device != device:
            self.module.to(device)  # pyright: ignore[reportArgumentType]  its stubs know no torch.device
        return self.module

    def weight(self, name: str) -> Tensor:
        """One weight in the type that the tower computes in, from disk where the tower has not been read."""
        parameter = self.module.get_parameter(name)
        return self.stored[name].read().to(parameter.dtype) if parameter.is_meta else parameter

    def _read(self, device: torch.device) -> PreTrainedModel:
        state = {name: tensor.tensor for name, tensor in self.stored.items()}
        kind, config, dtype = type(self.module), self.module.config, self.module.dtype
        tower = compat.load_model(kind, config, state, dtype=dtype, device_map=straight_to(device))
        return tower.requires_grad_(False)
