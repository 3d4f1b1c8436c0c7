"""With stored features nothing is decoded, the tower does not run, and every number stays what it was."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import llava_accel.train as verb
from helpers.exported import export
from helpers.runs import metrics, mixed_records, recipe, trained, without_times, write_records
from helpers.verbs import start, write_recipe
from llava_accel import cache as verb_cache
from llava_accel.cache import cache, clear, show
from llava_accel.console.output import Console
from llava_accel.data import feature_store, pixels
from llava_accel.model import objective as objective_file
from llava_accel.recipe import Recipe

pytestmark = pytest.mark.slow

STEPS = 6
IMAGES = 7  # different ones in the data
FOUR = {"cache_features": True, "cache_max_gb": 4 * (16 * 32 * 4 + 220) * 1e-9}
"""[data] with room for four records."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "data.json", mixed_records(12))


@pytest.fixture
def made(data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe of two epochs with evaluation, in a run folder of its own and with one cache for all."""

    def make(name: str, **changes: Any) -> Recipe:
        where = {"cache_dir": str(tmp_path / "cache"), "eval_fraction": 0.25, "workers": 0}
        return recipe(
            tmp_path / name,
            data,
            data=where | changes.pop("data", {}),
            train={"max_steps": STEPS, "per_device_batch_size": 3} | changes.pop("train", {}),
            eval={"at_start": True, "every": 3, "blind_limit": 2},
            **changes,
        )

    return make


@pytest.fixture(autouse=True)
def _features_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the machine: a second pass finds what the first has computed."""
    monkeypatch.setattr(feature_store, "_FIRST_WAIT", 0.0)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts images that are decoded and that run through the tower."""
    counts = {"decoded": 0, "encoded": 0}
    decode, encode = pixels.decode, objective_file.tower_features

    def counting_decode(path: Path, *settings: Any) -> Any:
        counts["decoded"] += 1
        return decode(path, *settings)

    def counting_encode(tower: nn.Module, config: Any, tiles: torch.Tensor) -> torch.Tensor:
        counts["encoded"] += len(tiles)
        return encode(tower, config, tiles)

    monkeypatch.setattr(pixels, "decode", counting_decode)
    monkeypatch.setattr(objective_file, "tower_features", counting_encode)
    return counts


def outcome(run: Recipe) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    verb.train(run)
    folder = Path(run.run.output_dir)
    return without_times(metrics(folder)), trained(folder / "export")


def test_cold_warm_and_no_cache_take_the_same_steps(
    made: Callable[..., Recipe], work: dict[str, int], tower_reads: list[str]
) -> None:
    lines, weights = outcome(made("none", data={"cache_features": False}))
    without = dict(work)
    for name in ("cold", "warm"):
        work.update(decoded=0, encoded=0)
        tower_reads.clear()
        found, others = outcome(made(name))
        for one, other in zip(lines, found, strict=True):
            assert one.keys() == other.keys()
            values, expected = ({**line, **line.get("eval", {})} for line in (other, one))
            for key in set(expected) - {"eval"}:
                assert values[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
        for key, tensor in weights.items():
            assert torch.dist(others[key], tensor) <= 1e-5 * tensor.norm(), (name, key)
        if name == "cold":
            assert 0 < work["encoded"] < without["encoded"]
    assert work == {"decoded": 0, "encoded": 0} and tower_reads == [], "everything was stored"


def test_a_image_without_features_has_the_tower_read_and_the_same_losses_bit_by_bit(
    made: Callable[..., Recipe], tower_reads: list[str], work: dict[str, int]
) -> None:
    # A tower that sees several images at once sums in another order. Dropout would tell if reading drew numbers.
    alone = {"train": {"per_device_batch_size": 1}, "model": {"adapter": "", "lora": {"dropout": 0.1}}}

    def steps(name: str, **data: Any) -> list[dict[str, Any]]:
        tower_reads.clear()
        work.update(encoded=0)
        return [line for line in outcome(made(name, data=data, **alone))[0] if "loss" in line]

    expected = steps("none", cache_features=False)
    without = work["encoded"]
    assert steps("cold", **FOUR) == expected
    assert steps("some are stored", **FOUR) == expected
    assert 0 < work["encoded"] < without
    assert tower_reads and len(tower_reads) == len(set(tower_reads)), "it is read once, and its name is known"


def test_features_are_those_of_the_tower_that_was_trained(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trains = {"model": {"train_vision": True}, "optim": {"vision_learning_rate": 1e-2}}
    verb.train(made("tower", **trains))
    verb.train(made("base"))
    merged = export(monkeypatch, tmp_path / "tower" / "run", "merged", tmp_path / "merged")
    base = {"model": {"base": str(merged), "vision_tower": ""}}
    lines, _ = outcome(made("none", data={"cache_features": False}, **base))
    for name in ("cold", "warm"):
        found, _ = outcome(made(name, **base))
        assert [line["loss"] for line in found if "loss" in line] == pytest.approx(
            [line["loss"] for line in lines if "loss" in line], rel=1e-5
        )
    assert len([*(tmp_path / "cache" / "features").glob("*/")]) == 2, "the base's tower and the trained one"


def test_the_verb_fills_the_cache_for_training_and_evaluation(
    made: Callable[..., Recipe], work: dict[str, int]
) -> None:
    assert cache(made("ahead")) == IMAGES
    assert work["encoded"] == IMAGES
    cache(made("ahead"))
    assert work["encoded"] == IMAGES, "what is stored is not computed again"
    verb.train(made("run"))
    assert work["encoded"] == IMAGES


def test_other_preprocessing_is_another_store(made: Callable[..., Recipe], work: dict[str, int]) -> None:
    cache(made("one"))
    cache(made("two", data={"image_aspect": "crop"}))
    assert work["encoded"] == 2 * IMAGES


def test_what_does_not_fit_is_computed(made: Callable[..., Recipe], work: dict[str, int], tmp_path: Path) -> None:
    assert 0 < cache(made("little", data=FOUR)) < IMAGES
    work.update(encoded=0)
    verb.train(made("run", data=FOUR))
    assert work["encoded"] > 0
    assert sum(file.stat().st_size for file in tmp_path.glob("cache/features/*/*")) <= FOUR["cache_max_gb"] * 1e9


def test_auto_keeps_nothing_where_not_all_would_fit(made: Callable[..., Recipe], tmp_path: Path) -> None:
    verb.train(made("run", data={"cache_max_gb": 1e-6}))
    assert not list(tmp_path.glob("cache/features/*/*.safetensors"))


def test_a_flipped_bit_is_found_and_the_losses_stay(made: Callable[..., Recipe], tmp_path: Path) -> None:
    cache(made("ahead"))
    expected = outcome(made("whole"))
    (file,) = (tmp_path / "cache" / "features").glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[8 + int.from_bytes(content[:8], "little")] ^= 64  # after the header, which begins with its length
    file.write_bytes(content)
    lines, weights = outcome(made("damaged"))
    for line, other in zip(lines, expected[0], strict=True):
        assert line.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
    assert all(torch.dist(tensor, expected[1][key]) <= 1e-4 * tensor.norm() for key, tensor in weights.items())
    assert not file.exists() and list((tmp_path / "cache" / "features").glob("*/*.safetensors"))


def test_a_disk_that_fills_up_costs_the_cache_and_not_the_run(
    made: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = outcome(made("whole", data={"cache_features": False}))[0]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_store, "save_file", full)
    lines = outcome(made("full"))[0]
    assert [line.get("loss") for line in lines] == pytest.approx([line.get("loss") for line in expected], rel=1e-5)
    assert capsys.readouterr().err.count("No space left on device") == 1
    with pytest.raises(ValueError, match=r"data\.cache_dir: the others could not be stored"):
        cache(made("verb"))


def test_the_cache_is_shown_and_emptied(made: Callable[..., Recipe], tmp_path: Path) -> None:
    verb.train(made("run"))
    folder = tmp_path / "cache"
    (folder / "mine.txt").write_text("precious")
    arguments = (str(tmp_path / "recipe.toml"), f"data.cache_dir={folder}")
    write_recipe(tmp_path)
    shown = start("cache", *arguments, "--list")
    assert shown.code == 0 and "features of tower" in shown.out and "records of data files" in shown.out
    assert any(path.suffix == ".safetensors" for path in folder.rglob("*"))
    cleared = start("cache", *arguments, "--clear")
    assert cleared.code == 0 and "removed" in cleared.out
    assert [path.name for path in folder.rglob("*") if path.is_file() and path.name != "lock"] == ["mine.txt"]
    assert start("cache").code == 2
    verb.train(made("again"))


def test_a_folder_of_features_that_cannot_be_made_is_said(made: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "features").write_text("a file where the features go")
    with pytest.raises(ValueError, match=r"data\.cache_dir: features cannot be written there\. Name a folder"):
        cache(made("run"))


def test_files_that_go_while_the_cache_is_shown_or_emptied_are_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_bytes(b"x" * 500_000)
    both = {"addresses of images": [tmp_path / "there", tmp_path / "gone"]}
    monkeypatch.setattr(verb_cache, "contents", lambda folder: both)
    show(tmp_path, Console())
    clear(tmp_path, Console())
    said = capsys.readouterr().out
    assert "addresses of images" in said and "0.5 MB, from" in said and not (tmp_path / "there").exists()


@pytest.mark.parametrize("changes", [{"data": {"cache_features": False}}, {"model": {"train_vision": True}}])
def test_the_verb_refuses_a_recipe_without_a_cache(made: Callable[..., Recipe], changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"stores no features.*Set data\.cache_features = true"):
        cache(made("run", **changes))
