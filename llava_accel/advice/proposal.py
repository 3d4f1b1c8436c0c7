"""Turns what was found into the keys of a recipe, each with its reason."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava_accel.advice.commented import Key
from llava_accel.advice.findings import PREFERENCE, Findings, Lengths
from llava_accel.advice.sizing import Card, Fit
from llava_accel.exceptions import UserError

_STEPS = 200
"""Optimizer steps to reach: fewer teach little, so small data are passed over several times."""
_MOST_PASSES = 8
_FEW = 10_000  # records: with fewer, two passes are useful however many steps they take
_BATCHES = ((500, 8), (20_000, 16))
"""Global batch where there are fewer records than this; else LLaVA's 128."""
_ALL_BATCH = 128
_SHARING = 2.0  # records per image from which on their prefix is shared
_FEWEST_GROUPS = 20  # images: with fewer, none is held out
_FEWEST_HELD_OUT, _MOST_HELD_OUT = 6, 1000
_LONGEST_ANSWER = 512
_ROOM = 1.1  # above the longest record that was tokenised, as not all were
_SHARED = "{:.1f} records per image: its tokens are computed once for all of them"
_UNMARKED = "no text has <image>: images come before the first question"
_USUAL = "usual for DPO of LLaVA with LoRA, as in recipes/dpo_lora.toml"
_OF_PAIRS = {
    "train": [Key("objective", "dpo", "all records are pairs: the chosen answer becomes likelier than the rejected one")],
    "preference": [Key("beta", 0.1, f"{_USUAL}: how strongly the model is held to what it was")],
    "model": [Key("train_projector", False, "only the adapter is trained")],
    "model.lora": [Key("rank", 128, _USUAL), Key("alpha", 256, "twice the rank"), Key("dropout", 0.0, _USUAL)],
    "optim": [
        Key("learning_rate", 5e-6, f"{_USUAL}: far below that of answers"),
        Key("warmup_fraction", 0.1, _USUAL),
    ],
}  # fmt: skip
"""Keys of each table that pairs of answers ask for."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """What the user names."""

    name: str
    """Name of the run."""
    base: str
    base_why: str
    train: str | list[dict[str, Any]]
    images: str
    images_why: str
    evaluation: str
    columns: dict[str, str]
    """As `data.columns`."""
    missing_image_mark: Literal["error", "start"]
    """As `data.missing_image_mark`."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was found in data and base."""

    train: Findings
    lengths: Lengths
    evaluation: Findings | None
    """Findings and lengths of --eval; None without it."""
    evaluation_lengths: Lengths | None
    task: str
    template: tuple[str, str]
    window: int
    """Longest input of the base, in tokens."""


def task_keys(task: str) -> dict[str, list[Key]]:
    """Keys of each table that depend on the task alone."""
    return _OF_PAIRS if task == PREFERENCE else {}


def shares_images(findings: Findings) -> bool:
    """Whether it pays to compute the records of an image together."""
    return findings.per_image >= _SHARING and findings.num_with_images > 0


def global_batch(findings: Findings) -> tuple[int, str]:
    """Examples of an optimizer step, and why."""
    number = findings.num_records
    batch = next((batch for below, batch in _BATCHES if number < below), _ALL_BATCH)
    why = f"global batch {batch}: " + (
        "as LLaVA's" if batch == _ALL_BATCH else f"{number:,} records give too few steps with LLaVA's 128"
    )
    if shares_images(findings) and batch < _ALL_BATCH:
        factor = 4 if findings.per_image >= 4 else 2
        why = f"global batch {factor * batch}, as records of one image come together"
        batch *= factor
    return batch, why


def held_out_share(findings: Findings) -> tuple[float, str]:
    """`data.eval_fraction`, and why; 0 where there are too few images."""
    groups, number = findings.num_groups, findings.num_records
    if groups < _FEWEST_GROUPS:
        return 0.0, f"nothing is held out: {groups} images are too few to be divided"
    share = min(0.1, max(0.01, _MOST_HELD_OUT / number))
    share = round(max(share, min(0.3, _FEWEST_HELD_OUT / groups)), 3)
    what = "images and their records" if findings.num_with_images else "records"
    return share, f"no --eval: about {round(share * groups):,} of {groups:,} {what} are held out"


def largest(seen: Seen) -> list[np.ndarray]:
    """The tokenised rows that fit the base, the longest first; and those with most tiles first, if another row leads then.

    Raises:
        UserError: none of them fits.
    """
    order = np.argsort(-seen.lengths.tokens, kind="stable")
    fitting = order[seen.lengths.tokens[order] <= seen.window]
    if not len(fitting):
        raise UserError(
            f"the shortest of {len(order):,} records has {seen.lengths.tokens.min():,} tokens, images included, and the "
            f"base takes {seen.window:,}. Shorten the records, or name another base with --base"
        )
    rows, tiles = seen.lengths.rows, seen.lengths.tiles
    tiled = fitting[np.argsort(-tiles[fitting], kind="stable")]
    return [rows[fitting], rows[tiled]] if tiles[tiled[0]] > tiles[fitting[0]] else [rows[fitting]]


def length_keys(seen: Seen) -> list[Key]:
    """`data.max_length`, and what happens to longer records."""
    both = [seen.lengths, *([seen.evaluation_lengths] if seen.evaluation_lengths else [])]
    tokens = np.concatenate([lengths.tokens for lengths in both])
    number = seen.train.num_records + (seen.evaluation.num_records if seen.evaluation else 0)
    most, median = int(tokens.max()), int(np.median(tokens))
    needed = -(-round(most * (1.0 if len(tokens) == number else _ROOM)) // 64) * 64
    why = f"tokens: the longest of {len(tokens):,} records has {most:,}, the median {median:,}"
    if most <= seen.window:
        return [Key("max_length", min(needed, seen.window), why)]
    several = bool(seen.train.rounds.max() > 1) and seen.task != PREFERENCE
    what = "drop_turns" if several else "skip"
    return [
        Key("max_length", seen.window, f"{why}; the base takes {seen.window:,}"),
        Key("on_too_long", what, "longer records " + ("lose turns at their end" if several else "are left out")),
    ]


def metric(seen: Seen) -> tuple[str, str]:
    """`eval.metric`, and why."""
    judged = seen.evaluation or seen.train
    if seen.task == PREFERENCE:
        return "pair_accuracy", "the share of held-out pairs whose chosen answer has gained more"
    if judged.have_choices:
        return "multiple_choice", "all records have choices"
    if seen.task in ("caption", "chat"):
        return "loss", "answers are too long to be compared word for word"
    if judged.have_answers:
        return "vqa_accuracy", "all records have the answers of annotators"
    return "exact_match", "short answers, one right answer each"


def propose(named: Named, seen: Seen, fit: Fit, card: Card) -> dict[str, list[Key]]:
    """The tables of a recipe, with the reason for each key."""
    batch, batch_why = global_batch(seen.train)
    share, share_why = (0.0, "") if named.evaluation else held_out_share(seen.train)
    tables = {
        "run": [
            Key("name", named.name, f"the run's folder is runs/{named.name}"),
            Key("precision", "auto", f"{'' if card.is_gpu else 'fp32 here; '}bf16 where the GPU has it, else fp16"),
        ],
        "model": [
            Key("base", named.base, named.base_why),
            Key("template", *seen.template),
            Key("gradient_checkpointing", fit.checkpoints, _checkpointing(fit, card)),
        ],
        "model.quantization": [Key("bits", fit.bits, _bits(fit, card))],
        "data": [
            Key("train", named.train, f"{seen.train.num_records:,} records"),
            *([Key("images", named.images, named.images_why)] if named.images else []),
            *([Key("columns", named.columns, "as --columns says")] if named.columns else []),
            *([Key("missing_image_mark", "start", _UNMARKED)] if named.missing_image_mark == "start" else []),
            *([Key("eval", named.evaluation, "scored during the run")] if named.evaluation else []),
            *([Key("eval_fraction", share, share_why)] if share_why else []),
            *length_keys(seen),
            *([Key("share_prefix", True, _SHARED.format(seen.train.per_image))] if shares_images(seen.train) else []),
        ],
        "train": _training(seen.train, share, fit, batch, batch_why, card),
        "eval": _evaluation(seen, share) if named.evaluation or share else [],
    }
    asked = task_keys(seen.task)
    return {name: [*tables.get(name, []), *asked.get(name, [])] for name in dict.fromkeys((*tables, *asked))}


def _bits(fit: Fit, card: Card) -> str:
    if fit.bits == 16:
        return f"not quantised: {card.gigabytes:.0f} GB hold the weights as they are"
    return f"QLoRA: with 16 bits, {card.gigabytes:.0f} GB hold too little beside the weights"


def _checkpointing(fit: Fit, card: Card) -> str:
    if fit.checkpoints:
        return "recomputes activations, a third more work: else too few examples fit"
    return f"{card.gigabytes:.0f} GB hold all activations"


def _training(findings: Findings, share: float, fit: Fit, batch: int, batch_why: str, card: Card) -> list[Key]:
    number = round(findings.num_records * (1 - share))
    pass_steps = -(-number // batch)
    passes = max(2 if findings.num_records < _FEW else 1, min(_MOST_PASSES, -(-_STEPS // pass_steps)))
    accumulated = batch // fit.batch
    taken = f"about {fit.gigabytes:.1f}" if fit.gigabytes >= 0.1 else "less than 0.1"
    planned = f"{taken} of {card.gigabytes:.0f} GB as `plan` computes, with the longest records"
    several = f"{fit.batch} x {accumulated} on one GPU" if accumulated > 1 else f"{fit.batch} x 1"
    return [
        Key("epochs", passes, f"{number:,} records to train on: about {passes * pass_steps:,} steps"),
        Key("per_device_batch_size", fit.batch, planned),
        Key("accumulation_steps", accumulated, f"{several}, {batch_why}"),
    ]


def _evaluation(seen: Seen, share: float) -> list[Key]:
    number = seen.evaluation.num_records if seen.evaluation else round(share * seen.train.num_records)
    name, why = metric(seen)
    tokens = int(np.quantile((seen.evaluation_lengths or seen.lengths).answer_tokens, 0.99))
    room = min(_LONGEST_ANSWER, -(-round(_ROOM * tokens) // 8) * 8)
    return [
        Key("metric", name, why),
        Key("max_new_tokens", room, f"99 of 100 answers have at most {tokens:,} tokens, their end included"),
        *(
            [Key("blind_limit", 0, "what counts is which answer of a pair is preferred")]
            if seen.task == PREFERENCE
            else []
        ),
        *([Key("limit", _MOST_HELD_OUT, f"of {number:,} records")] if number > _MOST_HELD_OUT else []),
    ]
