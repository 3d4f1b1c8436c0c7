"""Generated answers over a part of the data, sharded over ranks, scored, and put back into the order of the data."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from llava_accel.data.conversation import IMAGE
from llava_accel.data.labels import Example
from llava_accel.data.records import Record
from llava_accel.model.generate import build_prompts, generate
from llava_accel.model.objective import Objective
from llava_accel.run.backend import whole_root
from llava_accel.run.console import Bar
from llava_accel.run.datasets import Part
from llava_accel.run.scoring import exact_match, vqa_accuracy

Prediction = dict[str, object]


def answer(
    objective: Objective,
    part: Part,
    batches: Sequence[list[int]],
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    bar: Bar,
    *,
    max_new_tokens: int,
    blind: bool = False,
) -> list[Prediction]:
    """Answer every row of this rank's batches greedily and gather the predictions of all ranks.

    Args:
        batches: Rows of the corpus; ranks have the same number of batches, empty ones at the end.
        blind: Blank the pictures.

    Returns:
        {"id", "image", "question", "answers", "prediction", "score", ...} for each row once, in the order of the data.
    """
    found: list[tuple[int, Prediction]] = []
    with whole_root(objective):
        for batch in batches:
            examples = [part.corpus.encode(row).example for row in batch]
            texts = _generate(objective, part, examples, accelerator.device, tokenizer, max_new_tokens, blind)
            for row, example, text in zip(batch, examples, texts, strict=True):
                found.append((row, _prediction(part.corpus.record(row), example, text)))
            bar.advance()
    gathered: list[tuple[int, Prediction]] = gather_object(found) if accelerator.num_processes > 1 else found
    return [prediction for _, prediction in sorted(gathered, key=lambda pair: pair[0])]


def mean_scores(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Mean VQA accuracy and exact match, and the number of answers behind them."""
    means = {"num_answers": float(len(predictions))}
    for metric in ("vqa_accuracy", "exact_match"):
        scores = [float(str(prediction[metric])) for prediction in predictions]
        means[metric] = sum(scores) / max(1, len(scores))
    return means


def _generate(
    objective: Objective,
    part: Part,
    examples: Sequence[Example],
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    blind: bool,
) -> list[str]:
    if not examples and not objective.is_sharded:
        return []
    names = {name for example in examples for name in example.images}
    pictures = {name: part.pictures.load(Path(name)) for name in names}
    # An answer ends with the token that its template ends answers with, which a chat template may choose freely.
    stops = {int(example.input_ids[example.is_target][-1]) for example in examples}
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))  # pyright: ignore[reportArgumentType]
    prompts = build_prompts(examples, pictures, part.pictures.shape, device)
    answers = generate(objective, prompts, stop_ids=sorted(stops) or [0], max_new_tokens=max_new_tokens, blind=blind)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers[: len(examples)]]


def _prediction(record: Record, example: Example, text: str) -> Prediction:
    references = record.references()
    accuracy = vqa_accuracy(text, references)
    question = record.question or record.turns[-2].text.replace(IMAGE, "").strip()
    kinds = {"question_type": record.question_type, "answer_type": record.answer_type}
    return {
        "id": record.id,
        "image": list(record.images) if len(record.images) != 1 else record.images[0],
        "question": question,
        "answers": dict(record.answers) or {references[0]: 1},
        "prediction": text,
        "score": accuracy,
        "vqa_accuracy": accuracy,
        "exact_match": exact_match(text, references),
        **{key: value for key, value in kinds.items() if value},
    }
