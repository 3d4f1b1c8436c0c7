"""One pass over held-out data (or some training data): losses and answers, sharded over ranks, scored, and written."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llava_accel.console.output import Bar
from llava_accel.data.conversation import IMAGE
from llava_accel.data.questions import image_batches, load_questions
from llava_accel.data.records import Record, option
from llava_accel.inference.answering import answer_batch
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import autocast, whole_root
from llava_accel.runtime.signals import NEVER, CheckedBar, Interruption
from llava_accel.scoring.metrics import SCORES, exact_match, vqa_accuracy
from llava_accel.setup.datasets import Part
from llava_accel.storage.jsonl import write_json_lines

Prediction = dict[str, object]


def answer(
    run: RunContext,
    objective: Objective,
    part: Part,
    batches: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    bar: Bar,
    *,
    blind: bool = False,
) -> tuple[list[Prediction], float]:
    """Answer every row of this rank's batches greedily, and gather the predictions and the loss of all ranks.

    Args:
        batches: Rows of the corpus; ranks have the same number of batches, empty ones at the end.
        blind: Blank the images.

    Returns:
        {"id", "image", "question", "answers", "prediction", "score", "loss", ...} for each row once, in the order of the
        data, and the cross-entropy over all targets, in nats a target.
    """
    recipe, accelerator, device = run.recipe, run.accelerator, run.accelerator.device
    mine: list[tuple[int, Prediction]] = []
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    own_stop = frozenset() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}  # pyright: ignore[reportArgumentType]
    workers, max_length = recipe.data.num_workers, recipe.data.max_length
    questions = load_questions(
        part.corpus, part.image_reader, batches, workers=workers, device=device, max_length=max_length, blind=blind
    )
    with whole_root(objective):
        for batch, asked in questions:
            answered = answer_batch(
                objective,
                batch,
                asked,
                stop_ids=asked.stop_ids | own_stop,
                max_new_tokens=recipe.eval.max_new_tokens,
                blind=blind,
                is_over=lambda is_done: _everywhere(is_done, objective, accelerator),
            )
            sums += torch.stack([answered.losses.double().sum(), sums.new_tensor(len(answered.losses))])
            losses = [float(part.mean()) for part in answered.losses.cpu().split(asked.num_targets.tolist())]
            for index, record, ids, loss in zip(asked.indices, asked.records, answered.ids, losses, strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                mine.append((int(index), _prediction(record, text, loss)))
            bar.advance()
    gathered: list[tuple[int, Prediction]] = gather_object(mine) if accelerator.num_processes > 1 else mine
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


def _everywhere(is_done: bool, objective: Objective, accelerator: Accelerator) -> bool:
    if not objective.is_sharded:
        return is_done
    waiting = accelerator.reduce(torch.tensor(float(not is_done), device=accelerator.device), reduction="sum")
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


@dataclass
class Evaluation:
    """The same on every rank."""

    metrics: dict[str, float]
    """"loss", and with generation "vqa_accuracy", "exact_match", "num_answers" and the same for blanked images."""
    predictions: list[Prediction] = field(default_factory=list)
    """One for each row that was answered, in the order of the data."""
    seconds: float = 0.0
    """What all of it took."""

    @property
    def answers_per_s(self) -> float:
        """Answers a second over all ranks, those without an image among them."""
        return (self.metrics["num_answers"] + self.metrics.get("blind_num_answers", 0.0)) / self.seconds

    @property
    def summary(self) -> str:
        """The metrics in one line: losses as they are, scores in percent."""
        metrics = self.metrics
        parts = [f"evaluation loss {metrics['loss']:.4f}"]
        for name, title in SCORES.items():
            if name in metrics:
                blind = metrics.get(f"blind_{name}")
                beside = f" (blind {100 * blind:.1f} %)" if blind is not None else ""
                parts.append(f"{title} {100 * metrics[name]:.1f} %{beside}")
        if "num_answers" in metrics:
            parts.append(f"{round(metrics['num_answers']):,} answers, {self.answers_per_s:,.0f} a second")
        return ", ".join(parts)


def evaluate(
    run: RunContext,
    model: nn.Module,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    interruption: Interruption = NEVER,
) -> Evaluation:
    """Loss and generated answers over (at most eval.limit of) the evaluation data, sharded over ranks.

    Args:
        model: The objective, prepared or not. Its mode is restored.

    Raises:
        Interrupted: the process was asked to end meanwhile; on every rank.
    """
    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    objective = accelerator.unwrap_model(model)
    assert isinstance(objective, Objective)
    was_training, since = model.training, time.perf_counter()
    model.eval()
    rows = choose_rows(part.rows, recipe.eval.limit, recipe.run.seed)
    blind_rows = choose_rows(rows, recipe.eval.blind_limit, recipe.run.seed) if recipe.eval.blind_limit else rows[:0]
    batches, blind_batches = (_batches(some, part, recipe, accelerator) for some in (rows, blind_rows))
    number = len(batches) + len(blind_batches)
    with torch.no_grad(), autocast(recipe, accelerator), console.bar("evaluate", number) as plain_bar:
        bar = CheckedBar(plain_bar, interruption, accelerator)
        predictions, loss = answer(run, objective, part, batches, tokenizer, bar)
        metrics = {"loss": loss, **mean_scores(predictions)}
        if len(blind_rows):
            blind, _ = answer(run, objective, part, blind_batches, tokenizer, bar, blind=True)
            metrics |= {f"blind_{name}": value for name, value in mean_scores(blind).items()}
    model.train(was_training)
    return Evaluation(metrics, predictions, time.perf_counter() - since)


def choose_rows(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """All rows, or `limit` of them drawn with the run's seed; the same at every evaluation."""
    if not limit or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng((seed, len(rows))).choice(rows, size=limit, replace=False))


def write_predictions(path: Path, predictions: Sequence[Prediction]) -> None:
    """One JSON object a line."""
    write_json_lines(predictions, path)


def _batches(rows: np.ndarray, part: Part, recipe: Recipe, accelerator: Accelerator) -> list[list[int]]:
    """This rank's batches. All ranks get the same number: backends that gather weights need every rank every time."""
    size = 2 * recipe.train.per_device_batch_size  # no gradients are kept, so more fits than in training
    batches = image_batches(rows, part.survey.lengths[rows], part.survey.image_keys[rows], size)
    batches += [[] for _ in range(-len(batches) % accelerator.num_processes)]
    return batches[accelerator.process_index :: accelerator.num_processes]


FILE = "training.jsonl"  # in the folder of predictions


def score_training(run: RunContext, model: nn.Module, part: Part, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answer eval.train_limit training examples, drawn with the run's seed. Every rank must call it.

    The report shows those with the highest loss: they often have a wrong label.
    """
    limits = {"limit": run.recipe.eval.train_limit, "blind_limit": 0}
    recipe = run.recipe.model_copy(update={"eval": run.recipe.eval.model_copy(update=limits)})
    scored = evaluate(replace(run, recipe=recipe), model, part, tokenizer)
    if run.accelerator.is_main_process:
        write_predictions(Path(recipe.run.output_dir) / "predictions" / FILE, scored.predictions)
