"""TRL's SFTTrainer with its own collator for vision and language, on rows of prompt and completion."""

from datasets import Dataset, Image
from peft import LoraConfig
from transformers import LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

from bench.peer_steps.gate import Gate, common_arguments
from bench.peer_steps.turnstile import Turnstile, rows, settings

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def main() -> None:
    given, turnstile = settings(), Turnstile()
    examples = [
        {
            "prompt": f"<s> {given['system']} USER: <image> \n{row['question']} ASSISTANT:",
            "completion": f" {row['answer']}</s>",
            "images": [row["image"]],
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
    arguments = SFTConfig(**common_arguments(given), max_length=None, completion_only_loss=True)  # pyright: ignore
    SFTTrainer(model, arguments, train_dataset=data, peft_config=lora, callbacks=[Gate(turnstile)]).train()


if __name__ == "__main__":
    main()
