"""The model card: README.md of every checkpoint and export, with lines that load it in plain transformers and peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from llava_accel.model.save import FACTS
from llava_accel.recipe import Recipe, changed_keys
from llava_accel.recipe.toml import toml_value
from llava_accel.run.card_code import loading_code
from llava_accel.run.console import printable
from llava_accel.run.folder import versions
from llava_accel.run.scoring import SCORES

Form = Literal["checkpoint", "peft", "merged", "llava"]
"""What a run writes itself, and what `llava_accel.export` makes of it."""

_HIDDEN = ("run.output_dir", "run.resume", "data.cache_dir")  # they say nothing about the model
_TITLES = {
    "loss": "loss, in nats a target",
    **SCORES,
    **{f"blind_{key}": f"{title}, pictures blanked" for key, title in SCORES.items()},
    "num_answers": "answers",
}


def describe(folder: Path, run: Path, recipe: Recipe, step: int) -> None:
    """Add step, scores and versions to the facts of a folder that a run has just written, and write its card.

    Args:
        folder: With llava_accel.json in it.
        run: Where metrics.jsonl is.
    """
    facts = json.loads((folder / FACTS).read_text())
    facts |= {"step": step, "evaluations": evaluations(run / "metrics.jsonl", step), "versions": versions()}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    write_model_card(folder, "checkpoint", recipe, facts)


def write_model_card(
    folder: Path, form: Form, recipe: Recipe | None, facts: Mapping[str, Any], title: str = ""
) -> None:
    """Write README.md.

    Args:
        recipe: How it was trained; None for what was not trained here.
        facts: Those of llava_accel.json, as far as they are known.
        title: For what has no recipe, and so no name.
    """
    base = str(facts.get("base", ""))
    parts = [
        f"---\n{_front_matter(form, base, facts)}\n---",
        f"# {recipe.run.name if recipe else title}",
        _summary(form, base, facts),
    ]
    if facts.get("evaluations"):
        parts += ["## Results", _results(facts["evaluations"])]
    parts += ["## Use", loading_code(form, recipe, facts)]
    if recipe:
        parts += ["## Training", _training(recipe, facts)]
    (folder / "README.md").write_text("\n\n".join(printable(part) for part in parts) + "\n")


def evaluations(path: Path, step: int) -> list[dict[str, Any]]:
    """The first evaluation of a run and the last one up to `step`, each {"step", "loss", ...}."""
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    found = [{"step": line["step"], **line["eval"]} for line in lines if "eval" in line and line["step"] <= step]
    return [*found[:1], *found[1:][-1:]]


def _front_matter(form: Form, base: str, facts: Mapping[str, Any]) -> str:
    is_adapter = facts.get("train") == "lora" and form != "merged"
    named: dict[str, Any] = {}
    if base.count("/") == 1 and not base.startswith((".", "~", "/")) and not Path(base).exists():
        # The hub refuses a card whose base is no model of its own.
        relation = "adapter" if is_adapter else "merge" if facts.get("train") == "lora" else "finetune"
        named = {"base_model": base, "base_model_relation": relation}
    tags = ["llava", "llava-accel", *(["lora"] if facts.get("train") == "lora" else [])]
    library = "peft" if is_adapter else "transformers"
    return ModelCardData(library_name=library, pipeline_tag="image-text-to-text", tags=tags, **named).to_yaml()


def _summary(form: Form, base: str, facts: Mapping[str, Any]) -> str:
    train = facts.get("train")
    what = {
        "lora": "The adapter and the projector" if form != "merged" else "The whole model, its adapter merged into it",
        "projector": "The projector" if form != "merged" else "The whole model, with its new projector",
        "full": "The whole model",
    }.get(str(train))
    if what is None:
        return f"`{base}` in another layout, its weights unchanged."
    return f"{what}, trained on `{base}`{' with llava_accel' if 'step' in facts else ''}."


def _results(found: list[dict[str, Any]]) -> str:
    steps = ["before training" if line["step"] == 0 else f"step {line['step']:,}" for line in found]
    rows = [f"| | {' | '.join(steps)} |", f"|---|{'---|' * len(steps)}"]
    for key, title in _TITLES.items():
        if any(key in line for line in found):
            rows.append(f"| {title} | {' | '.join(_cell(key, line) for line in found)} |")
    return "\n".join(rows)


def _cell(key: str, line: Mapping[str, Any]) -> str:
    if key not in line:
        return ""
    if key in ("loss", "num_answers"):
        return f"{line[key]:.4f}" if key == "loss" else f"{round(line[key]):,}"
    return f"{100 * line[key]:.1f} %"


def _training(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    data = recipe.data
    files = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
    lines = [
        f"- base: `{facts.get('base', recipe.model.base)}`, fingerprint {facts.get('base_fingerprint', 'unknown')}"
    ]
    lines.append(f"- data: {', '.join(f'`{Path(file).name}`' for file in files)}")
    if data.eval or data.eval_fraction:
        lines.append(
            f"- evaluated on: {f'`{Path(data.eval).name}`' if data.eval else f'{data.eval_fraction:.1%} of it'}"
        )
    if "step" in facts:
        lines.append(f"- optimizer steps: {facts['step']:,}")
    made = facts.get("versions", {})
    lines.append(f"- versions: {', '.join(f'{name} {number}' for name, number in made.items()) or 'unknown'}")
    keys = [f"{key} = {toml_value(value)}" for key, value in changed_keys(recipe).items() if key not in _HIDDEN]
    return "\n".join([*lines, "", "Keys of the recipe that differ from the defaults:", "", "```toml", *keys, "```"])
