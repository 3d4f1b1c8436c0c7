"""Our step against that of ms-swift, TRL, LLaMA-Factory and LLaVA's own code: seconds, CPU seconds, memory and losses.

    OMP_NUM_THREADS=2 python tests/bench/peers.py NAME... [--questions 1 | 9] [--batch 8] [--rounds 5] [--out FILE.json]

NAME is "all" or some of peer_steps/environments.py. An environment is made for each of them from the package registry
(once, 2 GB each, in ~/.cache/llava_accel/peers). Then all load the same weights (those of eighty_million.py), pictures,
questions and answers, each in its own process and through its own Trainer and collator, and take a step in turn:
batch, trained layers (LoRA on all linear layers of the language model, and the whole projector), fp32, AdamW and clipping
are the same, and nothing is evaluated, saved or logged. A training set is one batch, so that no order of rows matters.
The first three steps of each are not timed: their losses are compared.
"""

import argparse
import json
import os
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
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.eighty_million import QUICKSTART, SIDE, make_base
from bench.peer_steps.environments import PEERS, Peer, python_of
from llava_accel.data.conversation import SYSTEM_PROMPTS

TESTS = Path(__file__).parents[1]
STEPS = TESTS / "bench" / "peer_steps"
NUM_LOSSES = 3
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
        rows.append({"image": str(path), "question": question, "answer": answer})
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
    rewrite_tokenizer(original)
    return {"base": str(base), "original_base": str(original), "original_tower": str(original / "vision_tower")}


def rewrite_tokenizer(folder: Path) -> None:
    """The same tokenizer in the words of tokenizers 0.15, which LLaVA's own code has and which reads no newer file."""
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    scheme = {"replacement": "\u2581", "add_prefix_space": True, "prepend_scheme": "first"}
    found["pre_tokenizer"] = {"type": "Metaspace", **scheme}
    found["model"]["merges"] = [" ".join(pair) for pair in found["model"]["merges"]]
    path.write_text(json.dumps(found))
    path = folder / "tokenizer_config.json"
    known = ("bos_token", "eos_token", "unk_token", "pad_token", "model_max_length", "clean_up_tokenization_spaces")
    config = json.loads(path.read_text())
    kept = {key: config[key] for key in known}
    path.write_text(json.dumps(kept | {"tokenizer_class": "PreTrainedTokenizerFast"}))


@dataclass
class Stepper:
    """One trainer in its own process."""

    title: str
    prompt: str
    process: subprocess.Popen[str]
    log: Path
    facts: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0

    @classmethod
    def start(
        cls, title: str, prompt: str, python: Path, step: str, settings: Mapping[str, str], *paths: Path
    ) -> "Stepper":
        """Start it, with modules from `paths`. What it prints goes to a file beside its output."""
        log = Path(settings["out"]).with_suffix(".log")
        offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as lines:
            process = subprocess.Popen(
                [str(python), str(STEPS / step), json.dumps(settings)],
                env=os.environ | offline | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=lines,
                text=True,
                cwd=log.parent,
            )
        return cls(title, prompt, process, log)

    def is_ready(self) -> bool:
        """Wait until all is loaded; False if it has ended instead."""
        self.facts = self.read() or {}
        return bool(self.facts)

    def read(self) -> dict[str, Any] | None:
        """Its next line; None where it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def step(self, word: str) -> dict[str, Any]:
        """Let one step through."""
        assert self.process.stdin is not None
        print(word, file=self.process.stdin, flush=True)
        found = self.read()
        if found is None:
            raise RuntimeError(f"{self.title} has ended in a step:\n{tail(self.log)}")
        self.peak_mib = max(self.peak_mib, found["peak_mib"])
        return found

    def stop(self) -> None:
        """End it; nothing is saved."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def tail(log: Path) -> str:
    """The end of what a process printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-12:])


def start_all(peers: Mapping[str, Peer], cache: Path, folder: Path, settings: Mapping[str, str]) -> dict[str, Stepper]:
    """Ours, as "ours", and those peers that get ready; of another the reason is printed, and it is left out.

    Raises:
        RuntimeError: Our own does not get ready.
    """
    own = {**settings, "out": str(folder / "ours")}
    found = {
        "ours": Stepper.start("llava_accel", "the same", Path(sys.executable), "step_ours.py", own, TESTS, TESTS.parent)
    }
    for name, peer in peers.items():
        own = {**settings, "out": str(folder / name), **dict(peer.settings)}
        found[name] = Stepper.start(peer.title, peer.prompt, python_of(peer, cache), peer.step, own, TESTS)
    ready = {name: stepper for name, stepper in found.items() if stepper.is_ready()}
    for name in found.keys() - ready.keys():
        print(f"{found[name].title}: not measured. It ended with\n{tail(found[name].log)}", flush=True)
    if "ours" not in ready:
        raise RuntimeError("our own step did not get ready")
    return ready


@dataclass
class Row:
    """What a table says of one trainer: ours has two, with one process."""

    stepper: Stepper
    title: str
    word: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)


def take_turns(steppers: Mapping[str, Stepper], rounds: int) -> list[Row]:
    """The losses of the first steps of each, then a step of each in turn, so often."""
    for name, stepper in steppers.items():
        words = ["cold", "warm", "warm"] if name == "ours" else ["step"] * NUM_LOSSES
        stepper.losses = [stepper.step(word)["loss"] for word in words]
    rows = [Row(stepper, stepper.title, "step") for name, stepper in steppers.items() if name != "ours"]
    ours = steppers["ours"]
    rows = [
        Row(ours, "llava_accel, features computed", "cold"),
        Row(ours, "llava_accel, features kept", "warm"),
        *rows,
    ]
    for number in range(rounds):
        for row in turned(rows, number):
            found = row.stepper.step(row.word)
            row.seconds.append(found["seconds"])
            row.cpu_seconds.append(found["cpu_seconds"])
    return rows


def turned(rows: Sequence[Row], number: int) -> Iterator[Row]:
    """Each round begins with another row, but our warm step follows our cold one."""
    places = [place for place in range(len(rows)) if place != 1]
    start = number % len(places)
    for place in [*places[start:], *places[:start]]:
        yield rows[place]
        if place == 0:
            yield rows[1]


def ratios(rows: Sequence[Row], row: Row) -> list[list[float]]:
    """A peer's seconds over ours of the same round: features computed, features kept."""
    return [[theirs / ours for theirs, ours in zip(row.seconds, own.seconds, strict=True)] for own in rows[:2]]


def report(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Print what was found, and return it for a file."""
    ours, found = rows[0].stepper, []
    for row in rows:
        stepper = row.stepper
        line: dict[str, Any] = {
            "title": row.title,
            "prompt": stepper.prompt,
            "seconds": row.seconds,
            "cpu_seconds": row.cpu_seconds,
            "median_seconds": median(row.seconds),
            "median_cpu_seconds": median(row.cpu_seconds),
            "peak_mib": stepper.peak_mib,
            "losses": stepper.losses,
            **stepper.facts,
        }
        text = (
            f"{row.title}: {line['median_seconds']:.2f} s ({min(row.seconds):.2f} to {max(row.seconds):.2f}), "
            f"{line['median_cpu_seconds']:.2f} CPU s, peak {stepper.peak_mib:,.0f} MiB, losses "
            f"{', '.join(f'{loss:.4f}' for loss in stepper.losses)}"
        )
        if stepper is not ours:
            cold, warm = ratios(rows, row)
            is_same = abs(stepper.losses[0] - ours.losses[0]) <= SAME * ours.losses[0]
            line |= {
                "ratio_cold": median(cold),
                "ratio_warm": median(warm),
                "ratio_memory": ours.peak_mib / stepper.peak_mib,
                "same_first_loss": is_same,
            }
            text += (
                f"; ours is {median(cold):.2f} x ({min(cold):.2f} to {max(cold):.2f}) with features computed, "
                f"{median(warm):.2f} x ({min(warm):.2f} to {max(warm):.2f}) with features kept, in "
                f"{line['ratio_memory']:.2f} x the memory; first loss {'the same' if is_same else 'DIFFERS'}; "
                f"prompt: {stepper.prompt}"
            )
        print(text, flush=True)
        found.append(line)
    return found


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
    parser.add_argument("--llava-code", default="", help="a folder with LLaVA's own code, in place of the registry's")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "llava_accel" / "peers")
    parser.add_argument("--out", type=Path, help="all figures, as JSON")
    parser.add_argument("--environments-only", action="store_true", help="make them, and take no step")
    arguments = parser.parse_args()
    names = list(PEERS) if "all" in arguments.names else arguments.names
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
            "share_prefix": "true" if arguments.questions > 1 else "false",
            "code": arguments.llava_code,
        }
        steppers = start_all(peers, arguments.cache, folder, settings)
        rows = take_turns(steppers, arguments.rounds)
        for stepper in steppers.values():
            stepper.stop()
    found = report(rows)
    if arguments.out:
        given = {name: getattr(arguments, name) for name in ("questions", "batch", "rounds", "dropout")}
        arguments.out.write_text(json.dumps({"arguments": given, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
