"""Memory of an evaluation, which generates answers, and how many questions fit into it at once."""

from dataclasses import replace

import torch
from transformers import DynamicCache

from llava_accel.data.loader import Loaded, tensor
from llava_accel.data.questions import Questions, image_batches, load_questions
from llava_accel.estimate.flops import head_width
from llava_accel.estimate.peak_memory import Plan, plan_run
from llava_accel.estimate.trace import Moment, build_meta, by_sharing, highest, traced
from llava_accel.inference.answering import read_prompts
from llava_accel.model.precision import computed_in
from llava_accel.model.processing import Processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.devices import total_bytes
from llava_accel.runtime.engines import is_sharded, resolve_precision
from llava_accel.scoring.held_out import most_at_once
from llava_accel.setup.datasets import Part


def questions_at_once(run: RunContext, processing: Processing, part: Part, *, trains: bool = True) -> int:
    """How many of the part's questions a GPU can answer at once, by the plan; at least 1. On a CPU nothing is planned.

    Args:
        trains: Whether the optimizer's state is in memory as well.
    """
    recipe, accelerator = run.recipe, run.accelerator
    if accelerator.device.type == "cpu":
        return most_at_once(recipe)
    dtype, shares = resolve_precision(recipe.run.precision, accelerator.device), is_sharded(accelerator)
    plan, _ = plan_run(run, processing, ())
    moments = trace_evaluation(recipe, processing, part, dtype)[shares]
    planned = plan_answers(plan, moments, trains=trains)
    return max(1, answered_at_once(planned, total_bytes(accelerator.device), recipe))


def answered_at_once(planned: Plan, gpu_bytes: float, recipe: Recipe) -> int:
    """How many questions such a GPU answers at once, if `planned` is for `most_at_once`; 0 if not one fits."""
    most = most_at_once(recipe)
    return min(most, planned.largest_batch(gpu_bytes, most))


def plan_answers(plan: Plan, moments: tuple[Moment, ...], *, trains: bool = True) -> Plan:
    """The memory of an evaluation, which has no gradients, from `plan`: that of a step of the same run."""
    optimizer = plan.optimizer if trains else 0
    return replace(plan, optimizer=optimizer, gradients=0, update=0, moments=moments)


def trace_evaluation(
    recipe: Recipe, processing: Processing, part: Part, dtype: torch.dtype
) -> dict[bool, tuple[Moment, ...]]:
    """The moments of an evaluation that can be the peak (`trace_answers`), by whether ranks share each weight."""
    batches = largest_questions(recipe, part)
    most = max(len(tensor(batch, "target_ids")) for batch, _ in batches)

    def trace(shares: bool) -> tuple[Moment, ...]:
        traced = [trace_answers(recipe, processing, *each, dtype, shares) for each in batches]
        return highest(moment for moments in traced for moment in moments)

    return by_sharing(most, processing, trace)


def largest_questions(recipe: Recipe, part: Part) -> list[tuple[Loaded, Questions]]:
    """The first batch of an evaluation, which has most tokens, and the one with most tiles if that has more tiles."""
    survey, rows = part.survey, part.rows
    batches = image_batches(rows, survey.lengths[rows], survey.image_keys[rows], most_at_once(recipe))
    tiles = [_num_tiles(part, batch) for batch in batches]
    most = max(range(len(batches)), key=tiles.__getitem__)
    loaded = load_questions(
        part.corpus,
        part.image_reader,
        [batches[0], batches[most]] if tiles[most] > tiles[0] else [batches[0]],
        workers=0,
        device=torch.device("cpu"),
        max_length=recipe.data.max_length,
    )
    return list(loaded)


def _num_tiles(part: Part, batch: list[int]) -> int:
    """Tiles of a batch's distinct images."""
    return sum({part.survey.image_keys[row]: int(part.survey.num_tiles[row]) for row in batch}.values())


def trace_answers(
    recipe: Recipe, processing: Processing, batch: Loaded, questions: Questions, dtype: torch.dtype, shares: bool
) -> tuple[Moment, ...]:
    """The moments of an evaluation of this batch that can be the peak: while the prompts are read, and at the last token.

    Args:
        batch: A real one; only its shapes count.
        dtype: The type that is computed in.
        shares: Whether ranks share each weight; all logits are then made at once.
    """
    model = build_meta(recipe, processing, dtype).eval()
    with (
        torch.no_grad(),
        computed_in(dtype, torch.device("cpu")),
        traced(model, recipe, processing, batch, dtype, shares) as (objective, fields, ledger),
    ):
        read_prompts(objective, fields, DynamicCache())
    rows, seq = fields["input_ids"].shape
    return (*highest(ledger.moments), _last_token(recipe, processing, questions, int(rows), int(seq), dtype))


def _last_token(
    recipe: Recipe, processing: Processing, questions: Questions, rows: int, seq: int, dtype: torch.dtype
) -> Moment:
    """The moment at which all keys and values are there: answers grow side by side in the rows of their questions."""
    text, size = processing.base.text, dtype.itemsize
    widest = int(max(((questions.rows == row).sum() for row in set(questions.rows.tolist())), default=1))
    tokens = rows * (seq + recipe.eval.max_new_tokens * widest)
    head = head_width(text)
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    kept = 2 * tokens * text.num_hidden_layers * shared * head * size
    # A layer's keys are joined with the new ones; then keys and values are repeated for the heads that share them.
    at_work = tokens * head * size * (2 * heads if heads > shared else shared)
    logits = len(questions.rows) * processing.num_rows * (4 + size)
    return Moment(activations=kept + at_work, logits=logits)
