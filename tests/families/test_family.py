"""Canvases as each config means them, and what is written of them."""

from types import SimpleNamespace

import pytest
from transformers import LlavaNextConfig

from llava_accel.data.tiling import WHOLE
from llava_accel.families.family import check_pinpoints, put_canvases
from llava_accel.families.llava import LLAVA
from llava_accel.families.next import NEXT
from llava_accel.families.onevision import ONEVISION
from llava_accel.families.registry import FAMILIES

RELEASED = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def next_config(pinpoints: list[list[int]], **more: object) -> LlavaNextConfig:
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    return NEXT.config_class(vision_config=vision, image_grid_pinpoints=pinpoints, **more)


def test_the_released_list_of_the_hub_is_read_as_the_original_reads_it() -> None:
    assert [list(canvas) for canvas in NEXT.released(336)] == RELEASED
    assert [list(canvas) for canvas in NEXT.canvases_of_hub(next_config(RELEASED))] == RELEASED
    own = next_config(RELEASED, image_grid_pinpoints_order="height_width")
    assert [list(canvas) for canvas in NEXT.canvases_of_hub(own)] == [pair[::-1] for pair in RELEASED]


def test_any_other_list_of_the_hub_is_read_as_transformers_reads_it() -> None:
    assert NEXT.canvases_of_hub(next_config([[336, 672], [672, 672]])) == ((672, 336), (672, 672))


def test_what_is_written_is_read_back() -> None:
    for canvases in (NEXT.released(336), ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))):
        config = next_config([])
        put_canvases(config, canvases)
        again = NEXT.config_class.from_dict(config.to_dict())
        assert NEXT.canvases_of_hub(again) == canvases == NEXT.tiling(again, "tiles").canvases
        assert NEXT.processor_files(again)["preprocessor_config.json"]["image_grid_pinpoints"] == [
            [h, w] for w, h in canvases
        ]
        assert NEXT.original_keys(again, "tiles")["image_grid_pinpoints"] == [list(each) for each in canvases]


def test_golden_counts_of_both_families() -> None:
    config = next_config(RELEASED)
    put_canvases(config, NEXT.canvases_of_hub(config))
    tiling = NEXT.tiling(config, "tiles")
    counts = {(640, 480): 2340, (300, 100): 776, (100, 300): 1392, (320, 240): 1026, (1000, 300): 2182}
    assert {size: tiling.num_tokens(tiling.layout(*size)) for size in counts} == counts
    whole = NEXT.tiling(config, "pad")
    assert whole.num_tokens(WHOLE) == 577 and not whole.canvases
    config = ONEVISION.config_class()
    put_canvases(config, ONEVISION.canvases_of_hub(config))
    assert config.image_grid_pinpoints[1] == [768, 384]
    tiling = ONEVISION.tiling(config, "tiles")
    counts = {(640, 480): 2929, (1920, 1080): 7269, (1875, 1375): 7353, (300, 100): 981}
    assert {size: tiling.num_tokens(tiling.layout(*size)) for size in counts} == counts


def test_a_llava_of_one_square_has_neither_canvases_nor_files_of_its_own() -> None:
    config = LLAVA.config_class()
    tiling = LLAVA.tiling(config, "pad")
    assert (tiling.num_tokens(WHOLE), tiling.canvases, tiling.has_newline) == (576, (), False)
    assert LLAVA.processor_files(config) == {}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "a word",
        [336, 672],
        [[336]],
        [[336, 672, 336]],
        [[336, 671]],
        [[0, 336]],
        [[True, 336]],
        [[336 * 65, 336]],
    ],
)
def test_pinpoints_that_tiles_do_not_fill_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"x: image_grid_pinpoints is .*squares of 336 px"):
        check_pinpoints(value, 336, "x")


def test_templates_by_language_model() -> None:
    def text(kind: str, rows: int = 32000) -> SimpleNamespace:
        return SimpleNamespace(model_type=kind, vocab_size=rows)

    named = [
        NEXT.template(each)
        for each in (text("llama"), text("llama", 64000), text("llama", 128256), text("mistral"), text("qwen2", 151936))
    ]
    assert named == ["v1", "chatml", "llava_llama_3", "mistral_instruct", "qwen_1_5"]
    assert [LLAVA.template(text(kind)) for kind in ("llama", "mistral", "qwen2")] == ["v1", "mistral_instruct", "v1"]


def test_each_family_has_the_name_of_its_config() -> None:
    assert {name: family.config_class.model_type for name, family in FAMILIES.items()} == {n: n for n in FAMILIES}
