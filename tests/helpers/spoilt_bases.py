"""Bases of every layout, and systematic ways to spoil each file of them."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.runs import PARITY
from helpers.tiny import make_language_model, make_llava, make_siglip

Spoil = Callable[[Path], object]
"""Spoils a file in place."""

LAYOUTS = {
    "hub": [
        "base/chat_template.jinja", "base/config.json", "base/generation_config.json", "base/processor_config.json",
        "base/tokenizer.json", "base/tokenizer.model", "base/tokenizer_config.json",
    ],
    "original": [
        "base/config.json", "base/generation_config.json", "base/special_tokens_map.json", "base/tokenizer.model",
        "base/tokenizer_config.json", "clip/config.json", "clip/preprocessor_config.json",
    ],
    "parts": [
        "base/config.json", "base/generation_config.json", "base/tokenizer.json", "base/tokenizer.model",
        "base/tokenizer_config.json", "tower/config.json", "tower/preprocessor_config.json",
    ],
}  # fmt: skip
"""Layout -> the files of `make_bases` that are read as a whole."""
_ABSENT = object()
VALUES: dict[str, Any] = {
    "missing": _ABSENT, "null": None, "true": True, "a word": "nonsense", "a list": [], "an object": {}, "-1": -1, "-7": -7,
    "0": 0, "7": 7, "1e5": 10**5, "1e30": 10**30, "1.5": 1.5, "NaN": float("nan"), "Infinity": float("inf"), "many": [7] * 3,
    "nested": {"a": [{"b": 3}]},
}  # fmt: skip
"""What each key of a JSON file is set to, by the name of the case."""


def make_bases(folder: Path) -> dict[str, Path]:
    """A base in each layout: HF, original, and parts. Each has a `model.json`, its [model], with names relative to it."""
    made = {name: folder / name for name in ("hub", "original", "parts")}
    make_llava(made["hub"] / "base")
    shutil.copytree(PARITY / "llava-orig", made["original"] / "base")
    shutil.copytree(PARITY / "clip", made["original"] / "clip")
    make_language_model(made["parts"] / "base")
    make_siglip(made["parts"] / "tower")
    return made


def model_of(layout: Path) -> dict[str, Any]:
    """The [model] of a base of `make_bases`."""
    if (layout / "tower").exists():
        return {"language_model": str(layout / "base"), "vision_tower": str(layout / "tower")}
    return {"base": str(layout / "base")}


def text_files(layout: Path) -> list[Path]:
    """What is read as text in it, relative."""
    return sorted(
        path.relative_to(layout) for path in layout.rglob("*") if path.suffix in (".json", ".jinja", ".model")
    )


def whole() -> dict[str, Spoil]:
    """Ways to spoil any file."""
    return {
        "missing": os.remove,
        "empty": lambda path: path.write_bytes(b""),
        "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "NULs": lambda path: path.write_bytes(bytes(99)),
        "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff\xfe"}'),
        "a word": lambda path: path.write_text("nonsense"),
        "null": lambda path: path.write_text("null"),
        "a list": lambda path: path.write_text("[]"),
        "a number": lambda path: path.write_text("7"),
        "nothing": lambda path: path.write_text("{}"),
        "100,000 brackets": lambda path: path.write_text("[" * 100_000 + "]" * 100_000),
        "900 brackets": lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900),
        "10,000 digits": lambda path: path.write_text('{"a": ' + "9" * 10_000 + "}"),
        "a folder": lambda path: _instead(path, path.mkdir),
        "a pipe": lambda path: _instead(path, lambda: os.mkfifo(path)),
        "/dev/zero": lambda path: _instead(path, lambda: path.symlink_to("/dev/zero")),
        "/dev/null": lambda path: _instead(path, lambda: path.symlink_to("/dev/null")),
        "a link to itself": lambda path: _instead(path, lambda: path.symlink_to(path)),
        "a link to nothing": lambda path: _instead(path, lambda: path.symlink_to(path.parent / "nothing")),
        "a terabyte": lambda path: os.truncate(path, 2**40),
    }


def fields(path: Path) -> Iterator[tuple[str, Spoil]]:
    """Every key of a JSON file with every value of `VALUES`."""
    for place in _places(json.loads(path.read_text())):
        for name, value in VALUES.items():
            yield f"{'.'.join(map(str, place))} = {name}", _setter(place, value)


def _setter(place: tuple[Any, ...], value: object) -> Spoil:
    def spoil(path: Path) -> None:
        content = json.loads(path.read_text())
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        if value is _ABSENT:
            del inner[place[-1]]
        else:
            inner[place[-1]] = value
        path.write_text(json.dumps(content))

    return spoil


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if len(place) > 5 or place[-1:] in (("vocab",), ("merges",)):
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _places(inner, (*place, key))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*place, 0))


def _instead(path: Path, make: Callable[[], object]) -> None:
    path.unlink()
    make()


def copied(layout: Path, file: Path, spoil: Spoil, to: Path) -> Path:
    """A copy of a base, in `to`, of which one file is spoilt. Weights are linked."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(layout, to)
    spoil(to / file)
    return to


def shards(folder: Path, change: Callable[[dict[str, Any], dict[str, dict[str, torch.Tensor]]], object]) -> None:
    """Weights in two files with an index. `change` is given the index and the tensors of each file."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files: dict[str, dict[str, torch.Tensor]] = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, name in enumerate(sorted(tensors)):
        files[f"model-{number % 2 + 1}.safetensors"][name] = tensors[name]
    index: dict[str, Any] = {"weight_map": {name: file for file, part in files.items() for name in part}}
    change(index, files)
    for file, part in files.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _sharded(change: Callable[[dict[str, Any], dict[str, dict[str, torch.Tensor]]], object]) -> Spoil:
    return lambda folder: shards(folder, change)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        text = change(header) or header
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / "model.safetensors").write_bytes(
        change((folder / "model.safetensors").read_bytes())
    )


def _pickle(change: Callable[[dict[Any, Any]], object], **settings: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors: dict[Any, Any] = dict(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        made = change(tensors)
        torch.save(tensors if made is None else made, folder / "pytorch_model.bin", **settings)

    return spoil


def _cut(folder: Path) -> None:
    _pickle(lambda tensors: None)(folder)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def _compressed(folder: Path) -> None:
    _pickle(lambda tensors: None)(folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in parts.items():
            file.writestr(name, data)


def _key(tensors: dict[str, Any]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("q_proj.weight"))


def _entry(header: dict[str, Any]) -> dict[str, Any]:
    return header[_key(header)]


WEIGHTS: dict[str, Spoil] = {  # name of the case -> spoils the folder of a base
    "a length without end": _bytes(lambda data: (2**62).to_bytes(8, "little") + data[8:]),
    "a length beyond the file": _bytes(lambda data: (99_999_999).to_bytes(8, "little") + data[8:]),
    "a length of zero": _bytes(lambda data: bytes(8) + data[8:]),
    "a longer header": _header(lambda header: b"{" * 10_000),
    "a header that is a list": _header(lambda header: b"[]"),
    "a header of nothing": _header(lambda header: b"{}"),
    "an unknown type": _header(lambda header: _entry(header).update(dtype="F3")),
    "a type of 8 bits": _header(lambda header: _entry(header).update(dtype="F8_E4M3", shape=[64, 256])),
    "a negative shape": _header(lambda header: _entry(header).update(shape=[-1, 64])),
    "a shape without end": _header(lambda header: _entry(header).update(shape=[2**63, 2**63])),
    "no shape": _header(lambda header: _entry(header).pop("shape")),
    "offsets that overlap": _header(lambda header: _entry(header).update(data_offsets=[0, 16384])),
    "offsets turned round": _header(lambda header: _entry(header).update(data_offsets=[99, 1])),
    "a weight of no dimension": _tensors(lambda tensors: tensors.update({_key(tensors): torch.tensor(1.0)})),
    "a weight of no numbers": _tensors(lambda tensors: tensors.update({_key(tensors): torch.ones(0, 64)})),
    "a weight on its side": _tensors(lambda tensors: tensors.update({_key(tensors): torch.ones(64, 64, 1)})),
    "truth values": _tensors(lambda tensors: tensors.update({_key(tensors): torch.ones(64, 64).bool()})),
    "complex numbers": _tensors(lambda tensors: tensors.update({_key(tensors): torch.ones(64, 64) * 1j})),
    "a weight twice": _tensors(lambda tensors: tensors.update({"model.language_model.norm.weight": torch.ones(64)})),
    "an odd name": _tensors(lambda tensors: tensors.update({"\n\x1b[31m": torch.ones(2)})),
    "a missing shard": _sharded(lambda index, files: files.pop("model-2.safetensors")),
    "a shard elsewhere": _sharded(lambda index, files: index["weight_map"].update(x="../x.safetensors")),
    "a shard of the system": _sharded(lambda index, files: index["weight_map"].update(x="/etc/passwd")),
    "a shard that is a number": _sharded(lambda index, files: index["weight_map"].update(x=7)),
    "a shard that is the folder": _sharded(lambda index, files: index["weight_map"].update(x=".")),
    "a shard of no name": _sharded(lambda index, files: index["weight_map"].update(x="")),
    "an index of a list": _sharded(lambda index, files: index.update(weight_map=["model-1.safetensors"])),
    "an index of nothing": _sharded(lambda index, files: index.update(weight_map={})),
    "an index that lies": _sharded(lambda index, files: index["weight_map"].update(x="model-1.safetensors")),
    "a weight in two shards": _sharded(
        lambda index, files: files["model-1.safetensors"].update(list(files["model-2.safetensors"].items())[:1])
    ),
    "a pickle that is cut off": _cut,
    "a compressed pickle": _compressed,
    "a pickle of a list": _pickle(lambda tensors: [1, 2]),
    "a pickle of numbers": _pickle(lambda tensors: {"a": 1}),
    "a pickle of a pickle": _pickle(lambda tensors: {"a": {"b": torch.ones(2)}}),
    "a pickle with numbers for names": _pickle(lambda tensors: tensors.update({7: torch.ones(2)})),
    "a pickle of a sparse weight": _pickle(lambda tensors: tensors.update({_key(tensors): torch.eye(64).to_sparse()})),
    "a pickle without numbers": _pickle(
        lambda tensors: tensors.update({_key(tensors): torch.ones(64, 64, device="meta")})
    ),
    "a pickle of another shape": _pickle(
        lambda tensors: tensors.update({_key(tensors): torch.ones(1).expand(10**9, 10**3)})
    ),
    "an old pickle of another shape": _pickle(
        lambda tensors: tensors.update({_key(tensors): torch.ones(3)}), _use_new_zipfile_serialization=False
    ),
}
