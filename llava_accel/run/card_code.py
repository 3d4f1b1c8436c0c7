"""The lines of a model card that load what the folder holds; tests run them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_accel.recipe import Recipe

_ASK = """\
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
picture = Image.open("picture.jpg").convert("RGB")
inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device)
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
    command = "python -m llava.serve.cli --model-path {path} --image-file picture.jpg"
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
