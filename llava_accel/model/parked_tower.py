"""A frozen vision tower outside its model: whole on every rank, and read only if a picture has to run through it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from llava_accel.model.weights import Stored


class ParkedTower:
    """Takes the tower out of a model. It is no module, so nobody moves, divides or saves what is in it.

    Args:
        model: An empty module takes the tower's place in it.
        stored: The tower's weights on disk, by their names in it, where the model was loaded without them.
    """

    def __init__(self, model: LlavaForConditionalGeneration, stored: Stored | None = None) -> None:
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
            self.module = self._read()
        if self.module.device != device:
            self.module.to(device)  # pyright: ignore[reportArgumentType]  its stubs know no torch.device
        return self.module

    def weight(self, name: str) -> Tensor:
        """One weight in the type that the tower computes in, from disk where the tower has not been read."""
        parameter = self.module.get_parameter(name)
        return self.stored[name].read().to(parameter.dtype) if parameter.is_meta else parameter

    def _read(self) -> PreTrainedModel:
        loaded: Any = type(self.module).from_pretrained(
            None,
            config=self.module.config,
            state_dict={name: tensor.tensor for name, tensor in self.stored.items()},
            dtype=self.module.dtype,
            output_loading_info=True,
        )
        tower, info = loaded
        assert not any(info.values()), info  # names and shapes were compared when the model was loaded
        return tower.requires_grad_(False)
