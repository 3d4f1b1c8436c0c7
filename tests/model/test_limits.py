"""Bounds of what a base's files may say: configs of real models pass, and the first key that is out of bounds is named."""

from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_accel.exceptions import UserError
from llava_accel.model.limits import blamed, check_ids, check_length, check_numbers, check_pixels, check_sizes

FILE = Path("config.json")
REAL: dict[str, dict[str, Any]] = {
    "LLaVA-1.5 of the hub": {
        "ignore_index": -100, "image_token_index": 32000, "model_type": "llava", "pad_token_id": 32001,
        "projector_hidden_act": "gelu", "text_config": {"max_position_embeddings": 4096, "model_type": "llama",
        "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064}, "torch_dtype": "float16", "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064},
    "LLaVA-1.5": {
        "bos_token_id": 1, "eos_token_id": 2, "freeze_mm_mlp_adapter": False, "hidden_act": "silu", "hidden_size": 4096,
        "image_aspect_ratio": "pad", "image_grid_pinpoints": None, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "model_type": "llava",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "vocab_size": 32000},
    "Llama 3.1": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0, "vocab_size": 128256},
    "Qwen 2.5": {
        "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28, "model_type": "qwen2",
        "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False, "vocab_size": 152064},
    "Mistral": {"head_dim": None, "model_type": "mistral", "rope_theta": 1000000.0, "sliding_window": None},
    "Phi 3": {"rope_scaling": {"long_factor": [1.08, 64.7], "short_factor": [1.0, 1.05], "type": "longrope"},
        "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "sliding_window": 262144},
    "Mamba": {"model_type": "falcon_h1", "time_step_limit": [0.0, float("inf")], "rope_theta": 100000000000.0},
    "Gemma 3n": {"intermediate_size": [16384] * 35, "hidden_activation": "gelu_pytorch_tanh", "laurel_rank": 64},
    "SigLIP": {"vision_config": {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "patch_size": 14,
        "num_attention_heads": 16, "num_hidden_layers": 27, "model_type": "siglip_vision_model"}, "model_type": "siglip"},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_configs_of_real_models_pass(name: str) -> None:
    check_numbers(REAL[name], FILE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": {"hidden_size": -1}}, "text_config.hidden_size is -1, and must be a whole number from 1 to"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
        ({"num_hidden_layers": [2]}, r"num_hidden_layers is \[2\]"),
        ({"num_hidden_layers": {"a": 1}}, 'num_hidden_layers is {"a": 1}'),
        ({"vision_config": {"image_size": None}}, "vision_config.image_size is null"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN, and must be a number from 1e-20 to 0.1"),
        ({"rope_scaling": {"factor": 0}}, "rope_scaling.factor is 0"),
        ({"rope_scaling": {"long_factor": [1.0, 0.0]}}, r"rope_scaling.long_factor is \[1.0, 0.0\]"),
        ({"hidden_act": 7}, "hidden_act is 7, and must be a name"),
        ({"dtype": "nonsense"}, 'dtype is "nonsense", and must be the name of a type'),
        ({"to_dict": 1}, "to_dict is 1, and must be left out"),
    ],
)
def test_the_first_key_out_of_bounds_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"^config\.json: {says}.*Copy the file"):
        check_numbers(REAL["Llama 3.1"] | changes, FILE)


def llava(text: dict[str, Any], vision: dict[str, Any], **changes: Any) -> LlavaConfig:
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlavaConfig(
        text_config=LlamaConfig(**(small | {"vocab_size": 99} | text)),  # pyright: ignore[reportArgumentType]
        vision_config=CLIPVisionConfig(**(small | {"image_size": 56, "patch_size": 14} | vision)),  # pyright: ignore[reportArgumentType]
        **changes,
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (llava({"num_key_value_heads": 3}, {}), r"^a: num_attention_heads is 4, .*num_key_value_heads, 3"),
        (llava({"eos_token_id": [2, 99]}, {}), r"^a: eos_token_id is \[2, 99\], .* from 0 to 98"),
        (llava({}, {"image_size": 8}), "^b: patch_size is 14, and image_size only 8"),
        (llava({}, {}, vision_feature_layer=3), "^a: the selected layer of the vision tower is 3, and it has 2"),
        (llava({}, {}, vision_feature_layer=0), "^a: the selected layer of the vision tower is 0"),
        (llava({}, {}, scored_vocab_size=100), "^a: scored_vocab_size is 100, and vocab_size only 99"),
    ],
)
def test_what_does_not_fit_each_other_is_named_with_its_file(config: LlavaConfig, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_sizes(config, Path("a"), Path("b"))


def test_minus_one_stands_for_no_token() -> None:
    check_sizes(llava({"pad_token_id": -1}, {}), Path("a"), Path("b"))
    check_ids({"eos_token_id": [1, 2], "pad_token_id": -1}, 3, FILE)
    for wrong in (-2, 3, "2", True, [], [3], 1.0):
        with pytest.raises(UserError, match="eos_token_id is"):
            check_ids({"eos_token_id": wrong}, 3, FILE)


CLIP: dict[str, Any] = {
    "image_mean": [0.48, 0.46, 0.41], "image_std": (0.27, 0.26, 0.28), "rescale_factor": 1 / 255, "resample": 3,
    "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}, "do_resize": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5]), ("image_std", [0.5, 0.5, 0.0]), ("image_std", 0.5), ("rescale_factor", float("nan")),
        ("resample", 17), ("size", {"shortest_edge": 10**6}), ("size", 336), ("crop_size", {"height": 336}),
        ("crop_size", {"height": "a", "width": 336}),
        ("do_resize", 1),
    ],
)  # fmt: skip
def test_an_image_processor_that_would_spoil_pixels_is_refused(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "preprocessor_config.json").touch()
    check_pixels(CLIP, tmp_path)
    with pytest.raises(UserError, match=rf"/preprocessor_config\.json: {key} is .*Copy the file"):
        check_pixels(CLIP | {key: value}, tmp_path)


def test_the_longest_text_is_a_number() -> None:
    for right in (None, 2048, int(1e30)):
        check_length({"model_max_length": right}, FILE)
    for wrong in (0, -1, [], "2048", float("nan")):
        with pytest.raises(UserError, match="model_max_length is"):
            check_length({"model_max_length": wrong}, FILE)


def test_a_librarys_error_blames_the_keys_whose_values_it_quotes() -> None:
    raw = {"text_config": {"hidden_act": "nonsense"}, "model_type": "llava", "rope_type": "default"}
    assert blamed(raw, "KeyError: 'nonsense'") == 'text_config.hidden_act is "nonsense"'
    assert blamed(raw, "no default for it") == ""


def test_null_is_no_where_a_siglip_is_saved_so() -> None:
    half = [0.5] * 3
    saved = {"do_convert_rgb": None, "do_center_crop": None, "do_resize": True, "crop_size": None, "resample": 3}
    numbers = {"image_mean": half, "image_std": half, "rescale_factor": 1 / 255, "size": {"height": 384, "width": 384}}
    check_pixels(saved | numbers, Path("base"))
    with pytest.raises(UserError, match="crop_size is null"):
        check_pixels(saved | numbers | {"do_center_crop": True}, Path("base"))
