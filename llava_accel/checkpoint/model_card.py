"""The model card: README.md of every checkpoint and export, from templates/model_card.md.j2.

It says what was trained on what and how well, and holds the lines that load it in plain transformers and peft.
"""

import functools
import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from llava_accel.console.output import printable
from llava_accel.model.save import FACTS
from llava_accel.recipe import Recipe, changed_keys
from llava_accel.recipe.inputs import ModelTable, Source
from llava_accel.recipe.toml import toml_value
from llava_accel.scoring.best import read_lines
from llava_accel.scoring.metrics import cell, score_names, score_title
from llava_accel.setup.run_folder import versions
from llava_accel.sources.hub import is_of_hub

Form = Literal["checkpoint", "peft", "merged", "llava"]
"""The form that a run writes itself, and those that `llava_accel.export` makes from it."""

_HIDDEN = ("run.output_dir", "run.resume", "data.cache_dir")  # they say nothing about the model
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks in vllm/config/lora.py


def describe(folder: Path, run: Path, recipe: Recipe, step: int) -> None:
    """Add step, scores and versions to llava_accel.json of a folder that `run` has just written, and write its card."""
    facts = json.loads((folder / FACTS).read_bytes())
    facts |= {"step": step, "evaluations": evaluations(run / "metrics.jsonl", step), "versions": versions()}
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    write_model_card(folder, "checkpoint", recipe, facts)


def evaluations(path: Path, step: int) -> list[dict[str, Any]]:
    """The first evaluation of a run and the last one up to `step`, each {"step", "loss", ...}."""
    lines = read_lines(path)
    past = [{"step": line["step"], **line["eval"]} for line in lines if "eval" in line and line["step"] <= step]
    return [*past[:1], *past[1:][-1:]]


def write_model_card(
    folder: Path, form: Form, recipe: Recipe | None, facts: Mapping[str, Any], title: str = ""
) -> None:
    """Write README.md.

    Args:
        recipe: How it was trained; None for a model that was not trained here.
        facts: Those of llava_accel.json, as far as they are known.
        title: Used where no recipe gives a name.
    """
    base, train, measured = str(facts.get("base", "")), facts.get("train"), facts.get("evaluations") or []
    context: dict[str, Any] = {
        "form": form,
        "front_matter": _front_matter(form, base, train),
        "title": recipe.run.name if recipe else title,
        "base": base,
        "base_name": Path(base).name,
        "train": train,
        "layout": facts.get("base_layout", "hub"),
        "is_whole": form == "merged" or train == "full",
        "step": facts.get("step"),
        "columns": ["before training" if line["step"] == 0 else f"step {line['step']:,}" for line in measured],
        "results": [
            (name, [cell(line, key) for line in measured])
            for key, name in _rows({key for line in measured for key in line}, recipe).items()
        ],
        "recipe": recipe,
        "quantization": _quantization(recipe),
        "vllm_rank": _vllm_rank(recipe.model) if recipe else None,
        "is_turned": recipe is not None and recipe.data.exif == "apply",
    }
    if recipe:
        data, changed = recipe.data, changed_keys(recipe)
        context |= {
            "base_trained_on": facts.get("base", recipe.model.base),
            "fingerprint": facts.get("base_fingerprint", "unknown"),
            "files": _names(data.train),
            "evaluated_on": ", ".join(_names(data.eval)),
            "versions": facts.get("versions", {}),
            "keys": {key: toml_value(value) for key, value in changed.items() if key not in _HIDDEN},
        }
    (folder / "README.md").write_text(printable(_template().render(context)), encoding="utf-8")


def _rows(measured: Collection[str], recipe: Recipe | None) -> dict[str, str]:
    """Key -> title of the results that a card shows."""
    titles = {key: score_title(key) for key in score_names(measured)}
    rows = {"loss": f"loss, {recipe.loss_unit if recipe else 'as the run has measured it'}", **titles}
    rows |= {f"blind_{key}": f"{title}, images blanked" for key, title in titles.items()}
    rows |= {f"common_{key}": f"{title} of the commonest answer, always given" for key, title in titles.items()}
    return {key: title for key, title in (rows | {"num_answers": "answers"}).items() if key in measured}


def _vllm_rank(model: ModelTable) -> int | None:
    """The --max-lora-rank with which vLLM serves an adapter with LoRA layers on the projector.

    None where it holds more than LoRA weights, where only peft knows how they act, or where the base has other weights.
    """
    lora = model.lora
    is_plain = lora.variant in ("lora", "rslora") and lora.bias == "none" and not model.train_vision
    if not model.adapts_projector or not is_plain or model.projector or model.vision_tower or not model.base:
        return None
    return next((rank for rank in _VLLM_RANKS if rank >= lora.rank), None)


def _names(sources: str | Sequence[Source]) -> list[str]:
    """Names of the files in data.train or data.eval, without their folders, which are nobody else's business."""
    paths = [sources] if isinstance(sources, str) else [source.path for source in sources]
    return [path if is_of_hub(path) else Path(path).name for path in paths if path]


@functools.cache
def _template() -> Template:
    loader = PackageLoader("llava_accel.checkpoint", "templates")
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(code=_code, shell=shlex.quote, quote=lambda text: json.dumps(text, ensure_ascii=False))
    return environment.get_template("model_card.md.j2")


def _code(text: str) -> str:
    """A text as code inside a line of Markdown: no text can end the code before its own end."""
    shown = printable(text).replace("\n", "\\n")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    room = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{room}{shown}{room}{fence}"


def _front_matter(form: Form, base: str, train: object) -> str:
    is_adapter = train == "lora" and form != "merged"
    named: dict[str, Any] = {}
    if is_of_hub(base):
        # The hub refuses a card whose base is not a model of its own.
        relation = "adapter" if is_adapter else "merge" if train == "lora" else "finetune"
        named = {"base_model": base, "base_model_relation": relation}
    tags = ["llava", "llava-accel", *(["lora"] if train == "lora" else [])]
    library = "peft" if is_adapter else "transformers"
    return ModelCardData(library_name=library, pipeline_tag="image-text-to-text", tags=tags, **named).to_yaml()


def _quantization(recipe: Recipe | None) -> list[str]:
    """Arguments of BitsAndBytesConfig that give the base the quantisation that the adapter was trained with."""
    if recipe is None or recipe.model.quantization.bits == 16:
        return []
    table = recipe.model.quantization
    if table.bits == 8:
        return ["load_in_8bit=True"]
    code, scales = f'bnb_4bit_quant_type="{table.type}"', f"bnb_4bit_use_double_quant={table.double}"
    dtype = "float16" if recipe.run.precision == "fp16" else "bfloat16"
    return ["load_in_4bit=True", code, scales, f'bnb_4bit_compute_dtype="{dtype}"']
