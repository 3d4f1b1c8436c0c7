"""TRL's SFTTrainer with its own collator for vision and language, on rows of prompt and completion; or its DPOTrainer."""

from datasets import Dataset, Image
from peft import LoraConfig
from transformers import LlavaForConditionalGeneration
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from bench.peer_steps.gate import Gate, common_arguments
from bench.peer_steps.turnstile import Turnstile, rows, settings

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
        arguments, trainer = DPOConfig(**common, beta=0.1), DPOTrainer  # pyright: ignore
    else:
        arguments, trainer = SFTConfig(**common, completion_only_loss=True), SFTTrainer  # pyright: ignore
    trainer(model, args=arguments, train_dataset=data, peft_config=lora, callbacks=[Gate(turnstile)]).train()


def _answers(row: dict[str, str], given: dict[str, str]) -> dict[str, str]:
    if given["pairs"]:
        return {"chosen": row["answer"], "rejected": row["rejected"]}
    return {"completion": row["answer"]}


if __name__ == "__main__":
    main()
