"""A random LLaVA small enough to compute by hand, and examples made of plain numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from llava_accel.data.collate import collate
from llava_accel.data.labels import Example
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.tiling import ImageView
from llava_accel.data.trie import Row

VOCABULARY = 97
IMAGE_ID = 96
PX, PATCHES = 28, 4
TOLERANCE = 1e-5
PIXELS = {name: torch.randn(3, PX, PX, generator=torch.Generator().manual_seed(ord(name))) for name in "abcd"}
IMAGES = {ImageView(name, PATCHES): LoadedImage(pixels[None]) for name, pixels in PIXELS.items()}


def make_llava(tower: str = "clip", attention: str = "sdpa") -> LlavaForConditionalGeneration:
    """A random LLaVA of two layers and two tower layers, in evaluation mode, every weight trained."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    # Wide weights: attention that looked at the wrong place must show.
    images: dict[str, Any] = {"image_size": PX, "patch_size": PX // 2, "initializer_range": 0.2}
    vision = CLIPVisionConfig(**sizes, **images) if tower == "clip" else SiglipVisionConfig(**sizes, **images)
    text = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, **sizes)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    config._attn_implementation = attention
    return LlavaForConditionalGeneration(config).eval()


def talk(seed: int, question: int, answer: int, images: str = "", rounds: int = 1) -> Example:
    """An example of `rounds` x (`question` prompt tokens, `answer` targets), its images behind the first token."""
    random = np.random.default_rng(seed)
    ids, targets, starts = [1], [False], []
    for _ in images:
        starts.append(len(ids))
        ids += [IMAGE_ID] * PATCHES
        targets += [False] * PATCHES
    for _ in range(rounds):
        ids += random.integers(3, IMAGE_ID, size=question + answer).tolist()
        targets += [False] * question + [True] * answer
    return Example(
        input_ids=np.array(ids),
        is_target=np.array(targets),
        image_starts=tuple(starts),
        images=tuple(ImageView(name, PATCHES) for name in images),
        index=seed,
    )


MIXED = [talk(1, 5, 3, "a"), talk(2, 9, 7, "b", rounds=2), talk(3, 4, 1), talk(4, 6, 5, "ca"), talk(5, 3, 2, "bad")]


def batch_of(rows: Sequence[Row]) -> dict[str, Any]:
    return collate(rows, IMAGES, (3, PX, PX))


def about_one_image() -> list[Example]:
    """Three questions on one image, two answers to one of them, and a fourth question on another image."""
    tail = talk(13, 5, 4, "a")
    head = talk(12, 5, 3, "a")
    same_question = np.concatenate([head.input_ids[: 1 + PATCHES + 5], tail.input_ids[1 + PATCHES + 5 :]])
    second_answer = Example(
        input_ids=same_question, is_target=tail.is_target, image_starts=tail.image_starts, images=tail.images, index=14
    )
    return [talk(11, 4, 2, "a"), head, second_answer, talk(15, 6, 3, "a", rounds=2), talk(16, 4, 2, "b")]


def full_logits_loss(model: nn.Module, examples: Sequence[Example], weights: Sequence[float] | None = None) -> Tensor:
    """transformers' own mean loss over padded rows, made a sum; one call for each weight that occurs."""
    weights = [1.0] * len(examples) if weights is None else weights
    total = torch.zeros(())
    for weight in sorted(set(weights)):
        chosen = [example for example, own in zip(examples, weights, strict=True) if own == weight]
        seq = max(len(example.input_ids) for example in chosen)
        ids = torch.zeros((len(chosen), seq), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        labels = torch.full((len(chosen), seq), -100)
        for row, example in enumerate(chosen):
            length = len(example.input_ids)
            ids[row, :length], mask[row, :length] = torch.from_numpy(example.input_ids), 1
            labels[row, :length][example.is_target] = ids[row, :length][example.is_target]
        images = [PIXELS[view.file] for example in chosen for view in example.images]
        pixels = {"pixel_values": torch.stack(images)} if images else {}
        mean = model(input_ids=ids, attention_mask=mask, labels=labels, **pixels).loss
        total = total + weight * mean * sum(example.num_targets for example in chosen)
    return total


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of every parameter that has one; they are taken out of the model."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(model: nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """Loss and every gradient agree."""
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    found, expected = gradients(model, ours), gradients(model, theirs)
    nonzero = {name: grad for name, grad in expected.items() if grad.any()}
    assert len(nonzero) > 10 and nonzero.keys() <= found.keys()
    scale = torch.stack([grad.norm() for grad in nonzero.values()]).norm()
    for name, grad in nonzero.items():
        # Some gradients are sums that cancel to almost nothing; their noise is measured by the whole gradient.
        assert torch.dist(found[name], grad) <= TOLERANCE * max(grad.norm(), 1e-3 * scale), name


def watch(module: nn.Module, seen: list[int]) -> None:
    """Note the length of the module's first argument at every call."""
    module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
