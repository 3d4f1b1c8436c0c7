"""Losses and greedy answers of a batch from one pass over its prompts; evaluation, chat and verification all use it.

Rows are forests (`data/trie.py`): questions on one image follow its tokens, which are computed once. The pass that gives
the loss also fills the key-value cache; each answer then grows from the place where its question ends, as a further
branch of the row that does not see the reference answer. No logits are kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import DynamicCache

from llava_accel import compat
from llava_accel.data.collate import IMAGE_FIELDS, collate
from llava_accel.data.labels import Example
from llava_accel.data.loader import Loaded, moved, tensor
from llava_accel.data.pixels import LoadedImage
from llava_accel.data.questions import Questions, ask
from llava_accel.data.records import Record
from llava_accel.data.tiling import ImageView
from llava_accel.data.trie import chain
from llava_accel.model.masks import forest_mask, sees
from llava_accel.model.objective import Objective, cross_entropy, place_features


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The losses and answers of one batch."""

    losses: Float[Tensor, "targets"]
    """Cross-entropy of each target, in nats, in the order of the batch."""
    ids: list[list[int]]
    """Tokens of each answer, without the one that ended it."""


def question_batch(
    examples: Sequence[Example],
    images: Mapping[ImageView, LoadedImage],
    image_shape: tuple[int, ...],
    device: torch.device,
    *,
    blind: bool = False,
) -> tuple[Loaded, Questions]:
    """A batch with one example per row, on `device`, and its questions: those of the last answers.

    Args:
        examples: Each with an index of its own.
        images: All images of the examples.
        blind: Leave the images out, for an `answer_batch` that blanks them.
    """
    rows = [chain(example) for example in examples]
    rows = [replace(row, images=(), image_starts=()) for row in rows] if blind else rows
    records = {example.index: Record(id="", turns=()) for example in examples}
    questions = ask(rows, {example.index: example for example in examples}, records)
    return moved(collate(rows, images, image_shape), device), questions


@torch.no_grad()
def answer_batch(
    objective: Objective,
    batch: Loaded,
    questions: Questions,
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    blind: bool = False,
    is_over: Callable[[bool], bool] = bool,
    on_tokens: Callable[[Int[Tensor, "questions"]], None] | None = None,
) -> Answered:
    """Score the reference answers and write the model's own.

    Args:
        batch: Fields of `collate.Batch`.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Longest answer.
        blind: Blank the images, so that the model answers from the words alone. The batch then holds no images.
        is_over: Takes whether this rank has its answers, and returns whether all ranks have. Ranks that share each weight
            go on together.
        on_tokens: Gets the next token of every answer as soon as it is known, also after the end of an answer.
    """
    cache = DynamicCache()
    compute = partial(objective.llava.model.language_model, past_key_values=cache, use_cache=True)
    with _masked_attention(objective):
        hidden, losses = read_prompts(objective, batch, cache, blind=blind)
        branches = _Branches.after(questions, tensor(batch, "position_ids"), tensor(batch, "subtree_end"))
        ids: list[Tensor] = []
        here = hidden[branches.rows, branches.places]
        stops = torch.tensor(sorted(stop_ids), device=here.device)
        is_done = torch.zeros(len(here), dtype=torch.bool, device=here.device)
        while True:
            ids.append(_best(objective, here))
            if on_tokens:
                on_tokens(ids[-1])
            is_done |= torch.isin(ids[-1], stops)
            if len(ids) == max_new_tokens or is_over(bool(is_done.all())):
                break
            hidden = compute(
                inputs_embeds=objective.llava.get_input_embeddings()(branches.laid_out(ids[-1])),
                attention_mask=_attention(objective, branches.mask(len(ids))),
                position_ids=branches.depths + len(ids),
            ).last_hidden_state
            here = hidden[branches.rows, branches.slots]
    written = torch.stack(ids, dim=1).tolist()
    ends = [next((place for place, token in enumerate(answer) if token in stop_ids), None) for answer in written]
    return Answered(losses=losses, ids=[answer[:end] for answer, end in zip(written, ends, strict=True)])


def read_prompts(
    objective: Objective, batch: Loaded, cache: DynamicCache, *, blind: bool = False
) -> tuple[Float[Tensor, "rows seq hidden"], Float[Tensor, "targets"]]:
    """Hidden states of a batch, and the cross-entropy of its targets; keys and values go into the cache."""
    subtree_end = tensor(batch, "subtree_end")
    hidden = objective.llava.model.language_model(
        inputs_embeds=_embeds(objective, batch, blind),
        attention_mask=_attention(objective, forest_mask(subtree_end)) if batch["branched"] else None,
        position_ids=tensor(batch, "position_ids"),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    targets = hidden.flatten(0, 1)[tensor(batch, "target_positions")]
    return hidden, objective.for_each_target(cross_entropy, targets, tensor(batch, "target_ids"))


@dataclass(frozen=True, kw_only=True)
class _Branches:
    """The answers that grow at the same time, side by side in the rows of their questions."""

    rows: Int[Tensor, "questions"]
    places: Int[Tensor, "questions"]
    """The position in its row that predicts the first token of each answer."""
    slots: Int[Tensor, "questions"]
    """Number of the question in its row."""
    seen: Bool[Tensor, "rows 1 width seq"]
    """Which tokens of the row an answer sees; a slot without a question sees what the row's first token sees."""
    depths: Int[Tensor, "rows width"]
    """Position of the last token before the answer."""

    @classmethod
    def after(
        cls, questions: Questions, position_ids: Int[Tensor, "rows seq"], subtree_end: Int[Tensor, "rows seq"]
    ) -> "_Branches":
        device = position_ids.device
        # Counted on the CPU, and copied at once: reading it from the device would wait for the prompts.
        counts = np.bincount(questions.rows, minlength=len(position_ids))
        # Questions come row by row; a rank without one still computes a slot, together with the others.
        numbers = np.arange(len(questions.rows)) - (counts.cumsum() - counts)[questions.rows]
        rows, places, slots = torch.from_numpy(np.stack([questions.rows, questions.places, numbers])).to(device)
        begin = torch.zeros((len(position_ids), max(1, int(counts.max()))), dtype=torch.int64, device=device)
        begin[rows, slots] = places
        keys = torch.arange(position_ids.shape[1], device=device)
        seen = sees(begin[:, None, :, None], keys, subtree_end[:, None, None, :])
        return cls(rows=rows, places=places, slots=slots, seen=seen, depths=position_ids.gather(1, begin))

    def laid_out(self, ids: Int[Tensor, "questions"]) -> Int[Tensor, "rows width"]:
        laid_out = torch.zeros_like(self.depths)
        laid_out[self.rows, self.slots] = ids
        return laid_out

    def mask(self, num_written: int) -> Bool[Tensor, "rows 1 width keys"]:
        """Each answer sees what its question sees, and its own tokens among those that were written side by side."""
        rows, width = self.depths.shape
        own = torch.eye(width, dtype=torch.bool, device=self.seen.device).repeat(1, num_written)
        return torch.cat([self.seen, own.expand(rows, 1, *own.shape)], dim=-1)


@contextmanager
def _masked_attention(objective: Objective) -> Iterator[None]:
    """In the block, a kernel that takes no mask for each pair of tokens is replaced by one that does."""
    config = objective.llava.model.language_model.config
    kept = compat.attention_kernel(config)
    if kept not in ("sdpa", "eager"):
        compat.set_attention_kernel(config, "sdpa")
    try:
        yield
    finally:
        compat.set_attention_kernel(config, kept)


def _attention(objective: Objective, mask: Bool[Tensor, "rows 1 some keys"]) -> Shaped[Tensor, "rows 1 some keys"]:
    """The mask in the form that the attention kernel takes: "eager" adds it to its scores."""
    if compat.attention_kernel(objective.llava.model.language_model.config) == "sdpa":
        return mask
    dtype = objective.llava.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _embeds(objective: Objective, batch: Loaded, blind: bool) -> Float[Tensor, "rows seq hidden"]:
    input_ids = tensor(batch, "input_ids")
    embeds = objective.llava.get_input_embeddings()(input_ids)
    # Also without images: ranks that share each weight run the same modules.
    features = objective.image_features(*(batch[name] for name in IMAGE_FIELDS))  # pyright: ignore[reportArgumentType]
    if blind:
        # Only an image's places hold this token, whatever the text is (`data/labels.py`).
        return embeds * (input_ids != objective.llava.config.image_token_index)[..., None]
    return place_features(embeds, features[tensor(batch, "image_index")], tensor(batch, "image_positions"))


def _best(objective: Objective, hidden: Float[Tensor, "questions hidden"]) -> Int[Tensor, "questions"]:
    logits = objective.logits(hidden)
    image_token_id = int(objective.llava.config.image_token_index)
    if image_token_id < logits.shape[1]:
        logits[:, image_token_id] = -torch.inf  # it is not a word
    return logits.argmax(-1)
