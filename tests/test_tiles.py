"""Images in tiles: whatever saves work or memory changes no loss, no gradient and no answer, in both families."""

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.curves import NEXT
from helpers.interrupted import assert_same_run, settings, train, train_until
from helpers.runs import recipe, talk, write_records
from helpers.tiled import KIT, ORIGINALS
from llava_accel.console.output import Console
from llava_accel.data.loader import Loaded, load_windows
from llava_accel.data.questions import load_questions
from llava_accel.inference.answering import answer_batch
from llava_accel.model import objective as objective_file
from llava_accel.model.objective import Objective
from llava_accel.model.processing import Processing, load_processing
from llava_accel.recipe import Recipe
from llava_accel.runtime.context import RunContext
from llava_accel.runtime.engines import build_accelerator
from llava_accel.setup.assembly import build_objective
from llava_accel.setup.datasets import Part, open_data
from llava_accel.setup.vision_cache import attach_features

pytestmark = pytest.mark.slow

FAMILIES = tuple(ORIGINALS)
TOLERANCE = 1e-5
FOUR_BITS: dict[str, Any] = {"quantization": {"bits": 4}}
ANSWERS = {"a red square": 5, "a red circle": 3, "two small blue squares": 2}
Gradients = dict[str, Tensor]


def records() -> list[dict[str, object]]:
    """Three questions on one image, one of several answers, one on an image that OneVision shrinks, one on two images,
    the first among them, and one on none."""
    asked = [("What is it?", "a red square", ["square.png"]), ("How many are there?", "two", ["square.png"])]
    asked += [("What is it called?", "a thing", ["square.png"]), ("What is it?", "blue", ["tall.png"])]
    asked += [("Describe it.", "large and bright, " * 30, ["trap_ov.png"])]
    asked += [("Are they alike?", "yes", ["square.png", "wide.png"]), ("Say something.", "nothing to see", [])]
    found = [talk(number, question, answer, *images) for number, (question, answer, images) in enumerate(asked)]
    found[3]["answers"] = ANSWERS
    return found


ALL = list(range(len(records())))


@dataclass(frozen=True)
class Ready:
    """A model in fp32 of which all weights are trained, and the data."""

    run: RunContext
    processing: Processing
    objective: Objective
    part: Part

    def batch(self, rows: Sequence[int], *, share: bool = False, pack: bool = False) -> Loaded:
        """A micro-batch as the loop loads it."""
        share_up_to = self.run.recipe.data.max_length if share else 0
        device = torch.device("cpu")
        windows = load_windows(
            self.part.corpus,
            self.part.image_reader,
            [[list(rows)]],
            workers=0,
            device=device,
            on_error=lambda error: pytest.fail(str(error)),
            share_up_to=share_up_to,
            pack=pack,
        )
        return next(windows)[0]

    def learn(self, *batches: Loaded) -> tuple[float, Gradients]:
        """The sum of the losses of micro-batches, and its gradient."""
        self.objective.zero_grad()
        loss = torch.stack([self._backward(batch) for batch in batches]).sum()
        named = self.objective.named_parameters()
        return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}

    def _backward(self, batch: Loaded) -> Tensor:
        loss = self.objective(**batch)
        loss.backward()
        return loss.detach()


def make(folder: Path, family: str, **model: Any) -> Ready:
    base, tower = (str(KIT / name) for name in ORIGINALS[family])
    settings: Recipe = recipe(
        folder,
        write_records(folder / "data.json", records()),
        model={"base": base, "vision_tower": tower, "adapter": "", "train": "full", "train_vision": True} | model,
        data={"images": str(NEXT / "images"), "max_length": 4096, "answers": "weighted"},
    )
    run = RunContext(settings, build_accelerator(settings), Console(False))
    processing = load_processing(settings.model, settings.data.image_aspect)
    part, _ = open_data(run, processing)
    objective, _ = build_objective(run, processing)
    return Ready(run, processing, objective.train(), part)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Ready]:
    """A family's model, with its tower trained or frozen."""
    return cache(lambda family, train_vision: make(tmp_path_factory.mktemp("m"), family, train_vision=train_vision))


@pytest.fixture(params=FAMILIES)
def trained(request: pytest.FixtureRequest, made: Callable[[str, bool], Ready]) -> Ready:
    """With its tower trained."""
    return made(request.param, True)


@pytest.fixture(params=FAMILIES)
def frozen(request: pytest.FixtureRequest, made: Callable[[str, bool], Ready]) -> Ready:
    """With its tower frozen."""
    return made(request.param, False)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles each call of the tower saw."""
    seen: list[int] = []
    encode = objective_file.tower_features

    def counting(tower: nn.Module, config: Any, pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return encode(tower, config, pixels)

    monkeypatch.setattr(objective_file, "tower_features", counting)
    return seen


def assert_same(
    found: tuple[float, Gradients],
    expected: tuple[float, Gradients],
    tolerance: float = TOLERANCE,
    part: str = "newline",
) -> None:
    """`part`: occurs in the name of a weight that is trained."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys() and any(part in name for name in found[1])
    scale = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        # Some gradients are sums that cancel to almost nothing; their noise is measured by the whole gradient.
        assert torch.dist(found[1][name], gradient) <= tolerance * max(gradient.norm(), 1e-3 * scale), name


def num_tiles(ready: Ready, rows: Sequence[int]) -> int:
    views = {view for row in rows for view in ready.part.corpus.encode(row).example.images}
    return sum(view.layout.num_tiles for view in views)


@pytest.mark.parametrize("pack", [False, True])
def test_shared_prefixes_and_packs_give_the_gradient_of_separate_rows(trained: Ready, pack: bool) -> None:
    separate, shared = trained.batch(ALL), trained.batch(ALL, share=True, pack=pack)
    assert shared["branched"] and not separate["branched"]
    (rows, seq), (fewer, _) = (batch["input_ids"].shape for batch in (separate, shared))  # pyright: ignore
    assert fewer < rows and seq > 100, "answers and questions of a record and an image share a row"
    assert_same(trained.learn(shared), trained.learn(separate))


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_give_the_gradient_of_separate_rows_in_four_bits(tmp_path: Path, family: str) -> None:
    ready = make(tmp_path, family, train="lora", train_vision=False, **FOUR_BITS)
    assert any("Linear4bit" in type(module).__name__ for module in ready.objective.modules())
    shared = ready.learn(ready.batch(ALL, share=True, pack=True))
    assert_same(shared, ready.learn(ready.batch(ALL)), part="lora_B")


def test_rows_side_by_side_give_the_gradient_of_rows_alone(trained: Ready) -> None:
    separate, packed = trained.batch([1, 4, 6]), trained.batch([1, 4, 6], pack=True)
    assert len(packed["input_ids"]) < len(separate["input_ids"])  # pyright: ignore
    assert_same(trained.learn(packed), trained.learn(separate))


def test_an_image_alone_is_cut_beside_a_record_that_shows_it_among_others(trained: Ready) -> None:
    """The two views of one file do not become one."""
    together = trained.batch([0, 5])
    side = trained.processing.tiling.tile_tokens
    layouts = together["image_layouts"]
    assert [layout.num_tiles for layout in layouts] == [5, 1, 1]  # pyright: ignore
    assert len(together["pixel_values"]) == 7 and side < len(together["image_index"])  # pyright: ignore
    assert_same(trained.learn(together), trained.learn(trained.batch([0]), trained.batch([5])))


def test_text_alone_changes_neither_newline_nor_projector_nor_tower(trained: Ready) -> None:
    loss, gradients = trained.learn(trained.batch([6]))
    assert loss > 0
    of_images = [name for name in gradients if any(part in name for part in ("newline", "projector", "vision_tower"))]
    assert len(of_images) > 6 and not any(gradients[name].any() for name in of_images)
    both = trained.learn(trained.batch([6]), trained.batch([0]))
    assert_same(trained.learn(trained.batch([0, 6])), both)


@pytest.mark.parametrize("every", [True, 2])
def test_checkpointed_layers_give_the_same_gradient(frozen: Ready, tmp_path: Path, every: bool | int) -> None:
    family = frozen.objective.llava.config.model_type
    checkpointed = make(tmp_path, family, train_vision=False, gradient_checkpointing=every)
    rows = {"rows": ALL, "share": True}
    assert_same(checkpointed.learn(checkpointed.batch(**rows)), frozen.learn(frozen.batch(**rows)), 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vision", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_few_tiles_at_a_time_give_the_same_gradient(
    family: str, train_vision: bool, size: int, made: Callable[[str, bool], Ready], tiles: list[int]
) -> None:
    ready = made(family, train_vision)
    batch = ready.batch(ALL)
    expected = ready.learn(batch)
    assert tiles == [num_tiles(ready, ALL)]
    tiles.clear()
    ready.objective.tower_batch = size
    try:
        found = ready.learn(batch)
    finally:
        ready.objective.tower_batch = 0
    assert max(tiles) == size and sum(tiles) >= num_tiles(ready, ALL)
    assert_same(found, expected)


def attach(ready: Ready, **data: Any) -> None:
    """Store its features; afterwards its store is to be taken off."""
    changed = ready.run.recipe.data.model_copy(update={"cache_features": True, **data})
    run = RunContext(ready.run.recipe.model_copy(update={"data": changed}), ready.run.accelerator, ready.run.console)
    attach_features(run, ready.processing, ready.objective, [ready.part])


def test_features_of_tiles_never_take_more_than_their_limit(frozen: Ready, tmp_path: Path, tiles: list[int]) -> None:
    expected, folder = frozen.learn(frozen.batch(ALL)), tmp_path / "features"

    def stored(limit: int) -> int:
        """Bytes, once more than `limit` were to be stored; what is not is computed."""
        shutil.rmtree(folder, ignore_errors=True)
        try:
            attach(frozen, cache_dir=str(tmp_path), cache_max_gb=limit * 1e-9)
            for _ in range(2):
                tiles.clear()
                assert_same(frozen.learn(frozen.batch(ALL)), expected, 1e-6)
                frozen.objective.flush_features()
        finally:
            frozen.objective.features = frozen.part.image_reader.store = None
        return sum(file.stat().st_size for file in folder.glob("*/*"))

    whole = stored(10**9)
    assert tiles == []
    assert 0 < stored(whole // 2) <= whole // 2 and 0 < sum(tiles) < num_tiles(frozen, ALL)


@pytest.mark.parametrize("stored", [[], [0, 1], [4, 5], ALL])
def test_stored_features_give_the_gradient_of_computed_ones(
    frozen: Ready, tmp_path: Path, tiles: list[int], stored: list[int]
) -> None:
    expected = frozen.learn(frozen.batch(ALL))
    try:
        attach(frozen, cache_dir=str(tmp_path))
        if stored:
            frozen.learn(frozen.batch(stored))
            frozen.objective.flush_features()
        tiles.clear()
        found = frozen.learn(frozen.batch(ALL))
    finally:
        frozen.objective.features = frozen.part.image_reader.store = None
    computed = num_tiles(frozen, ALL) - num_tiles(frozen, stored)
    assert sum(tiles) == computed, "only tiles without features run through the tower"
    assert_same(found, expected, 1e-6)
    if not stored:
        assert found[0] == expected[0] and all(torch.equal(found[1][name], each) for name, each in expected[1].items())


def test_answers_are_the_same_however_many_questions_are_asked_at_once(frozen: Ready) -> None:
    ready, rows = frozen, [0, 1, 2, 4, 5, 6]

    def ask(batches: Sequence[list[int]]) -> dict[int, tuple[list[int], float]]:
        found: dict[int, tuple[list[int], float]] = {}
        loaded = load_questions(
            ready.part.corpus,
            ready.part.image_reader,
            batches,
            workers=0,
            device=torch.device("cpu"),
            max_length=4096,
        )
        for batch, asked in loaded:
            answered = answer_batch(ready.objective, batch, asked, stop_ids=asked.stop_ids, max_new_tokens=5)
            losses = answered.losses.split(asked.num_targets.tolist())
            for index, ids, loss in zip(asked.indices.tolist(), answered.ids, losses, strict=True):
                found[index] = ids, float(loss.sum())
        return found

    together, alone = ask([rows]), ask([[row] for row in rows])
    assert {row: ids for row, (ids, _) in together.items()} == {row: ids for row, (ids, _) in alone.items()}
    assert [together[row][1] for row in rows] == pytest.approx([alone[row][1] for row in rows], rel=TOLERANCE)
    assert len({tuple(ids) for ids, _ in alone.values()}) > 2, "the model must not answer all alike"


def test_two_families_in_one_process_train_as_each_does_alone(tmp_path: Path) -> None:
    """Steps in turn, both models alive."""

    def steps(ready: Ready) -> Callable[[], float]:
        optimizer = torch.optim.SGD(ready.objective.parameters(), lr=1e-3)

        def step() -> float:
            loss, _ = ready.learn(ready.batch(ALL, share=True))
            optimizer.step()
            return loss

        return step

    def start(name: str, family: str) -> Callable[[], float]:
        folder = tmp_path / name / family
        folder.mkdir(parents=True)
        return steps(make(folder, family))

    alone: dict[str, list[float]] = {}
    for family in FAMILIES:
        step = start("alone", family)
        alone[family] = [step() for _ in range(3)]
        del step
        gc.collect()
    both = {family: start("both", family) for family in FAMILIES}
    found: dict[str, list[float]] = {family: [] for family in FAMILIES}
    for _ in range(3):
        for family, step in both.items():
            found[family].append(step())
    assert found == alone and all(losses[2] < losses[0] for losses in alone.values())


@pytest.mark.parametrize(("family", "more"), [("llava_next", {}), ("llava_next", FOUR_BITS), ("llava_onevision", {})])
def test_a_killed_run_goes_on_at_the_same_numbers(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [dict(record) for record in records()]
    (data / "train.json").write_text(json.dumps([*rows, *({**row, "id": f"again {row['id']}"} for row in rows[:6])]))
    (data / "eval.json").write_text(json.dumps(rows[:4]))
    base, tower = (str(KIT / name) for name in ORIGINALS[family])

    def tables(name: str) -> Any:
        return settings(
            tmp_path / name,
            data,
            train={"epochs": 1},
            model={"base": base, "vision_tower": tower, "adapter": "", **more},
            data={
                "train": str(data / "train.json"), "eval": str(data / "eval.json"), "workers": 0, "max_length": 4096,
                "images": str(NEXT / "images"), "cache_dir": str(tmp_path / name / "cache"), "share_prefix": True,
            },
        )  # fmt: skip

    whole = train(tables("whole"))
    run = train_until(tables("killed"), 3)  # within the epoch, a step after the newest checkpoint
    assert not (run / "export").exists()
    assert_same_run(train(tables("killed")), whole)
