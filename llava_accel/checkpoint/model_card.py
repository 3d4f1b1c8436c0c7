"""The model card: README.md of every checkpoint and export, with lines that load it in plain transformers and peft."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCardData

from llava_accel.console.output import printable
from llava_accel.model.save import FACTS
from llava_accel.recipe import Recipe, changed_keys
from llava_accel.recipe.toml import toml_value
from llava_accel.scoring.metrics import SCORES
from llava_accel.setup.run_folder import versions
from llava_accel.storage.jsonl import read_json_lines

Form = Literal["checkpoint", "peft", "merged", "llava"]
"""What a run writes itself, and what `llava_accel.export` makes of it."""

_HIDDEN = ("run.output_dir", "run.resume", "data.cache_dir")  # they say nothing about the model
_TITLES = {
    "loss": "loss, in nats a target",
    **SCORES,
    **{f"blind_{key}": f"{title}, images blanked" for key, title in SCORES.items()},
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
    lines = read_json_lines(path) if path.is_file() else []
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


_ASK = """\
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
image = Image.open("image.jpg").convert("RGB")
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())"""

_WHOLE = """\
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."  # where this file is
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
processor = AutoProcessor.from_pretrained(folder)
"""

_PEFT = """\
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, {imports}LlavaForConditionalGeneration

folder = "."  # where this file is
base = LlavaForConditionalGeneration.from_pretrained("{base}", dtype="auto"{quantised})
model = PeftModel.from_pretrained(base, folder).eval()
processor = AutoProcessor.from_pretrained(folder)
"""

_CHECKPOINT = """\
{peft}from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, {imports}LlavaForConditionalGeneration

folder = "."  # where this file is
model = LlavaForConditionalGeneration.from_pretrained("{base}", dtype="auto"{quantised})
found = model.load_state_dict(load_file(f"{{folder}}/non_lora_trainables.safetensors"), strict=False)
assert not found.unexpected_keys
{adapter}processor = AutoProcessor.from_pretrained(folder)
"""

_VLLM = "vLLM takes nothing but LoRA weights from an adapter, and this one holds the projector. Serve a merged model."
_EXPORT = "python -m llava_accel.export {source} --to {form} --out {out}"


def loading_code(form: str, recipe: Recipe | None, facts: Mapping[str, Any]) -> str:
    """What stands under "Use": commands and Python, as Markdown.

    Args:
        form: See `card.Form`.
        facts: Those of llava_accel.json.
    """
    train, layout, base = facts.get("train"), facts.get("base_layout", "hub"), str(facts.get("base", ""))
    if form == "llava":
        return _for_llava(train, base, layout)
    if form == "merged" or train == "full":
        return _python(_WHOLE)
    if layout == "parts":
        note = f"The base, `{base}` with a vision tower, is no LLaVA by itself. Make a whole model of it first:"
        return f"{note}\n\n{_shell(_EXPORT.format(source='.', form='merged', out='whole'))}"
    lead = ""
    if layout == "original":
        converted = f"{Path(base).name}-hf"
        command = _shell(_EXPORT.format(source=base, form="merged", out=converted))
        lead = f"`{base}` is in the layout of LLaVA's own code. Convert it once for transformers:\n\n{command}\n\n"
        base = converted
    imports, quantised, setting = _quantised(recipe)
    if form == "peft":
        code = _PEFT.format(base=base, imports=imports, quantised=quantised)
    else:
        code = _CHECKPOINT.format(
            base=base,
            imports=imports,
            quantised=quantised,
            peft="from peft import PeftModel\n" if train == "lora" else "",
            adapter="model = PeftModel.from_pretrained(model, folder).eval()\n" if train == "lora" else "",
        )
    behind = f"\n\n{_VLLM}" if form == "peft" else ""
    return lead + _python(code.replace('folder = "."', f'{setting}folder = "."', 1)) + behind


def _quantised(recipe: Recipe | None) -> tuple[str, str, str]:
    """Import, argument and set-up that give the base the quantisation that the adapter was trained with."""
    if recipe is None or recipe.model.quantization.bits == 16:
        return "", "", ""
    table = recipe.model.quantization
    keys = ["load_in_8bit=True"]
    if table.bits == 4:
        keys = [
            "load_in_4bit=True",
            f'bnb_4bit_quant_type="{table.type}"',
            f"bnb_4bit_use_double_quant={table.double}",
            'bnb_4bit_compute_dtype="bfloat16"',
        ]
    keys.append('llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"]')
    setting = f"quantization = BitsAndBytesConfig(\n    {', '.join(keys[:-1])},\n    {keys[-1]},\n)\n"
    return "BitsAndBytesConfig, ", ", quantization_config=quantization", setting


def _for_llava(train: object, base: str, layout: object) -> str:
    lead = ""
    if train in ("lora", "projector") and layout == "hub":
        converted = f"{Path(base).name}-original"
        command = _shell(_EXPORT.format(source=base, form="llava", out=converted))
        lead = f"`{base}` is in the layout of transformers. Convert it once for LLaVA:\n\n{command}\n\n"
        base = converted
    command = "python -m llava.serve.cli --model-path {path} --image-file image.jpg"
    if train == "lora":
        path = f"llava-NAME-lora --model-base {base}"
        name = "contain `llava` and `lora`, which is how LLaVA's loader tells an adapter"
    elif train == "projector":
        path = f"llava-NAME --model-base {base}"
        name = "contain `llava` and not `lora`, which is how LLaVA's loader tells a projector"
    else:
        path, name = "llava-NAME", "contain `llava`, which is how LLaVA's loader tells a model"
    return (
        f"{lead}These are the files that LLaVA's own code writes and reads. The folder's name must {name}:\n\n"
        f"{_shell(command.format(path=path))}\n\n"
        "LLaVA takes the vision tower from the place that `mm_vision_tower` in config.json names. Where that is "
        "`vision_tower`, the folder beside config.json, write its path as seen from where you start LLaVA."
    )


def _python(code: str) -> str:
    return f"```python\n{code}\n{_ASK}\n```"


def _shell(command: str) -> str:
    return f"```bash\n{command}\n```"
