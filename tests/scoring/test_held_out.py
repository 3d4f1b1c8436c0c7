"""Evaluation gives the plain loss and the plain greedy answers, whatever the batches they are computed in."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from helpers.runs import PARITY, mixed_records, recipe, talk, write_records
from llava_accel.console.output import Console
from llava_accel.data.labels import Example
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.scoring import held_out
from llava_accel.scoring.held_out import AtOnce, Evaluation, answer, choose_rows, evaluate
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, open_data

TOKENS = 6


@dataclass(frozen=True)
class Ready:
    """A model and data to evaluate it on."""

    recipe: Recipe
    objective: Objective
    part: Part
    other: Part
    """The same records with other images."""
    processing: Processing

    def evaluate(self, **keys: object) -> Evaluation:
        """Evaluate with other keys of [eval]."""
        changed = self.recipe.model_copy(update={"eval": self.recipe.eval.model_copy(update=keys)})
        accelerator, tokenizer = build_accelerator(changed), self.processing.processor.tokenizer
        return evaluate(RunContext(changed, accelerator, Console(False)), self.objective, self.part, tokenizer)

    def prompt(self, row: int) -> tuple[Example, dict[str, Tensor]]:
        """A row as transformers takes it, images included."""
        example = self.part.corpus.encode(row).example
        images = [self.part.image_reader(view) for view in example.images]
        return example, {"pixel_values": torch.cat(images)} if images else {}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """The parity base with an adapter; its answers depend on words and images."""
    folder = tmp_path_factory.mktemp("evaluation")
    records: list[dict[str, Any]] = [*mixed_records(9), talk("long", "What do you see? " * 5, "a word", "t2.png")]
    records.append(talk("short", "A?", "b"))
    swapped = {f"t{number}.png": f"t{(number + 3) % 8}.png" for number in range(8)}
    others = [{**record, "image": [swapped[name] for name in record.get("image", [])]} for record in records]
    settings = recipe(
        folder,
        write_records(folder / "others.json", others),
        model={"adapter": str(PARITY / "adapter_init")},
        data={"eval": str(write_records(folder / "data.json", records)), "cache_features": False},
        train={"per_device_batch_size": 2},
        eval={"max_new_tokens": TOKENS, "blind_limit": 0},
    )
    run = RunContext(settings, build_accelerator(settings), Console(False))
    processing = load_processing(settings.model, settings.data.image_aspect)
    other, part = open_data(run, processing)
    assert part is not None
    objective, _ = build_objective(run, processing)
    with torch.no_grad():
        objective.llava.model.multi_modal_projector.linear_2.weight.mul_(30)
    return Ready(settings, objective.eval(), part, other, processing)


def _plain_answer(ready: Ready, row: int) -> str:
    """One prompt at a time, as anyone would with transformers alone."""
    llava = ready.objective.llava
    example, pixels = ready.prompt(row)
    ids = torch.from_numpy(example.input_ids[: example.prompt_length()])[None]
    never = list(range(ready.objective.vocab_size, llava.lm_head.out_features))
    config = GenerationConfig(max_new_tokens=TOKENS, eos_token_id=2, pad_token_id=0, suppress_tokens=never)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        answer = llava.generate(**inputs, generation_config=config)  # pyright: ignore[reportAttributeAccessIssue]
    new = answer[0, ids.shape[1] :]
    return ready.processing.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_answers_are_those_of_one_prompt_at_a_time(ready: Ready) -> None:
    answers = [row["prediction"] for row in ready.evaluate().predictions]
    assert answers == [_plain_answer(ready, int(row)) for row in ready.part.rows]
    assert len(set(answers)) > len(answers) // 2, "the model must not answer all alike"


def test_the_batches_are_padded_and_mixed(ready: Ready) -> None:
    lengths = ready.part.survey.lengths
    assert len(set(lengths.tolist())) > 4 and len(lengths) > 2 * 2 * ready.recipe.train.per_device_batch_size
    images = ready.part.survey.num_images
    assert {0, 1, 2} == set(images.tolist())


def test_the_loss_is_the_plain_one(ready: Ready) -> None:
    total, count = 0.0, 0
    for row in ready.part.rows:
        example, pixels = ready.prompt(int(row))
        ids = torch.from_numpy(example.input_ids)[None]
        with torch.no_grad():
            logits = ready.objective.llava(input_ids=ids, **pixels).logits[0, :-1, : ready.objective.vocab_size]
        targets = torch.from_numpy(example.is_target)[1:]
        total += F.cross_entropy(logits[targets], ids[0, 1:][targets], reduction="sum").item()
        count += int(targets.sum())
    assert ready.evaluate().metrics["loss"] == pytest.approx(total / count, rel=1e-5)


def test_every_row_is_answered_once_in_the_order_of_the_data(ready: Ready) -> None:
    found = ready.evaluate()
    assert [row["id"] for row in found.predictions] == [
        ready.part.corpus.record(int(row)).id for row in ready.part.rows
    ]
    assert found.metrics["num_answers"] == len(ready.part)


def test_a_limit_draws_the_same_rows_each_time(ready: Ready) -> None:
    first, second = (ready.evaluate(limit=4, max_new_tokens=1) for _ in range(2))
    assert [row["id"] for row in first.predictions] == [row["id"] for row in second.predictions]
    assert first.metrics == second.metrics and len(first.predictions) == 4
    rows = np.arange(100)
    assert choose_rows(rows, 10, 1).tolist() != choose_rows(rows, 10, 2).tolist()
    assert choose_rows(rows, 10, 1).tolist() == sorted(set(choose_rows(rows, 10, 1).tolist()))
    assert choose_rows(rows, 0, 1) is rows and choose_rows(rows, 100, 1) is rows


def _answers(ready: Ready, part: Part, blind: bool) -> list[object]:
    tokenizer, rows = ready.processing.processor.tokenizer, part.rows.tolist()
    run = RunContext(ready.recipe, build_accelerator(ready.recipe), Console(False))
    with run.console.bar("answer", 1) as bar:
        batches = [rows[::2], rows[1::2]]
        found, _ = answer(run, ready.objective, part, batches, tokenizer, bar, AtOnce(len(rows)), blind=blind)
    return [row["prediction"] for row in found]


def test_a_blind_answer_ignores_the_image_and_another_does_not(ready: Ready) -> None:
    assert _answers(ready, ready.part, blind=True) == _answers(ready, ready.other, blind=True)
    seeing = _answers(ready, ready.part, blind=False)
    assert seeing != _answers(ready, ready.other, blind=False) and seeing != _answers(ready, ready.part, blind=True)


def test_the_blind_score_is_over_a_part_of_the_answered_rows(ready: Ready) -> None:
    metrics = ready.evaluate(limit=5, blind_limit=3, max_new_tokens=1).metrics
    assert (metrics["num_answers"], metrics["blind_num_answers"]) == (5, 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(ready: Ready, training: bool) -> None:
    ready.objective.train(training)
    ready.evaluate(limit=1, max_new_tokens=1)
    assert all(module.training is training for module in ready.objective.modules())
    ready.objective.eval()


def test_evaluation_leaves_no_gradient_and_no_change(ready: Ready) -> None:
    before = {name: tensor.clone() for name, tensor in ready.objective.state_dict().items()}
    ready.evaluate(limit=2)
    assert all(parameter.grad is None for parameter in ready.objective.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in ready.objective.state_dict().items())


class _Small:
    """A memory that holds so many questions and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.tried: list[int] = []
        compute = held_out.answer_batch

        def limited(objective: Objective, batch: Any, asked: Any, **settings: Any) -> Any:
            self.tried.append(len(asked.indices))
            if len(asked.indices) > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return compute(objective, batch, asked, **settings)

        monkeypatch.setattr(held_out, "answer_batch", limited)


@pytest.fixture(scope="module")
def expected(ready: Ready) -> Evaluation:
    """With memory enough."""
    return ready.evaluate(blind_limit=3)


@pytest.mark.parametrize("room", [1, 2, 3])
def test_out_of_memory_halves_the_batches_and_every_answer_stays(
    ready: Ready, expected: Evaluation, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    memory = _Small(monkeypatch, room)
    found = ready.evaluate(blind_limit=3)
    assert [row["prediction"] for row in found.predictions] == [row["prediction"] for row in expected.predictions]
    assert [row["id"] for row in found.predictions] == [row["id"] for row in expected.predictions]
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
    failed = [size for size in memory.tried if size > room]
    assert failed and len(failed) <= 2, "a size that failed is not tried again"


def test_the_number_that_memory_holds_is_kept_for_the_next_evaluation(
    ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, at_once = _Small(monkeypatch, 2), AtOnce(4)
    run = RunContext(ready.recipe, build_accelerator(ready.recipe), Console(False))
    for _ in range(2):
        memory.tried.clear()
        evaluate(run, ready.objective, ready.part, ready.processing.processor.tokenizer, at_once=at_once)
    assert at_once.number == 2 and max(memory.tried) == 2


def test_one_question_too_many_is_an_error(ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    _Small(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        ready.evaluate()


def test_the_base_is_scored_on_some_of_the_rows_of_later_evaluations(ready: Ready) -> None:
    run = RunContext(ready.recipe, build_accelerator(ready.recipe), Console(False))
    limited = ready.recipe.model_copy(update={"eval": ready.recipe.eval.model_copy(update={"limit": 6})})
    run, tokenizer = RunContext(limited, run.accelerator, run.console), ready.processing.processor.tokenizer
    some, later = (
        {str(row["id"]) for row in evaluate(run, ready.objective, ready.part, tokenizer, at_most=at_most).predictions}
        for at_most in (3, 0)
    )
    assert len(some) == 3 and some < later and len(later) == 6


def test_an_evaluation_is_one_line_of_at_most_80_columns_with_its_comparisons() -> None:
    metrics = {"loss": 0.91234, "num_answers": 500.0, "vqa_accuracy": 0.612, "exact_match": 0.5}
    metrics |= {"blind_vqa_accuracy": 0.321, "common_vqa_accuracy": 0.203, "blind_num_answers": 100.0}
    found = Evaluation(metrics)
    line = found.line(1200, "loss", True)
    assert line == "step 1,200: loss 0.9123, VQA accuracy 61.2 % (blind 32.1, commonest 20.3), best"
    assert found.line(0, "exact_match", False) == "before training: loss 0.9123, exact match 50.0 %"
    assert found.line(3, "multiple_choice", False) == "step 3: loss 0.9123"
    long = found.line(123_456, "loss", True)
    assert long == "step 123,456: loss 0.9123, VQA accuracy 61.2 % (blind 32.1), best" and len(line) <= 80


def test_all_that_was_measured_is_said_a_line_each() -> None:
    metrics = {"loss": 0.5, "num_answers": 8.0, "vqa_accuracy": 0.25, "exact_match": 0.5, "blind_exact_match": 0.125}
    metrics |= {"low_blind_exact_match": 0.1, "high_blind_exact_match": 0.16}
    assert Evaluation(metrics, seconds=2.0).summary == [
        "evaluation loss 0.5000",
        "VQA accuracy 25.0 %",
        "exact match 50.0 % (blind 12.5 ± 3.0 %)",
        "8 answers, 4 a second",
    ]
