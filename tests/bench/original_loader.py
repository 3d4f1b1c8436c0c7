"""What `export --to llava` writes, opened by LLaVA's own code: its logits beside ours.

    OMP_NUM_THREADS=2 python tests/bench/original_loader.py

Tiny bases with random weights, in LLaVA's layout and in transformers', on Llama and on Mistral; two steps of LoRA, of the
projector and of the whole model. LLaVA's code is llava-torch 1.2.2 in the environment that peers.py makes. It loads an
adapter or a projector on the base, and a whole model, also one that was merged from an adapter, by itself.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.peer_steps.environments import PEERS, python_of
from helpers.bases import Kind, make_base
from helpers.exported import CPU, ORIGINAL, fine_tune, probe
from helpers.runs import PARITY
from llava_accel.inference.origin import find_trained, load_trained
from llava_accel.release.verification import probe_example

WAYS: dict[str, dict[str, Any]] = {
    "LoRA and projector": {"train": "lora", "lora": {"rank": 4, "alpha": 8}},
    "projector": {"train": "projector"},
    "full": {"train": "full"},
}
BASES = {
    "LLaVA's layout, Llama": None,
    "transformers' layout, Llama": Kind("clip", "hub", "llama", "sentencepiece"),
    "transformers' layout, Mistral": Kind("clip", "hub", "mistral", "sentencepiece"),
}
FURTHEST = 1e-4


def export(source: Path, form: str, out: Path) -> Path:
    """Run the verb."""
    command = [sys.executable, "-m", "llava_accel", "export", str(source), "--to", form, "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def ours(path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of an image and a text, and both as LLaVA's code takes them: -200 in the place of an image."""
    loaded = load_trained(find_trained(str(path)), dtype=torch.float32, device=CPU)
    example, pixels = probe_example(loaded.processing)
    ids = [-200 if id == loaded.processing.image_token_id else id for id in example.input_ids.tolist()]
    short = [id for place, id in enumerate(ids) if id != -200 or ids[place - 1] != -200]
    logits = probe(loaded.objective.llava, loaded.processing)
    return logits, {"ids": torch.tensor([short]), "pixels": next(iter(pixels.values()))}


def theirs(folder: Path, base: Path | None, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a folder by LLaVA's own loader."""
    with tempfile.TemporaryDirectory() as place:
        given, out = Path(place) / "inputs.pt", Path(place) / "logits.pt"
        torch.save(inputs, given)
        job = {"folder": str(folder), "base": base and str(base), "inputs": str(given), "out": str(out)}
        python = python_of(PEERS["llava"], Path.home() / ".cache" / "llava_accel" / "peers")
        script = Path(__file__).parent / "peer_steps" / "load_llava.py"
        done = subprocess.run([str(python), str(script)], input=json.dumps(job), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder}: LLaVA's code does not load it\n{done.stderr[-2000:]}")
        return torch.load(out)


def original(place: Path) -> dict[str, Any]:
    """A base in LLaVA's layout that names its tower by a path: LLaVA's code takes names of the hub and whole paths."""
    base = Path(shutil.copytree(ORIGINAL, place / "original"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(PARITY / "clip")}))
    return {"base": str(base)}


def folders(place: Path, kind: Kind | None) -> Iterator[tuple[str, Path, Path, Path | None]]:
    """What is compared, its folder for us, its folder for LLaVA's code, and the base that this needs."""
    model = original(place) if kind is None else make_base(place / "made", kind)
    name = (
        "llava-mistral" if kind and kind.language_model == "mistral" else "llava"
    )  # LLaVA's code looks for these words
    base = export(Path(model["base"]), "llava", place / f"{name}-base")
    yield "base", base, base, None
    for way, table in WAYS.items():
        folder = place / way.replace(" ", "-")
        folder.mkdir()
        run = fine_tune(folder, model={**model, **table})
        is_lora = table["train"] == "lora"
        to_llava = export(run, "llava", folder / f"{name}{'-lora' if is_lora else ''}-tuned")
        yield way, run, to_llava, None if table["train"] == "full" else base
        if is_lora:
            merged = export(run, "merged", folder / "merged")
            yield f"{way}, merged", run, export(merged, "llava", folder / f"{name}-merged"), None


def main() -> None:
    """Print how far logits are apart, a line each; exit with 1 if any is further than 1e-4."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    furthest = 0.0
    for title, kind in BASES.items():
        with tempfile.TemporaryDirectory() as place:
            untrained = None
            for name, mine, folder, base in folders(Path(place), kind):
                logits, inputs = ours(mine)
                other = theirs(folder, base, inputs)[:, : logits.shape[1]]  # its vocabulary may be padded
                assert other.shape == logits.shape, (other.shape, logits.shape)
                apart = float((other - logits).abs().max())
                furthest = max(furthest, apart)
                untrained = logits if untrained is None else untrained
                moved = float((logits - untrained).abs().max())
                assert name == "base" or moved > 100 * apart, "training has changed too little to tell"
                print(
                    f"{title}: {name}: logits at most {apart:.1e} apart; training moved them by up to {moved:.1e}",
                    flush=True,
                )
    sys.exit(furthest > FURTHEST)


if __name__ == "__main__":
    main()
