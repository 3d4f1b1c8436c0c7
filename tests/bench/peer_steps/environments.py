"""An environment for each peer, made from the package registry: its own versions, and the torch of this machine's disk."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

TORCH = "torch==2.13.0"
_TORCH_FAMILY = ("torch", "torchvision", "torchaudio")
"""Any other version than TORCH would bring a build for GPUs, and torchvision does not load beside it. No peer needs the
last two for a LLaVA: transformers then takes its image processors that need PIL alone."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A trainer that we are compared with.

    `left_out`: requirements that only its web pages, its evaluations or its GPU kernels import. `more`: what it needs and
    does not name. `stubs`: modules that it imports and does not use for a LLaVA; an empty one stands in.
    `prompt`: how its prompt differs from ours. `settings`: for its step file alone.
    """

    title: str
    package: str
    step: str
    left_out: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()
    prompt: str = "the same"
    settings: tuple[tuple[str, str], ...] = ()


PEERS = {
    "ms-swift": Peer("ms-swift 4.6.0", "ms-swift==4.6.0", "step_ms_swift.py", settings=(("template", "v1"),)),
    "ms-swift-own": Peer(
        "ms-swift 4.6.0, its own prompt",
        "ms-swift==4.6.0",
        "step_ms_swift.py",
        prompt="no system prompt, and a line break before ASSISTANT:",
        settings=(("template", "llava1_5_hf"),),
    ),
    "trl": Peer("TRL 1.16.0", "trl==1.16.0", "step_trl.py", more=("peft", "pillow")),
    "llama-factory": Peer(
        "LLaMA-Factory 0.9.5",
        "llamafactory==0.9.5",
        "step_llama_factory.py",
        left_out=("gradio",),
        stubs=("torchaudio",),
    ),
    "llava": Peer(
        "LLaVA's own code (llava-torch 1.2.2)",
        "llava-torch==1.2.2.post1",
        "step_llava.py",
        left_out=("bitsandbytes", "gradio", "gradio-client", "httpx", "scikit-learn", "timm", "einops-exts"),
        more=("protobuf", "pillow"),
    ),
}


def python_of(peer: Peer, cache: Path) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there."""
    folder = cache / peer.package.replace("==", "-")
    python, done = folder / "bin" / "python", folder / "made.json"
    wanted = json.dumps([TORCH, peer.package, peer.left_out, peer.more, peer.stubs])
    if not (done.is_file() and done.read_text() == wanted):
        print(f"making {folder}", flush=True)
        _run("python3", "-m", "venv", "--clear", str(folder))
        _install(python, TORCH)
        _install(python, "--no-deps", peer.package)
        (folder / "constraints.txt").write_text(TORCH + "\n")
        asked = f"import importlib.metadata as m, json; print(json.dumps(m.requires({name_of(peer)!r})))"
        needed = requirements(json.loads(_run(str(python), "-c", asked)), peer)
        _install(python, "-c", str(folder / "constraints.txt"), *needed)
        for name in peer.stubs:
            (next(folder.glob("lib/python*/site-packages")) / f"{name}.py").touch()
        done.write_text(wanted)
    return python


def name_of(peer: Peer) -> str:
    """Its package without the version."""
    return Requirement(peer.package).name


def requirements(named: Sequence[str], peer: Peer) -> list[str]:
    """What is installed beside a package.

    Args:
        named: The package's own requirements.
    """
    found = [Requirement(line) for line in named]
    left_out = (*_TORCH_FAMILY, *peer.left_out)
    here = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [str(one) for one in here if one.name not in left_out] + list(peer.more)


def _install(python: Path, *what: str) -> None:
    _run(str(python), "-m", "pip", "install", "-q", *what)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
