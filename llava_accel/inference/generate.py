"""Greedy answers for a batch of prompts, with the key-value cache and without keeping logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from llava_accel.data.collate import place_images, stack_images
from llava_accel.data.images import LoadedImage
from llava_accel.data.labels import Example
from llava_accel.model.objective import Objective, place_features


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of a batch, padded on the left so that all answers begin at the same place."""

    input_ids: Int[Tensor, "rows seq"]
    attention_mask: Int[Tensor, "rows seq"]
    pixel_values: Float[Tensor, "images 3 height width"]
    tower_features: Float[Tensor, "cached tokens channels"]
    image_names: UInt8[Tensor, "named digest"]
    image_positions: Int[Tensor, "places"]
    image_index: Int[Tensor, "places"]


def build_prompts(
    examples: Sequence[Example], images: Mapping[str, LoadedImage], image_shape: tuple[int, ...], device: torch.device
) -> Prompts:
    """The examples up to their last answer.

    Args:
        examples: May be empty: a rank without examples still generates from one token, so that it takes part in every
            collective operation.
        images: Every image of theirs by file name.
        image_shape: Shape of every image's pixels.
    """
    lengths = [example.prompt_length() for example in examples]
    seq = max(lengths, default=1)
    input_ids = torch.zeros((max(1, len(examples)), seq), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids) if examples else torch.ones_like(input_ids)
    names = place_images((name for example in examples for name in example.images), images)
    places: list[int] = []
    which: list[int] = []
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, seq - length :] = torch.from_numpy(example.input_ids[:length])
        attention_mask[row, seq - length :] = 1
        for start, name in zip(example.image_starts, example.images, strict=True):
            places.append(row * seq + seq - length + start)
            which.append(names[name])
    stacked = stack_images([images[name] for name in names], image_shape)
    return Prompts(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        **{name: tensor.to(device) for name, tensor in stacked.items()},
        image_positions=torch.tensor(places, dtype=torch.int64, device=device),
        image_index=torch.tensor(which, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def generate(
    objective: Objective,
    prompts: Prompts,
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    blind: bool = False,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Token ids of each greedy answer, without the token that ended it.

    Args:
        stop_ids: Tokens that end an answer.
        max_new_tokens: Longest answer.
        blind: Blank the images' features: what the model answers from the words alone.
        streamer: Gets each token of a single answer as soon as it is known.
    """
    llava = objective.llava
    features = objective.image_features(prompts.pixel_values, prompts.tower_features, prompts.image_names)
    embeds = llava.get_input_embeddings()(prompts.input_ids)
    embeds = place_features(embeds, features[prompts.image_index] * (not blind), prompts.image_positions)
    rows = llava.lm_head.out_features
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        # The image token is no word, nor are the rows of lm_head behind the vocabulary.
        suppress_tokens=sorted({llava.config.image_token_index, *range(objective.vocab_size, rows)}),
    )
    answers = llava.generate(  # pyright: ignore[reportAttributeAccessIssue]
        inputs_embeds=embeds,
        attention_mask=prompts.attention_mask,
        generation_config=config,
        streamer=streamer,
        synced_gpus=objective.is_sharded,  # a rank whose answers have ended goes on until all have
    )
    assert isinstance(answers, Tensor)
    return [_until_stop(answer, set(stop_ids)) for answer in answers.tolist()]


def _until_stop(ids: list[int], stops: set[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in stops:
            return ids[:place]
    return ids
