"""Every kind of base goes all the way: check, train with stored features, resume, every export and back.

The suite takes few kinds, in which every pair of tower, layout, language model and tokenizer occurs; with
LLAVA_ACCEL_ALL_KINDS=1 it takes all of them.
"""

import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.bases import Kind, every_kind, make_base, pairwise_kinds
from helpers.exported import assert_same, logits, prove_here
from helpers.kinds import ALL_KINDS
from helpers.runs import metrics, mixed_records, tables, trained, without_times, write_records
from helpers.verbs import start
from llava_accel.recipe.toml import to_toml

pytestmark = pytest.mark.slow

KINDS = every_kind() if ALL_KINDS else pairwise_kinds()
STEPS = 3


def recipe_file(folder: Path, kind: Kind) -> Path:
    model = {"base": "", "vision_tower": "", "adapter": "", **make_base(folder / "made", kind)}
    data = write_records(folder / "data.json", mixed_records(4))
    settings: dict[str, Any] = {
        "data": {"eval": str(data), "labels": "original" if kind.template == "qwen_1_5" else "answers"},
        "train": {"per_device_batch_size": 2, "max_steps": STEPS, "epochs": STEPS},
        "eval": {"at_start": True, "every": STEPS, "max_new_tokens": 2, "blind_limit": 0},
        "checkpoint": {"every": 1, "keep": STEPS, "verify": True},
    }
    (folder / "recipe.toml").write_text(to_toml(tables(folder, data, model=model, **settings)))
    return folder / "recipe.toml"


def succeeds(verb: str, *arguments: object) -> str:
    ended = start(verb, *map(str, arguments), fresh=True)
    assert ended.code == 0, f"{verb} {arguments}: {ended.err}\n{ended.out[-2000:]}"
    return ended.out


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_base_of_this_kind_goes_all_the_way(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)
    recipe, run = recipe_file(tmp_path, kind), tmp_path / "run"
    succeeds("check", recipe)
    said = succeeds("train", recipe)
    assert ("not verified" in said) == (kind.layout != "hub"), said
    assert list((tmp_path / "cache" / "features").glob("*/*.safetensors")), "features were stored"
    lines, weights = without_times(metrics(run)), trained(run / "export")
    # Resumed, now with stored features, it comes to the same numbers.
    for step in range(2, STEPS + 1):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    assert "resumed from" in succeeds("train", recipe)
    again = without_times(metrics(run))
    assert [line["step"] for line in again] == [line["step"] for line in lines]
    assert [line["loss"] for line in again if "loss" in line] == pytest.approx(
        [line["loss"] for line in lines if "loss" in line], rel=1e-5
    )
    assert all(
        torch.dist(tensor, weights[name]) <= 1e-4 * tensor.norm() for name, tensor in trained(run / "export").items()
    )
    expected = logits(run)
    for form, refusal in kind.forms().items():
        out = tmp_path / form
        ended = start("export", str(run), "--to", form, "--out", str(out), "--compare", fresh=True)
        if refusal:
            assert ended.code == 2 and refusal in ended.err and not out.exists(), ended.err
            continue
        assert ended.code == 0, f"{form}: {ended.err}"
        assert_same(expected, logits(out))


def test_every_pair_occurs_among_the_kinds_of_the_suite() -> None:
    def pairs(kinds: list[Kind]) -> set[Any]:
        return {pair for kind in kinds for pair in combinations(zip(kind._fields, kind, strict=True), 2)}

    assert pairs(pairwise_kinds()) == pairs(every_kind())
    assert len(pairwise_kinds()) <= 14 < len(every_kind())
