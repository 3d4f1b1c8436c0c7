"""The script of the GPU's figures works, and what it will measure has the shapes that it says and was planned before."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gpu.figures import llava_config, main, make_base, make_recipe_for
from llava_accel.plan import plan


def test_the_script_gives_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = main(["--tiny", "--rounds", "1", "--folder", str(tmp_path)])
    assert [(row.unit, row.is_limit) for row in rows] == [("%", False), ("x", False), ("GiB", True), ("x", False)]
    assert all(math.isfinite(row.value) and row.value > 0 for row in rows)
    assert rows[2].is_reached == (rows[2].value <= rows[2].target) and not rows[0].is_reached
    shown = capsys.readouterr().out
    assert "tiny: of no meaning" in shown and all(row.title in shown for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would start")
def test_without_a_gpu_the_large_model_is_refused_and_the_tiny_one_named() -> None:
    with pytest.raises(SystemExit, match="--tiny"):
        main([])


def test_the_large_shapes_are_those_of_llava_1_5_7b() -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config(tiny=False, image_token_id=32000))

    def count(*parts: torch.nn.Module) -> int:
        return sum(weight.numel() for part in parts for weight in part.parameters())

    assert count(model.model.language_model, model.lm_head) == pytest.approx(6.74e9, rel=1e-3)
    assert count(model.model.vision_tower) == pytest.approx(303.5e6, rel=1e-2)
    assert count(model.model.multi_modal_projector) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096


def test_the_peak_of_qlora_is_planned_below_its_limit(tmp_path: Path, fresh_accelerator: None) -> None:
    base = make_base(tmp_path / "base", tiny=False, weights=False)
    found = plan(make_recipe_for(tmp_path, base, False, batch=2, bits=4, again=True), None, 8, probe=False)[0]
    assert 4e9 < found.quantised + found.weights < found.total < 12e9
