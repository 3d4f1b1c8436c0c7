"""Which family a config of LLaVA's own code describes, and what none can hold."""

from typing import Any

import pytest

from llava_accel.families import original

TILED = {"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad"}


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({"mm_projector_type": "mlp2x_gelu"}, "llava"),
        ({"mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"}, "llava"),
        (TILED | {"image_aspect_ratio": "anyres"}, "llava_next"),
        (TILED | {"image_aspect_ratio": "pad"}, "llava_next"),
        (TILED | {"image_aspect_ratio": "anyres_max_9", "mm_spatial_pool_mode": "bilinear"}, "llava_onevision"),
    ],
)
def test_the_family_follows_from_how_images_are_seen(keys: dict[str, Any], family: str) -> None:
    assert original.check(keys, "x").name == family


@pytest.mark.parametrize(
    ("kind", "architecture", "language_model"),
    [
        ("llava", "LlavaLlamaForCausalLM", "llama"),
        ("llava", "LlavaQwenForCausalLM", "qwen2"),
        ("llava", None, "llama"),
        ("llava_qwen", "LlavaQwenForCausalLM", "qwen2"),
        ("llava_mistral", "LlavaMistralForCausalLM", "mistral"),
        ("share4v", "Share4VLlamaForCausalLM", "llama"),
    ],
)
def test_the_language_model_follows_from_the_model_type_and_class(
    kind: str, architecture: str | None, language_model: str
) -> None:
    raw = {"model_type": kind, "architectures": architecture and [architecture]}
    assert original.language_model_type(raw, "x") == language_model


def test_a_language_model_that_no_family_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^x: model_type 'bunny-phi' is not a LLaVA on Llama.*Use a LLaVA-1\.5"):
        original.language_model_type({"model_type": "bunny-phi"}, "x")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "'flat' with image_aspect_ratio 'anyres'"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}, "'spatial' with"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_maxpool2x2_unpad"}, "maxpool2x2"),
        ({"image_aspect_ratio": "crop_split"}, "'crop_split'"),
        (
            {"image_aspect_ratio": "anyres", "use_image_newline_parameter": False},
            "use_image_newline_parameter is false",
        ),
        ({"image_aspect_ratio": "anyres", "mm_resampler_type": "spatial_pool"}, "pools.*LLaVA-NeXT-Video"),
        ({"image_aspect_ratio": "anyres", "mm_projector_type": "ldpnetv2"}, "mm_projector_type is 'ldpnetv2'"),
    ],
)
def test_what_no_family_does_is_refused_and_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^x: .*{said}"):
        original.check(TILED | keys, "x")


def test_pinpoints_may_be_a_list_the_text_of_one_or_a_range() -> None:
    def read(value: object) -> object:
        return original.pinpoints({"image_grid_pinpoints": value}, 384)

    pairs = [[384, 768], [768, 384]]
    assert read(pairs) == read("[(384, 768), (768, 384)]") == read("[[384, 768], [768, 384]]") == pairs
    assert read("(1x1),...,(2x3)") == [[x * 384, y * 384] for x in (1, 2) for y in (1, 2, 3)]
    assert read("nonsense") == "nonsense" and read(None) is None
