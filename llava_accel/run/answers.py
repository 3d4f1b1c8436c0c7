"""Losses and generated answers over a part of the data, sharded over ranks, scored, and put back into its order."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llava_accel.data.answer_fields import option
from llava_accel.data.conversation import IMAGE
from llava_accel.data.questions import load_questions
from llava_accel.data.records import Record
from llava_accel.model.answering import answer_batch
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.run.backend import whole_root
from llava_accel.run.console import Bar
from llava_accel.run.datasets import Part
from llava_accel.run.scoring import SCORES, exact_match, vqa_accuracy

Prediction = dict[str, object]


def answer(
    objective: Objective,
    part: Part,
    batches: Sequence[list[int]],
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    bar: Bar,
    *,
    blind: bool = False,
) -> tuple[list[Prediction], float]:
    """Answer every row of this rank's batches greedily, and gather the predictions and the loss of all ranks.

    Args:
        batches: Rows of the corpus; ranks have the same number of batches, empty ones at the end.
        blind: Blank the pictures.

    Returns:
        {"id", "image", "question", "answers", "prediction", "score", "loss", ...} for each row once, in the order of the
        data, and the cross-entropy over all targets, in nats a target.
    """
    found: list[tuple[int, Prediction]] = []
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    questions = load_questions(
        part.corpus,
        part.pictures,
        batches,
        workers=recipe.data.workers,
        device=accelerator.device,
        max_length=recipe.data.max_length,
        blind=blind,
    )
    with whole_root(objective):
        for batch, asked in questions:
            stops = asked.stop_ids if tokenizer.eos_token_id is None else asked.stop_ids | {int(tokenizer.eos_token_id)}  # pyright: ignore[reportArgumentType]
            answered = answer_batch(
                objective,
                batch,
                asked,
                stop_ids=stops,
                max_new_tokens=recipe.eval.max_new_tokens,
                blind=blind,
                is_over=lambda mine: _everywhere(mine, objective, accelerator),
            )
            sums += torch.stack([answered.losses.double().sum(), sums.new_tensor(len(answered.losses))])
            losses = [float(part.mean()) for part in answered.losses.cpu().split(asked.num_targets.tolist())]
            for index, record, ids, loss in zip(asked.indices, asked.records, answered.ids, losses, strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                found.append((int(index), _prediction(record, text, loss)))
            bar.advance()
    gathered: list[tuple[int, Prediction]] = gather_object(found) if accelerator.num_processes > 1 else found
    total = accelerator.reduce(sums, reduction="sum")
    assert isinstance(total, Tensor)
    loss_sum, num_targets = total.tolist()
    return [prediction for _, prediction in sorted(gathered, key=lambda pair: pair[0])], loss_sum / num_targets


def mean_scores(predictions: Sequence[Prediction]) -> dict[str, float]:
    """The mean of each score over the predictions that have it, and the number of answers."""
    means = {"num_answers": float(len(predictions))}
    for metric in SCORES:
        scores = [float(str(prediction[metric])) for prediction in predictions if metric in prediction]
        if scores:
            means[metric] = sum(scores) / len(scores)
    return means


def _everywhere(mine: bool, objective: Objective, accelerator: Accelerator) -> bool:
    if not objective.is_sharded:
        return mine
    waiting = accelerator.reduce(torch.tensor(float(not mine), device=accelerator.device), reduction="sum")
    assert isinstance(waiting, Tensor)
    return not bool(waiting)


def _prediction(record: Record, text: str, loss: float) -> Prediction:
    references = record.references()
    scores = {"vqa_accuracy": vqa_accuracy(text, references), "exact_match": exact_match(text, references)}
    if record.choices:
        number = len(record.choices)
        scores["multiple_choice"] = float(option(text, number) == option(references[0], number))
    question = record.question or record.turns[-2].text.replace(IMAGE, "").strip()
    kinds = {"question_type": record.question_type, "answer_type": record.answer_type}
    return {
        "id": record.id,
        "image": list(record.images) if len(record.images) != 1 else record.images[0],
        "question": question,
        "answers": dict(record.answers) or {references[0]: 1},
        "prediction": text,
        "score": scores.get("multiple_choice", scores["vqa_accuracy"]),
        **scores,
        "loss": round(loss, 6),
        **{key: value for key, value in kinds.items() if value},
    }
