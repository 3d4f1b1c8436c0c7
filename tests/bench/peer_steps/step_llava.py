"""LLaVA's own llava/train/train.py, as its scripts start it. Its Trainer gets the callback, and nothing else is changed.

Its `train` leaves the vision tower in fp16 where bf16 is off. As all others compute in fp32, the tower is put back into it
before the first step.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from bench.peer_steps.gate import Gate, as_flags, common_arguments
from bench.peer_steps.turnstile import Turnstile, rows, settings


class _Fp32Gate(Gate):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        kwargs["model"].get_model().get_vision_tower().float()
        super().on_train_begin(*args, **kwargs)


def main() -> None:
    given, turnstile = settings(), Turnstile()
    if given["code"]:
        sys.path.insert(0, given["code"])
    code: Any = importlib.import_module("llava.train.train")

    class Trainer(code.LLaVATrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs, callbacks=[_Fp32Gate(turnstile)])

    code.LLaVATrainer = Trainer
    folder = Path(given["out"])
    folder.mkdir()
    examples = [
        {
            "id": str(number),
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for number, row in enumerate(rows())
    ]
    (folder / "data.json").write_text(json.dumps(examples))
    own = {
        "model_name_or_path": given["original_base"],
        "version": "v1",
        "data_path": folder / "data.json",
        "image_folder": "/",
        "vision_tower": given["original_tower"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
        "lora_enable": True,
        "lora_r": given["rank"],
        "lora_alpha": given["alpha"],
        "lora_dropout": given["dropout"],
        "model_max_length": 2048,
        "lazy_preprocess": True,
    }
    common = common_arguments(given)
    common["evaluation_strategy"] = common.pop("eval_strategy")
    sys.argv = [sys.argv[0], *as_flags(common | own)]
    code.train()


if __name__ == "__main__":
    main()
