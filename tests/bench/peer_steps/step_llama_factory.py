"""LLaMA-Factory's `llamafactory-cli train`, with its template for LLaVA-1.5."""

import json
from pathlib import Path

from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

from bench.peer_steps.gate import Gate, common_arguments
from bench.peer_steps.turnstile import Turnstile, rows, settings


def main() -> None:
    given, turnstile = settings(), Turnstile()
    folder = Path(given["out"])
    folder.mkdir()
    examples = [
        {
            "messages": [
                {"role": "user", "content": f"<image> \n{row['question']}"},
                {"role": "assistant", "content": row["answer"]},
            ],
            "images": [row["image"]],
        }
        for row in rows()
    ]
    (folder / "data.json").write_text(json.dumps(examples))
    described = {
        "file_name": "data.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": described}))
    own = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": given["base"],
        "template": "llava",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "cutoff_len": 4096,
        "finetuning_type": "lora",
        "lora_rank": int(given["rank"]),
        "lora_alpha": int(given["alpha"]),
        "lora_dropout": float(given["dropout"]),
        "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "additional_target": "multi_modal_projector",
        "disable_gradient_checkpointing": True,
        "overwrite_cache": True,
    }
    run_exp(common_arguments(given) | own, callbacks=[Gate(turnstile)])


if __name__ == "__main__":
    main()
