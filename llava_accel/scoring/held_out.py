"""One pass over held-out data (or some training data): losses and answers, sharded over ranks, scored, and written."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, release_memory
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llava_accel.console.output import Bar
from llava_accel.data.loader import Loaded
from llava_accel.data.questions import Questions, load_questions
from llava_accel.data.records import Record, described
from llava_accel.inference.answering import Answered, answer_batch
from llava_accel.model.objective import Objective
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import autocast, whole_root
from llava_accel.runtime.signals import NEVER, CheckedBar, Interruption
from llava_accel.scoring.metrics import Prediction, main_score, measure, score_names, score_title, with_interval
from llava_accel.scoring.objective_loss import objective_scores
from llava_accel.setup.datasets import Part
from llava_accel.setup.micro_batches import own_batches
from llava_accel.storage.jsonl import write_json_lines

_COLUMNS = 80  # of a line
_Loaded = TypeVar("_Loaded")
_Found = TypeVar("_Found")


@dataclass
class AtOnce:
    """How many questions are answered at once. An evaluation that runs out of memory goes on with half as many."""

    number: int
    halves: bool = True
    """False where ranks run every module together: then no rank can go on with halves on its own."""


def answer(
    run: RunContext,
    objective: Objective,
    part: Part,
    batches: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    bar: Bar,
    at_once: AtOnce,
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
    max_length = recipe.data.max_length

    def load(batches: Sequence[list[int]], workers: int) -> Iterator[tuple[Loaded, Questions]]:
        return load_questions(
            part.corpus, part.image_reader, batches, workers=workers, device=device, max_length=max_length, blind=blind
        )

    def compute(loaded: tuple[Loaded, Questions]) -> tuple[Questions, Answered]:
        batch, asked = loaded
        return asked, answer_batch(
            objective,
            batch,
            asked,
            stop_ids=asked.stop_ids | own_stop,
            max_new_tokens=recipe.eval.max_new_tokens,
            blind=blind,
            is_over=lambda is_done: _everywhere(is_done, objective, accelerator),
        )

    def keep(asked: Questions, answered: Answered) -> None:
        loss_sum = answered.losses.double().sum()
        sums.add_(torch.stack([loss_sum, torch.full_like(loss_sum, len(answered.losses))]))
        losses = [float(part.mean()) for part in answered.losses.cpu().split(asked.num_targets.tolist())]
        for index, record, ids, loss in zip(asked.indices, asked.records, answered.ids, losses, strict=True):
            text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            mine.append((int(index), _prediction(record, text, loss)))

    with whole_root(objective):
        for rows, loaded in zip(batches, load(batches, recipe.data.num_workers), strict=True):
            for asked, answered in in_parts(rows, loaded, compute, lambda half: next(load([half], 0)), at_once):
                keep(asked, answered)
            bar.advance()
    gathered: list[tuple[int, Prediction]] = gather_object(mine) if accelerator.num_processes > 1 else mine
    total = accelerator.reduce(sums, reduction="sum")
    assert isinstance(total, Tensor)
    loss_sum, num_targets = total.tolist()
    return [prediction for _, prediction in sorted(gathered, key=lambda pair: pair[0])], loss_sum / num_targets


def in_parts(
    rows: list[int],
    loaded: _Loaded,
    compute: Callable[[_Loaded], _Found],
    load: Callable[[list[int]], _Loaded],
    at_once: AtOnce,
) -> Iterator[_Found]:
    """The results of `compute` for a batch, or, where memory does not hold it, for its halves one after the other.

    Raises:
        torch.OutOfMemoryError: memory does not hold a single row.
    """
    if len(rows) <= at_once.number:
        try:
            result = compute(loaded)
        except torch.OutOfMemoryError:
            if len(rows) <= 1 or not at_once.halves:
                raise
            at_once.number = len(rows) // 2
        else:
            yield result
            return
    del loaded
    release_memory()
    middle = len(rows) // 2
    for half in (rows[:middle], rows[middle:]):
        yield from in_parts(half, load(half), compute, load, at_once)


def _everywhere(is_done: bool, objective: Objective, accelerator: Accelerator) -> bool:
    if not objective.is_sharded:
        return is_done
    waiting = accelerator.reduce(torch.tensor(float(not is_done), device=accelerator.device), reduction="sum")
    assert isinstance(waiting, Tensor)
    return not bool(waiting)


def _prediction(record: Record, text: str, loss: float) -> Prediction:
    kinds = {"question_type": record.question_type, "answer_type": record.answer_type}
    kinds |= {"num_choices": len(record.choices), "rejected": record.rejected}
    return {
        **described(record),
        "prediction": text,
        "loss": round(loss, 6),
        **{key: value for key, value in kinds.items() if value},
    }


@dataclass
class Evaluation:
    """What was measured, the same on every rank."""

    metrics: dict[str, float]
    """"loss" (also "answer_loss" where the objective is another), "num_answers", and scores under their names, with those of
    blanked images ("blind_..."), of the commonest answer ("common_..."), and the ends of their 95 % intervals ("low_...",
    "high_...")."""
    predictions: list[Prediction] = field(default_factory=list)
    """One for each row that was answered, in the order of the data."""
    seconds: float = 0.0
    """Wall-clock time of the whole evaluation."""

    @property
    def answers_per_s(self) -> float:
        """Answers a second over all ranks, those to blanked images included."""
        return (self.metrics["num_answers"] + self.metrics.get("blind_num_answers", 0.0)) / self.seconds

    @property
    def summary(self) -> list[str]:
        """All metrics, one a line: losses as they are, scores in percent."""
        metrics = self.metrics
        parts = [f"evaluation loss {metrics['loss']:.4f}"]
        parts += [self._score(name, {"blind": "blind", "commonest answer": "common"}) for name in score_names(metrics)]
        if "num_answers" in metrics:
            parts.append(f"{round(metrics['num_answers']):,} answers, {self.answers_per_s:,.0f} a second")
        return parts

    def line(self, step: int, metric: str, is_best: bool) -> str:
        """The main result, in 80 columns: the loss, and the `main_score`. The scores that it is compared with are left out
        where there is no room.

        Args:
            is_best: Whether no earlier evaluation of the run was as good.
        """
        start = f"{f'step {step:,}' if step else 'before training'}: loss {self.metrics['loss']:.4f}"
        end, score = ", best" if is_best else "", main_score(metric, self.metrics)
        if score is None:
            return f"{start}{end}"
        others = {"blind": "blind", "commonest": "common"}
        while len(line := f"{start}, {self._score(score, others, is_short=True)}{end}") > _COLUMNS and others:
            others.popitem()
        return line

    def _score(self, name: str, others: Mapping[str, str], *, is_short: bool = False) -> str:
        """A score, and in brackets those of `others` (title -> what its key begins with) that were measured; if it
        `is_short`, these without interval and unit."""
        metrics = self.metrics
        measured = {title: key for title, kind in others.items() if (key := f"{kind}_{name}") in metrics}
        beside = ", ".join(
            f"{title} {f'{100 * metrics[key]:.1f}' if is_short else with_interval(metrics, key)}"
            for title, key in measured.items()
        )
        return f"{score_title(name)} {with_interval(metrics, name)}{f' ({beside})' if beside else ''}"


def evaluate(
    run: RunContext,
    model: nn.Module,
    part: Part,
    tokenizer: PreTrainedTokenizerBase,
    interruption: Interruption = NEVER,
    at_once: AtOnce | None = None,
    at_most: int = 0,
) -> Evaluation:
    """Loss and generated answers over (at most eval.limit of) the evaluation data, sharded over ranks.

    Args:
        model: The objective, prepared or not. Its mode is restored.
        at_once: Is lowered where memory does not hold so many questions.
        at_most: Answer at most this many of them; 0 = all.

    Raises:
        Interrupted: the process was asked to end meanwhile; on every rank.
        torch.OutOfMemoryError: memory does not hold one question.
    """
    recipe, accelerator, console = run.recipe, run.accelerator, run.console
    objective = accelerator.unwrap_model(model)
    assert isinstance(objective, Objective)
    was_training, since = model.training, time.perf_counter()
    model.eval()
    at_once = at_once or AtOnce(most_at_once(recipe))
    at_once.halves = not objective.is_sharded
    planned = at_once.number = _least(at_once.number, accelerator)
    rows = choose_rows(choose_rows(part.rows, recipe.eval.limit, recipe.run.seed), at_most, recipe.run.seed)
    blind_rows = choose_rows(rows, recipe.eval.blind_limit, recipe.run.seed) if recipe.eval.blind_limit else rows[:0]
    batches, blind_batches = (own_batches(some, part, planned, accelerator) for some in (rows, blind_rows))
    number = len(batches) + len(blind_batches)
    with torch.no_grad(), autocast(recipe, accelerator), console.bar("evaluate", number) as plain_bar:
        bar = CheckedBar(plain_bar, interruption, accelerator)
        predictions, loss = answer(run, objective, part, batches, tokenizer, bar, at_once)
        metrics = {"loss": loss, **scores(predictions, recipe)}
        if recipe.train.objective != "answers":
            some = own_batches(rows, part, recipe.train.per_device_batch_size, accelerator)
            metrics |= {"answer_loss": loss} | objective_scores(run, objective, part, some, predictions)
        if len(blind_rows):
            blind, _ = answer(run, objective, part, blind_batches, tokenizer, bar, at_once, blind=True)
            metrics |= scores(blind, recipe, blind=True)
    if at_once.number < planned:
        console.line(f"evaluation: out of memory with {planned} questions at once; it went on with {at_once.number}")
    model.train(was_training)
    return Evaluation(metrics, predictions, time.perf_counter() - since)


def scores(predictions: Sequence[Prediction], recipe: Recipe, *, blind: bool = False) -> dict[str, float]:
    """The number of answers, and their scores, see `measure`. Each answer's own scores are put into its row, the main one
    also as "score"."""
    measured, prefix = measure(predictions, recipe.eval.measured, blind=blind), "blind_" if blind else ""
    main = main_score(recipe.eval.metric, {key.removeprefix(prefix) for key in measured})
    for row in predictions:
        row["score"] = next((row[name] for name in (main, *score_names(row)) if name in row), 0.0)
    return {f"{prefix}num_answers": float(len(predictions)), **measured}


def choose_rows(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """All rows, or `limit` of them drawn with the run's seed; the same at every evaluation."""
    if not limit or limit >= len(rows):
        return rows
    return np.sort(np.random.default_rng((seed, len(rows))).choice(rows, size=limit, replace=False))


def most_at_once(recipe: Recipe) -> int:
    """Questions that are answered at once where memory holds them: no gradients are kept, so more fits than in training."""
    return 2 * recipe.train.per_device_batch_size


def _least(number: int, accelerator: Accelerator) -> int:
    """The smallest of the ranks' numbers: their batches must be the same."""
    if accelerator.num_processes == 1:
        return number
    numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
    assert isinstance(numbers, Tensor)
    return int(numbers.min())


FILE = "training.jsonl"  # in the folder of predictions


def score_training(
    run: RunContext, model: nn.Module, part: Part, tokenizer: PreTrainedTokenizerBase, at_once: AtOnce
) -> None:
    """Answer eval.train_limit training examples, drawn with the run's seed. Every rank must call it.

    The report shows those with the highest loss: they often have a wrong label.
    """
    limits = {"limit": run.recipe.eval.train_limit, "blind_limit": 0}
    recipe = run.recipe.model_copy(update={"eval": run.recipe.eval.model_copy(update=limits)})
    scored = evaluate(replace(run, recipe=recipe), model, part, tokenizer, at_once=at_once)
    if run.accelerator.is_main_process:
        write_json_lines(scored.predictions, Path(recipe.run.output_dir) / "predictions" / FILE)
