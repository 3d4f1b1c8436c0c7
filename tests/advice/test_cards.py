"""What cards take is the plan of a recipe on its largest rows, and recipes/README.md says what is computed."""

from pathlib import Path

import pytest

from helpers.cards import HEAD, RECIPES, line, planned_recipes, profile, row
from helpers.kinds import ALL_KINDS
from helpers.tiled import KIT
from helpers.verbs import start
from llava_accel.advice.cards import CARDS, largest_batches, largest_images
from llava_accel.data.tiling import Tiling
from llava_accel.recipe import make_recipe

TABLE = (RECIPES / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in planned_recipes()] if ALL_KINDS else ["pretrain_projector"])
def test_the_table_says_what_plan_computes(name: str, fresh_accelerator: None) -> None:
    rows = TABLE.partition(line(HEAD))[2].splitlines()
    shown = next(text for text in rows if text.startswith(f"| [{name}.toml]"))
    assert shown == row(RECIPES / f"{name}.toml"), "python tests/helpers/cards.py prints the table"


def test_the_table_has_every_recipe_whose_base_is_published() -> None:
    names = [path.name for path in planned_recipes()]
    assert len(names) == 11 and line(HEAD) in TABLE
    rows = TABLE.partition(line(HEAD))[2].partition("\n\n")[0]
    assert [text.split("]")[0].removeprefix("| [") for text in rows.splitlines()[2:]] == names
    assert profile(RECIPES / "okvqa_qlora.toml") == "one GPU" and profile(RECIPES / "okvqa_lora.toml") == "zero2"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["next-vicuna", "onevision-qwen"])
def test_a_base_that_is_here_is_planned_as_it_is(base: str, fresh_accelerator: None) -> None:
    model = {"base": str(KIT / base), "lora": {"rank": 4, "alpha": 8}}
    data = {"train": "nowhere.json", "eval_fraction": 0.1}
    found = largest_batches(make_recipe({"run": {"name": "t"}, "model": model, "data": data}), 4)
    assert found.assumed == "" and found.num_tiles > 1 and found.num_tokens > 100
    assert [*found.batches] == ["one GPU", "ddp", "zero2", "zero3", "zero3_offload", "fsdp2"]
    for batches in found.batches.values():
        assert len(batches) == len(CARDS) and 0 < batches[0] and list(batches) == sorted(set(batches))


@pytest.mark.slow
def test_the_command_says_that_it_is_computed_and_reads_no_data(tmp_path: Path, fresh_accelerator: None) -> None:
    recipe = tmp_path / "mine.toml"
    base = KIT / "next-vicuna"
    recipe.write_text(f'[run]\nname = "mine"\n[model]\nbase = "{base}"\n[data]\ntrain = "nowhere.json"\n')
    ended = start("plan", str(recipe), "--cards", "--gpus", "2")
    assert ended.code == 0, ended.err
    said = " ".join(ended.out.split())
    assert "computed, not measured" in said and "80 GB" in said and "fsdp2 x 2" in said and "assumed" not in said


def test_the_largest_image_is_one_that_rows_hold() -> None:
    assert largest_images(Tiling(336, 576), 4000) == [(336, 336)]
    canvases = ((336, 672), (672, 336), (672, 672))
    tiling = Tiling(336, 576, canvases, True)
    assert largest_images(tiling, 4000) == [(672, 672)]
    assert largest_images(tiling, 2000)[0] in canvases[:2]
    assert largest_images(tiling, 10)[0] in canvases[:2], "the smallest, if none fits"
