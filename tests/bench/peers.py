"""Our step against that of ms-swift, TRL, LLaMA-Factory and LLaVA's own code: seconds, CPU seconds, memory and losses.

    OMP_NUM_THREADS=2 python tests/bench/peers.py NAME... [--questions 1 | 9] [--batch 8] [--rounds 5] [--out FILE.json]
    OMP_NUM_THREADS=2 python tests/bench/peers.py trl --pairs LOSS [--batch 4] [--rounds 5]

NAME is "all" or some of peer_steps/environments.py. An environment is made for each of them from the package registry
(once, 2 GB each, in ~/.cache/llava_accel/peers). Each loads the same weights (those of eighty_million.py), pictures,
questions and answers in its own process, and goes through its own Trainer and collator; each in turn takes steps beside
ours, a step of one after a step of the other. Batch, trained layers (LoRA on all linear layers of the language model, and
the whole projector), fp32, AdamW and clipping are the same, and nothing is evaluated, saved or logged. A training set is
one batch, so that no order of rows matters.
The first three steps of each are not timed: their losses are compared, with --pairs also their gradients' norms, rewards and
log-probabilities, and the gradient of the third.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import easy_vqa
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.eighty_million import QUICKSTART, SIDE, make_base
from bench.peer_steps.environments import PEERS, Peer, python_of
from bench.peer_steps.stepper import TESTS, Stepper, tail
from bench.peer_steps.turnstile import NUM_LOSSES, PAIRS
from llava_accel.data.conversation import SYSTEM_PROMPTS

FIGURES = ("grad_norm", "reward_margin", "chosen_reward", "chosen_log_prob", "rejected_log_prob")
SAME = 2e-4
"""How far first losses may be apart: most peers round theirs to four digits."""


def make_rows(folder: Path, num_rows: int, questions: int) -> Path:
    """Questions of easy-VQA on images of noise, so many an image."""
    pixels, rows = np.random.default_rng(0), []
    asked = sorted(zip(*easy_vqa.get_train_questions(), strict=True), key=lambda row: row[2])
    for number, (question, answer, _) in enumerate(asked[:num_rows]):
        path = folder / f"{number // questions}.png"
        if not path.exists():
            Image.fromarray(pixels.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        rows.append({"image": str(path), "question": question, "answer": answer, "rejected": f"not {answer}, but two"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def make_bases(folder: Path) -> dict[str, str]:
    """The weights as transformers has them, with a processor, and as LLaVA's own code has them."""
    base, original = make_base(folder / "base"), folder / "llava-original"
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    processor = LlavaProcessor(images, tokenizer, patch_size=16, num_additional_image_tokens=1)
    processor.vision_feature_select_strategy = "default"
    processor.chat_template = tokenizer.chat_template
    processor.save_pretrained(base)
    export = [sys.executable, "-m", "llava_accel", "export", str(base), "--to", "llava", "--out", str(original)]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    config = json.loads((original / "config.json").read_text())
    config["mm_vision_tower"] = str(original / config["mm_vision_tower"])  # looked for from where a process stands
    (original / "config.json").write_text(json.dumps(config))
    return {"base": str(base), "original_base": str(original), "original_tower": str(original / "vision_tower")}


@dataclass
class Pair:
    """What was measured of a peer and, in the same rounds, of ours: seconds on the clock and on all cores of each step."""

    theirs: Stepper
    ours: Stepper
    step: list[tuple[float, float]] = field(default_factory=list)
    cold: list[tuple[float, float]] = field(default_factory=list)
    """Ours with features computed."""
    warm: list[tuple[float, float]] = field(default_factory=list)
    """Ours with features kept."""


def take_turns(ours: Stepper, theirs: Stepper, rounds: int) -> Pair:
    """A step of each in turn, so often. Every other round begins with ours."""
    pair = Pair(theirs, ours)
    for number in range(rounds):
        turns = [(theirs, "step", pair.step), (ours, "cold", pair.cold), (ours, "warm", pair.warm)]
        for stepper, word, found in turns if number % 2 else turns[1:] + turns[:1]:
            line = stepper.step(word)
            found.append((line["seconds"], line["cpu_seconds"]))
    return pair


def ratios(pair: Pair) -> dict[str, list[float]]:
    """A peer's seconds over ours of the same round."""
    return {
        f"{kind}_{name}": [theirs[clock] / own[clock] for theirs, own in zip(pair.step, mine, strict=True)]
        for clock, kind in enumerate(("wall", "cpu"))
        for name, mine in (("cold", pair.cold), ("warm", pair.warm))
    }


def report(pair: Pair) -> dict[str, Any]:
    """Print what was found of a peer, and return it for a file."""
    theirs, ours, found = pair.theirs, pair.ours, ratios(pair)
    is_same = abs(theirs.losses[0] - ours.losses[0]) <= SAME * ours.losses[0]
    print(f"{theirs.title}: prompt: {theirs.prompt}; first loss {'the same' if is_same else 'DIFFERS'}")
    for title, stepper, times in (
        ("theirs", theirs, pair.step),
        ("ours, features computed", ours, pair.cold),
        ("ours, features kept", ours, pair.warm),
    ):
        print(
            f"  {title}: {_spread([wall for wall, _ in times])} s, {_spread([cpu for _, cpu in times])} CPU s, peak "
            f"{stepper.peak_mib:,.0f} MiB, losses {', '.join(f'{loss:.4f}' for loss in stepper.losses)}"
        )
    for name, apart in _apart(theirs, ours).items():
        print(f"  {name} of the first steps: at most {apart:.1e} apart")
    memory = ours.peak_mib / theirs.peak_mib
    print(
        f"  ours is {_spread(found['wall_cold'])} x as fast with features computed, {_spread(found['wall_warm'])} x with "
        f"features kept; in CPU seconds {_spread(found['cpu_cold'])} x and {_spread(found['cpu_warm'])} x; "
        f"{memory:.2f} x the memory",
        flush=True,
    )
    sides = {
        name: {"prompt": one.prompt, "peak_mib": one.peak_mib, "losses": one.losses, "first": one.figures, **one.facts}
        for name, one in (("theirs", theirs), ("ours", ours))
    }
    times = {"step": pair.step, "cold": pair.cold, "warm": pair.warm}
    medians = {name: median(values) for name, values in found.items()}
    return {
        "title": theirs.title,
        "same_first_loss": is_same,
        "memory": memory,
        "ratios": medians,
        "seconds_and_cpu_seconds": times,
        **sides,
    }


def _apart(theirs: Stepper, ours: Stepper) -> dict[str, float]:
    """By how much the figures of the first steps and the gradients differ, as far as both tell them: relative to ours, but
    for rewards and single numbers of a gradient, which may be 0."""
    found: dict[str, float] = {}
    for other, own in zip(theirs.figures, ours.figures, strict=True):
        for name in (each for each in FIGURES if other.get(each) is not None and own.get(each) is not None):
            scale = 1.0 if "reward" in name else abs(own[name])
            found[name] = max(found.get(name, 0.0), abs(other[name] - own[name]) / scale)
    if ours.gradients:
        # Sorted lists: a gradient that one of them lacks is said by its name.
        assert sorted(ours.gradients) == sorted(theirs.gradients)
        apart = torch.cat([(theirs.gradients[name] - mine).flatten() for name, mine in ours.gradients.items()])
        whole = torch.cat([mine.flatten() for mine in ours.gradients.values()])
        found["gradient, as one vector,"] = float(apart.norm() / whole.norm())
        found["gradient, any number of it,"] = float(apart.abs().max())
    return found


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def compare(
    peers: Mapping[str, Peer], cache: Path, folder: Path, settings: Mapping[str, str], rounds: int
) -> Iterator[dict[str, Any]]:
    """Ours beside one peer after another; of one that does not get ready the reason is printed.

    Two are in memory at a time.

    Raises:
        RuntimeError: Our own does not get ready, or one ended in a step.
    """
    own = {**settings, "out": str(folder / "ours")}
    ours = Stepper.start("llava_accel", "the same", Path(sys.executable), "step_ours.py", own, TESTS, TESTS.parent)
    if not ours.is_ready():
        raise RuntimeError(f"our own step did not get ready:\n{tail(ours.log)}")
    ours.warm_up("cold", "warm", "warm")
    for name, peer in peers.items():
        given = {**settings, "out": str(folder / name), **dict(peer.settings)}
        theirs = Stepper.start(peer.title, peer.prompt, python_of(peer, cache), peer.step, given, TESTS)
        if theirs.is_ready():
            theirs.warm_up(*["step"] * NUM_LOSSES)
            if settings["pairs"]:
                theirs.gradients, ours.gradients = (load_file(f"{each['out']}.grads") for each in (given, own))
            yield report(take_turns(ours, theirs, rounds))
        else:
            print(f"{peer.title}: not measured. It ended with\n{tail(theirs.log)}", flush=True)
        theirs.stop()
    ours.stop()


def main() -> None:
    """Make what is missing, take the steps, print a line for each trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=["all", *PEERS], metavar="NAME", help=f"all, or {', '.join(PEERS)}")
    parser.add_argument(
        "--questions", type=int, default=1, help="on an image; with more than one, ours shares the prefix"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the LoRA layers")
    parser.add_argument(
        "--pairs",
        default="",
        choices=PAIRS,
        metavar="LOSS",
        help=f"of TRL alone: on pairs, beta 0.1: {', '.join(PAIRS)}",
    )
    parser.add_argument("--llava-code", default="", help="a folder with LLaVA's own code, in place of the registry's")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "llava_accel" / "peers")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    parser.add_argument("--environments-only", action="store_true", help="make them, and take no step")
    arguments = parser.parse_args()
    names = list(PEERS) if "all" in arguments.names else arguments.names
    if arguments.pairs and names != ["trl"]:
        parser.error("--pairs: name trl alone")
    peers = {name: PEERS[name] for name in names}
    for peer in peers.values():
        python_of(peer, arguments.cache)
    if arguments.environments_only:
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        settings = {
            **make_bases(folder),
            "rows": str(make_rows(folder, arguments.batch, arguments.questions)),
            "batch": str(arguments.batch),
            "dropout": str(arguments.dropout),
            "rank": "8",
            "alpha": "16",
            "learning_rate": "2e-4",
            "system": SYSTEM_PROMPTS["v1"],
            "share_prefix": "true" if arguments.questions > 1 or arguments.pairs else "false",
            "pairs": arguments.pairs,
            "code": arguments.llava_code,
        }
        found = []
        for line in compare(peers, arguments.cache, folder, settings, arguments.rounds):
            found.append(line)
            if arguments.out:
                given = {
                    name: getattr(arguments, name) for name in ("questions", "batch", "rounds", "dropout", "pairs")
                }
                arguments.out.write_text(json.dumps({"arguments": given, "peers": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
