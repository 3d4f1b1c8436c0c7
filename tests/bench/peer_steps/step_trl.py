"""TRL's SFTTrainer with its own collator for vision and language, on rows of prompt and completion; or its DPOTrainer."""

from pathlib import Path

from datasets import Dataset, Image
from peft import LoraConfig
from transformers import LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from bench.peer_steps.gate import Gate, common_arguments
from bench.peer_steps.turnstile import PAIRS, Turnstile, rows, settings

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
    given, turnstile = settings(), Turnstile()
    examples = [
        {
            "prompt": f"<s> {given['system']} USER: <image> \n{row['question']} ASSISTANT:",
            "images": [row["image"]],
            **{name: f" {text}</s>" for name, text in _answers(row, given).items()},
        }
        for row in rows()
    ]
    data = Dataset.from_list(examples).cast_column("images", [Image()])
    model = LlavaForConditionalGeneration.from_pretrained(given["base"], dtype="float32")
    lora = LoraConfig(
        r=int(given["rank"]),
        lora_alpha=int(given["alpha"]),
        lora_dropout=float(given["dropout"]),
        target_modules=TARGETS,
        modules_to_save=["multi_modal_projector"],
    )
    common = {**common_arguments(given), "max_length": None}
    if given["pairs"]:
        # It asks the reference in every step: with images it refuses to ask it ahead.
        arguments, trainer = DPOConfig(**common, beta=0.1, **_losses(given)), DPOTrainer  # pyright: ignore
    else:
        arguments, trainer = SFTConfig(**common, completion_only_loss=True), SFTTrainer  # pyright: ignore
    gate = Gate(turnstile, Path(f"{given['out']}.grads") if given["pairs"] else None)
    trainer(model, args=arguments, train_dataset=data, peft_config=lora, callbacks=[gate]).train()


def _answers(row: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    if given["pairs"]:
        return {"chosen": row["answer"], "rejected": row["rejected"]}
    return {"completion": row["answer"]}


def _losses(given: dict[str, str]) -> dict[str, object]:
    """Our [preference] in TRL's words."""
    table = {"loss": "sigmoid", "loss_weight": 1.0, "bco_weight": 0.0, "sft_weight": 0.0} | PAIRS[given["pairs"]]
    smoothing = {"label_smoothing": table.pop("label_smoothing")} if "label_smoothing" in table else {}
    terms = {table["loss"]: table["loss_weight"], "bco_pair": table["bco_weight"], "sft": table["sft_weight"]}
    used = {name: weight for name, weight in terms.items() if weight}
    return {"loss_type": list(used), "loss_weights": list(used.values()), **smoothing}


if __name__ == "__main__":
    main()
