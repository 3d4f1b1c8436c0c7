"""For tests of exports: the verb as users call it, logits of folders, and a process without this package."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.runs import PARITY, recipe
from llava_accel.console.command_line import start
from llava_accel.inference.origin import find_trained, load_trained
from llava_accel.model.processing import Processing
from llava_accel.release import plain_inference
from llava_accel.release import verification as proof
from llava_accel.release.verification import probe_example
from llava_accel.train import train

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ORIGINAL = PARITY / "llava-orig"

_WITHOUT_US = """
import contextlib, io, json, os, re, sys
import torch
from pathlib import Path
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

job, found = json.loads(sys.argv[1]), {"logits": {}, "said": {}}
inputs = torch.load(job["inputs"])

def logits(model):
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0].tolist()

for name, (base, adapter) in job["models"].items():
    model = LlavaForConditionalGeneration.from_pretrained(base)
    found["logits"][name] = logits(PeftModel.from_pretrained(model, adapter) if adapter else model)
for name, folder in job["cards"].items():
    os.chdir(folder)
    Image.open(job["image"]).convert("RGB").save("image.jpg", quality=100, subsampling=0)
    (code,) = re.findall(r"```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    found["said"][name] = said.getvalue()
assert not any(name.startswith("llava_accel") for name in sys.modules), "this package was needed after all"
Path(job["out"]).write_text(json.dumps(found))
"""


def fine_tune(folder: Path, **tables: Any) -> Path:
    """A run of two steps, with an evaluation before and one after; the adapter starts anew."""
    model = {"adapter": "", "vision_tower": ""} | tables.pop("model")
    data, evaluation = (
        {"eval": str(PARITY / "traj_lora.json")},
        {"at_start": True, "blind_limit": 0},
    )
    train(recipe(folder, train={"max_steps": 2}, model=model, data=data, eval=evaluation, **tables))
    return folder / "run"


def export(monkeypatch: pytest.MonkeyPatch, source: Path | str, to: str, out: Path, *options: str) -> Path:
    """Run the verb in this process; its errors are those of the command line."""
    monkeypatch.setattr(sys, "argv", ["export", str(source), "--to", to, "--out", str(out), *options])
    start("export")
    return out


def prove_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in this process what the proof of an export does in another: it takes less time to start."""

    def compute(job: Path, _process: None, _is_asked: Any) -> subprocess.CompletedProcess[str]:
        plain_inference.compute(job)
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(proof, "other_process", nullcontext)
    monkeypatch.setattr(proof, "computed", compute)


def logits(path: Path | str, **options: Any) -> Tensor:
    """Logits of what `path` holds, through the package's own loaders."""
    loaded = load_trained(find_trained(str(path), **options), dtype=torch.float32, device=CPU)
    return probe(loaded.objective.llava, loaded.processing)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Logits are equal in fp32, and are not all the same."""
    assert ours.shape == theirs.shape
    assert ours.std() > 1e-2
    assert float((ours - theirs).abs().max()) <= tolerance


def without_us(
    folder: Path,
    inputs: dict[str, Tensor],
    models: dict[str, tuple[Path, Path | None]],
    cards: dict[str, Path],
    image: Path,
) -> dict[str, Any]:
    """Logits of (base, adapter) pairs, and what the lines of model cards print, where this package is not imported."""
    torch.save(inputs, folder / "inputs.pt")
    job = {
        "inputs": str(folder / "inputs.pt"),
        "models": {name: [str(base), str(adapter) if adapter else None] for name, (base, adapter) in models.items()},
        "cards": {name: str(path) for name, path in cards.items()},
        "image": str(image),
        "out": str(folder / "found.json"),
    }
    command = [sys.executable, "-c", _WITHOUT_US, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@torch.no_grad()
def probe(model: nn.Module, processing: Processing) -> Tensor:
    """(positions, vocabulary) Logits of an image and a text through transformers' own forward pass, in fp32."""
    logits = model.eval()(**probe_inputs(processing), use_cache=False).logits
    return logits[0, :, : processing.vocab_size].float()


def probe_inputs(processing: Processing) -> dict[str, Tensor]:
    """The image and the text as transformers' forward pass takes them."""
    example, pixels = probe_example(processing)
    input_ids = torch.from_numpy(example.input_ids)[None]
    images = next(iter(pixels.values()))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": images}
