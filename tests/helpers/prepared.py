"""A tiny model as a recipe makes it trainable, for the tests of this folder."""

import torch
from torch import Tensor, nn

from llava_accel.model.build import LoadedModel, load_model
from llava_accel.model.lora import Trainable, prepare_trainable
from llava_accel.model.processing import load_processing
from llava_accel.recipe import Recipe, make_recipe


def recipe_of(**model: object) -> Recipe:
    model = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.0}} | model
    return make_recipe({"run": {"name": "t"}, "model": model, "data": {"train": "x.json"}})


def load(recipe: Recipe, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(recipe, load_processing(recipe.model, "pad"), dtype=dtype, device=None)


def prepare(dtype: torch.dtype = torch.float32, **model: object) -> Trainable:
    recipe = recipe_of(**model)
    return prepare_trainable(load(recipe, dtype).model, recipe)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs(model: Trainable) -> dict[str, Tensor]:
    image = torch.linspace(-1, 1, 3 * 56 * 56).view(1, 3, 56, 56)
    return {
        "input_ids": torch.tensor([[1, *[model.config.image_token_id] * 16, 9, 8, 7, 6, 5]]),
        "pixel_values": image,
    }


@torch.no_grad()
def logits(model: Trainable) -> Tensor:
    return model.eval()(**inputs(model)).logits


def random_step(model: nn.Module, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
