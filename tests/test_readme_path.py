"""The README's way from the OK-VQA files to an adapter that talks: its own commands, on small files of the official form."""

import io
import json
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image

from helpers.exported import ROOT, prove_here
from llava_accel.__main__ import main
from llava_accel.exceptions import SIGNALS

pytestmark = pytest.mark.slow

SECTION = "## From OK-VQA to an adapter"
# What makes the commands small: everything else is as the README has it.
SMALL = [
    *[
        "model.lora.rank=4",
        "model.lora.alpha=8",
        "data.workers=0",
        "eval.at_start=false",
    ],
    *["train.per_device_batch_size=2", "train.accumulation_steps=1", "eval.max_new_tokens=3", "eval.blind_limit=2"],
]


def commands() -> list[list[str]]:
    """The commands of the section's first block, continued lines joined, comments left out."""
    _, _, section = (ROOT / "README.md").read_text().partition(SECTION)
    block = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[0]
    lines = [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`llava-accel VERB ...` in this process."""
    assert words[0] == "llava-accel"
    monkeypatch.setattr(sys, "argv", list(words))
    before = {one: signal.getsignal(one) for one in SIGNALS}
    try:
        main()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def write_official_files(subtype: str, num_images: int) -> None:
    """Questions and annotations of OK-VQA's form about plain images, two questions on each."""
    folder = Path("data/coco") / subtype
    folder.mkdir(parents=True)
    questions, annotations = [], []
    for number in range(2 * num_images):
        image_id, colour = 1000 + number // 2, ("red", "blue")[number // 2 % 2]
        Image.new("RGB", (64, 48), colour).save(folder / f"COCO_{subtype}_{image_id:012d}.jpg")
        key = {"question_id": 10 * image_id + number % 2, "image_id": image_id}
        questions.append(key | {"question": ("What colour is it?", "Which colour is this?")[number % 2]})
        answers = [
            {"answer": text, "raw_answer": text, "answer_confidence": "yes", "answer_id": place + 1}
            for place, text in enumerate([colour] * 7 + ["pink"] * 3)
        ]
        kinds = {"answer_type": "other", "question_type": ("one", "two")[number % 2], "confidence": 3}
        annotations.append(key | kinds | {"answers": answers})
    common = {"info": {"version": "1.0"}, "license": {}, "data_type": "mscoco", "data_subtype": subtype}
    Path(f"OpenEnded_mscoco_{subtype}_questions.json").write_text(
        json.dumps(common | {"task_type": "Open-Ended", "questions": questions})
    )
    Path(f"mscoco_{subtype}_annotations.json").write_text(json.dumps(common | {"annotations": annotations}))


def test_every_command_of_the_readme_runs_one_after_the_other(
    tmp_path: Path, llava_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prove_here(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    write_official_files("train2014", 4)
    write_official_files("val2014", 2)
    Image.new("RGB", (64, 48), "red").save("image.jpg")
    small = [f'model.base="{llava_folder}"', 'data.cache_dir="cache"', *SMALL]
    said: dict[str, str] = {}
    for words in commands():
        monkeypatch.setattr(sys, "stdin", io.StringIO("What colour is it?\n/quit\n"))
        run([*words, *small] if "recipes/okvqa_qlora.toml" in words else words, monkeypatch)
        said[words[1]] = capsys.readouterr().out
    assert list(said) == ["prepare", "check", "train", "evaluate", "chat", "export"]
    assert "data/okvqa/train.jsonl: 8 questions on 4 images" in said["prepare"]
    assert "12" in said["check"] or "8" in said["check"]
    run_folder = Path("runs/okvqa_qlora")
    assert "learning_rate = 0.0001" in (run_folder / "recipe.toml").read_text()
    assert (run_folder / "best" / "adapter_model.safetensors").is_file() and (run_folder / "report.html").is_file()
    assert (
        "of 4 answers" not in said["evaluate"] and "4 answers" in said["evaluate"] and "answer type" in said["evaluate"]
    )
    assert said["chat"].strip()
    assert (Path("my-llava") / "config.json").is_file() and "exported: my-llava" in said["export"]
