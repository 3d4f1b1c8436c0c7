"""Makes the untrained tiny LLaVA of the quick start: its tokenizer, from captions, and its random weights.

The folder that it writes has the layout of the hub's LLaVA models. `recipes/tiny_base.toml` trains it.

    python tests/quickstart/make_base.py --text data/drawings/train.jsonl --out data/tiny_base
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import llava_accel.quickstart

VOCABULARY = 1024
IMAGE_TOKEN = "<image>"
IMAGE_PX = 64
PATCH_PX = 16
ENGLISH = Path(llava_accel.quickstart.__file__).with_name("english.txt")


def read_captions(path: Path) -> list[str]:
    """The answers of a LLaVA JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["conversations"][1]["value"] for line in lines]


def train_tokenizer(captions: list[str], folder: Path) -> LlamaTokenizer:
    """Trains a byte-pair tokenizer on 2,000 captions and the English sentences, and adds `<image>` as the last token.

    The model file goes to `folder/tokenizer.model`; unknown characters fall back to bytes, as in Llama.
    """
    english = ENGLISH.read_text(encoding="utf-8").splitlines()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions[:2000] + 40 * english),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY - 1,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        max_sentence_length=10_000,
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, pad_token="<unk>", padding_side="right", add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    assert tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) == VOCABULARY - 1
    return tokenizer


def build_processor(tokenizer: LlamaTokenizer) -> LlavaProcessor:
    """Images of `IMAGE_PX` pixels, normalised to [-1, 1]; one position for each patch."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_PX},
        crop_size={"height": IMAGE_PX, "width": IMAGE_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )


def build_model(tokenizer: LlamaTokenizer) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights from torch's global generator, in float32.

    Every linear layer's input is a multiple of 64 wide, the block that 4-bit quantisation shares a scale in.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,  # features are taken behind the fourth: vision_feature_layer is -2, as in LLaVA-1.5
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=128,
        initializer_range=0.06,  # CLIP's 0.02 leaves the positions of so few, so narrow patches hard to tell apart
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.04,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,  # pyright: ignore[reportArgumentType]
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY - 1,
        image_seq_length=(IMAGE_PX // PATCH_PX) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def make_base(text: Path, out: Path, seed: int) -> LlavaForConditionalGeneration:
    """Writes the untrained LLaVA with its tokenizer and processor to `out` and returns it."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(read_captions(text), out)
    model = build_model(tokenizer)
    model.save_pretrained(out)
    build_processor(tokenizer).save_pretrained(out)
    return model


def main() -> None:
    command = "python tests/quickstart/make_base.py"
    parser = argparse.ArgumentParser(
        prog=command,
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"example: {command} --text data/drawings/train.jsonl --out data/tiny_base",
    )
    parser.add_argument("--text", type=Path, required=True, help="LLaVA JSON lines whose captions the tokenizer learns")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    model = make_base(arguments.text, arguments.out, arguments.seed)
    print(f"{arguments.out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, untrained")


if __name__ == "__main__":
    main()
