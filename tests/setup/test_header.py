"""What a run says before its first step: each thing once, in 80 columns, and why it computes where it does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.runs import PARITY, metrics, recipe, tables
from helpers.verbs import start
from llava_accel.console.output import Console
from llava_accel.recipe import make_recipe
from llava_accel.recipe.toml import to_toml
from llava_accel.runtime import devices, launch_profile
from llava_accel.setup import header


def test_a_run_begins_with_what_it_is_about_in_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "bf16_on_cpu", lambda: True)
    records = json.loads((PARITY / "traj_lora.json").read_text())
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file, some in zip(files, (records[:6], records[6:]), strict=True):
        file.write_text(json.dumps(some))
    sources = [{"path": str(files[0])}, {"path": str(files[1]), "weight": 3.0}]
    settings = tables(
        tmp_path,
        data={"train": sources, "eval": [{"path": str(PARITY / "traj_lora.json")}]},
        eval={"at_start": True, "limit": 2},
        train={"per_device_batch_size": 2, "accumulation_steps": 2},
    )
    (tmp_path / "recipe.toml").write_text(to_toml(settings))
    ended = start("train", str(tmp_path / "recipe.toml"))
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    begin = lines.index("run run")
    block = lines[begin : next(number for number in range(begin + 1, len(lines)) if lines[number][:2] != "  ")]
    text = " ".join(" ".join(block).split())
    assert all(len(line.replace(str(tmp_path), "")) <= 80 for line in block)
    for part in (
        f"folder {tmp_path}/run data",
        "data 8 records with 7 images, from 2 sources",
        "mix one.json 50 %, two.json 50 %",
        f"held out 8 records of {PARITY}/traj_lora.json, of which each evaluation asks 2",
        "steps 3 = 1 epoch of 3 steps",
        "batch 4 examples a step = 2 x accumulation 2 x 1 process",
        "device CPU, fp32",
        "trains LoRA of rank 4 and the projector",
        "logs metrics.jsonl",
    ):
        assert part in text and ended.out.count(f"\n  {part.split()[0]} ") == 1, part
    assert ended.out.count("\ntraining on the CPU because ") == 1
    assert " ".join(ended.out.split()).count('with run.precision = "bf16" a step takes about 0.6 of the time') == 1
    figures = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [(each["name"], each["records"], each["examples"]) for each in figures["sources"]] == [
        ("one.json", 6, 6.0), ("two.json", 2, 6.0)
    ]  # fmt: skip
    trained = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [sum(line[f"num_examples/{name}"] for line in trained) for name in ("one.json", "two.json")] == [6, 6]
    assert all(
        line["num_examples"] == line["num_examples/one.json"] + line["num_examples/two.json"] for line in trained
    )
    assert (
        begin < lines.index("weights") < next(n for n, line in enumerate(lines) if line.startswith("before training"))
    )
    assert [line for line in lines if line.startswith("step 3: loss ") and line.endswith(", best")]


def test_a_gpu_and_several_ranks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(header, "read_profile", lambda: launch_profile.Profile("ddp", {}))
    assert header.describe_device(recipe(tmp_path), torch.device("cuda"), 2) == "2 x NVIDIA H100 80GB HBM3, bf16, DDP"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"train": "projector", "adapter": ""}, "the projector"),
        ({"train": "full", "adapter": "", "train_vision": True}, "the language model, the projector and the vision tower"),
        ({"quantization": {"bits": 4}, "train_projector": False}, "LoRA of rank 4; the base in 4 bits"),
    ],
)  # fmt: skip
def test_what_is_trained_is_said_in_words(tmp_path: Path, model: dict[str, Any], said: str) -> None:
    assert header._trains(make_recipe(tables(tmp_path, model=model)).model) == said


def test_facts_are_wrapped_under_their_names_and_paths_stay_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/a/" + "long-folder/" * 8 + "file.jsonl"
    Console().pairs("a title", {"one": "word " * 30, "longer": path, "nothing": ""})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a title" and lines[1].startswith("  one      word word")
    assert lines[2].startswith("           word") and f"  longer   {path}" in lines and lines[-1] == "  nothing"
    assert all(len(line) <= 80 or path in line for line in lines)
