"""Memory of an evaluation, which generates answers, and how many questions fit into it at once."""

from dataclasses import replace

import torch
from transformers import DynamicCache

from llava_accel.data.loader import Loaded
from llava_accel.data.questions import Questions, image_batches, load_questions
from llava_accel.estimate.peak_memory import Plan, plan_run
from llava_accel.estimate.trace import Moment, build_meta, highest, traced
from llava_accel.inference.answering import read_prompts
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
        trains: Whether the optimizer's state is there as well.
    """
    recipe, accelerator = run.recipe, run.accelerator
    if accelerator.device.type == "cpu":
        return most_at_once(recipe)
    dtype, shares = resolve_precision(recipe.run.precision, accelerator.device), is_sharded(accelerator)
    plan, _ = plan_run(run, processing, ())
    moments = trace_answers(recipe, processing, *largest_questions(recipe, part), dtype, shares)
    return fitting(plan_answers(plan, moments, trains=trains), total_bytes(accelerator.device), recipe)


def fitting(planned: Plan, gpu_bytes: float, recipe: Recipe) -> int:
    """Questions at once on such a GPU, if `planned` is for `most_at_once`; at least 1, which is then tried."""
    most = most_at_once(recipe)
    return max(1, min(most, planned.largest_batch(gpu_bytes, most)))


def plan_answers(plan: Plan, moments: tuple[Moment, ...], *, trains: bool = True) -> Plan:
    """The memory of an evaluation in a run of which `plan` is the memory of a step: there are no gradients."""
    optimizer = plan.optimizer if trains else 0
    return replace(plan, optimizer=optimizer, gradients=0, update=0, moments=moments)


def largest_questions(recipe: Recipe, part: Part) -> tuple[Loaded, Questions]:
    """The first batch of an evaluation, which is the largest."""
    survey, rows = part.survey, part.rows
    batch = image_batches(rows, survey.lengths[rows], survey.image_keys[rows], most_at_once(recipe))[0]
    loaded = load_questions(
        part.corpus,
        part.image_reader,
        [batch],
        workers=0,
        device=torch.device("cpu"),
        max_length=recipe.data.max_length,
    )
    return next(loaded)


def trace_answers(
    recipe: Recipe, processing: Processing, batch: Loaded, questions: Questions, dtype: torch.dtype, shares: bool
) -> tuple[Moment, ...]:
    """The moments of an evaluation of this batch that can be the peak: while the prompts are read, and at the last token.

    Args:
        batch: A real one; only its shapes count.
        dtype: The type that is computed in.
        shares: Whether ranks share each weight; logits are then made at once.
    """
    model = build_meta(recipe, processing, dtype).eval()
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
        traced(model, recipe, processing, batch, dtype, shares) as (objective, fields, ledger),
    ):
        read_prompts(objective, fields, DynamicCache())
    rows, seq = fields["input_ids"].shape
    return (*highest(ledger.moments), _last_token(recipe, processing, questions, int(rows), int(seq), dtype))


def _last_token(
    recipe: Recipe, processing: Processing, questions: Questions, rows: int, seq: int, dtype: torch.dtype
) -> Moment:
    """When all keys and values are there: answers grow side by side in the rows that their questions stand in."""
    text, size = processing.base.text, dtype.itemsize
    widest = int(max(((questions.rows == row).sum() for row in set(questions.rows.tolist())), default=1))
    tokens = rows * (seq + recipe.eval.max_new_tokens * widest)
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads, shared = text.num_attention_heads, text.num_key_value_heads
    kept = 2 * tokens * text.num_hidden_layers * shared * head * size
    # A layer's keys are joined with the new ones; then keys and values are repeated for the heads that share them.
    at_work = tokens * head * size * (2 * heads if heads > shared else shared)
    logits = len(questions.rows) * processing.num_rows * (4 + size)
    return Moment(activations=kept + at_work, logits=logits)
