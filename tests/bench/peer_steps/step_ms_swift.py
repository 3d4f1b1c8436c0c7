"""ms-swift's `swift sft`. The same prompt as everywhere is a template registered in a plugin, as its manual says."""

import json
from pathlib import Path

from swift import sft_main  # pyright: ignore[reportMissingImports]
from swift.callbacks import callbacks_map  # pyright: ignore[reportMissingImports]

from bench.peer_steps.gate import Gate, as_flags, common_arguments
from bench.peer_steps.turnstile import Turnstile, rows, settings

PLUGIN = """
from swift.template import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate


class Template(LlavaHfTemplate):
    def replace_tag(self, media_type, index, inputs):
        return ["<image> \\n"]


register_template(
    TemplateMeta(
        "v1",
        prefix=["<s>"],
        prompt=["USER: {{QUERY}} ASSISTANT:"],
        chat_sep=["</s>"],
        suffix=["</s>"],
        system_prefix=["<s> {{SYSTEM}} "],
        template_cls=Template,
    )
)
"""
"""Spaces that LLaVA's own code makes by tokenising what stands before and after an image apart."""


def main() -> None:
    given, turnstile = settings(), Turnstile()
    callbacks_map["gate"] = lambda args, trainer: Gate(turnstile)
    folder = Path(given["out"])
    folder.mkdir()
    (folder / "plugin.py").write_text(PLUGIN)
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"<image>{row['question']}"},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [row["image"]],
        }
        for row in rows()
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {
        "model": given["base"],
        "model_type": "llava1_5_hf",
        "template": given["template"],
        "external_plugins": folder / "plugin.py",
        "callbacks": "gate",
        "dataset": folder / "data.jsonl",
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "tuner_type": "lora",
        "lora_rank": given["rank"],
        "lora_alpha": given["alpha"],
        "lora_dropout": given["dropout"],
        "modules_to_save": "multi_modal_projector",
        "split_dataset_ratio": 0,
    }
    system = {"system": given["system"]} if given["template"] == "v1" else {}
    sft_main(as_flags(common_arguments(given) | own | system))


if __name__ == "__main__":
    main()
