"""Models and adapters that cannot be used: each a copy of a good folder with one thing spoilt."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Spoil = Callable[[Path], object]
"""Spoils a folder in place."""


class Program:
    """Makes the file `ran` beside the folder as soon as somebody unpickles it."""

    def __init__(self, folder: Path) -> None:
        self._command = f"touch '{folder.parent / 'ran'}'"

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self._command,)


def edit(name: str, **changes: object) -> Spoil:
    """Changes keys of a JSON file; None removes one."""

    def spoil(folder: Path) -> None:
        fields = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return spoil


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def weights(change: Callable[[dict[str, torch.Tensor], str], object], name: str, file: str) -> Spoil:
    """Changes the first tensor whose name ends in `name`."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors, next(key for key in sorted(tensors) if key.endswith(name)))
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return spoil


def _value(value: float) -> Callable[[dict[str, torch.Tensor], str], object]:
    return lambda tensors, key: tensors[key].view(-1).__setitem__(5, value)


def _header(change: Callable[[dict], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return spoil


def _lie(key: str, value: object) -> Spoil:
    return _header(
        lambda header: header[next(name for name in header if name.endswith("norm.weight"))].update({key: value})
    )


def _shards(folder: Path, *, keep: bool, lie: bool = False, out: str = "") -> None:
    """Two shards and their index; the second is there if `keep`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        if keep or "00001" in file:
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, part in parts.items() for name in part}
    index |= {"model.no_such.weight": next(iter(parts))} if lie else {}
    index |= {names[0]: out} if out else {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _half(name: str) -> Spoil:
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def _pickled(protocol: int | None) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        program = {"model.norm.weight": Program(folder)}
        path = folder / "pytorch_model.bin"
        torch.save(program, path) if protocol is None else path.write_bytes(pickle.dumps(program, protocol))

    return spoil


def _code(folder: Path) -> None:
    """A model whose config asks for code that lies beside it."""
    (folder / "evil.py").write_text(f"import os\nos.system(\"touch '{folder.parent / 'ran'}'\")\n")
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    edit("config.json", model_type="evil", auto_map=names)(folder)
    edit("tokenizer_config.json", auto_map=names)(folder)


def _part(name: str, part: str, **changes: object) -> Spoil:
    """Changes keys of an object inside a JSON file."""

    def spoil(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        fields[part] = (fields.get(part) or {}) | changes
        (folder / name).write_text(json.dumps(fields))

    return spoil


def _instead(name: str, make: Callable[[Path], object]) -> Spoil:
    return lambda folder: ((folder / name).unlink(), make(folder / name))


NOT_FINITE = ["weight holds values that are not finite", "again"]
BASES: dict[str, tuple[Spoil, list[str]]] = {  # name -> how to spoil a LLaVA of the hub's layout, words of the message
    "no config": (remove("config.json"), ["config.json is missing", "Check the path"]),
    "a config that is cut off": (_half("config.json"), ["config.json is not readable JSON", "again"]),
    "an empty config": (write("config.json", b""), ["config.json is not readable JSON", "again"]),
    "a config that is a list": (write("config.json", b"[]"), ["config.json holds a list", "again"]),
    "a config of nothing": (write("config.json", b"{}"), ["config.json", "LLaVA"]),
    "a config of NULs": (write("config.json", bytes(99)), ["config.json is not readable JSON", "again"]),
    "a config in UTF-16": (write("config.json", '{"model_type": "llava"}'.encode("utf-16")), ["config.json", "again"]),
    "another model": (edit("config.json", model_type="bert"), ["config.json", "'bert'"]),
    "code instead of a model": (_code, ["config.json", "'evil'"]),
    "a width in words": (edit("config.json", text_config={"hidden_size": "wide"}), ["config.json", "wide"]),
    "no language model in the config": (edit("config.json", text_config=3), ["config.json"]),
    "an unknown language model": (edit("config.json", text_config={"model_type": "evil"}), ["config.json", "evil"]),
    "an unknown tower": (edit("config.json", vision_config={"model_type": "evil"}), ["config.json", "evil"]),
    "heads that do not divide": (edit("config.json", text_config={"num_attention_heads": 7}), ["config.json"]),
    "a token that is not there": (edit("config.json", image_token_index=10**6), ["image_token_index", "tokenizer"]),
    "stored quantised": (edit("config.json", quantization_config={"load_in_4bit": True}), ["config.json", "16-bit"]),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ["tokenizer"]),
    "half a tokenizer": (_half("tokenizer.json"), ["tokenizer"]),
    "an empty tokenizer": (write("tokenizer.json", b"{}"), ["tokenizer"]),
    "a tokenizer config that is a list": (write("tokenizer_config.json", b"[]"), ["tokenizer_config.json", "again"]),
    "half a processor config": (_half("processor_config.json"), ["processor_config.json"]),
    "an unknown activation": (_part("config.json", "text_config", hidden_act="nonsense"),
        ["config.json", 'text_config.hidden_act is "nonsense"']),
    "an unknown activation of the projector": (edit("config.json", projector_hidden_act="nonsense"),
        ["config.json", 'projector_hidden_act is "nonsense"']),
    "an unknown kind of positions": (_part("config.json", "text_config", rope_parameters={"rope_type": "nonsense",
        "rope_theta": 1e4}), ["config.json", 'rope_type is "nonsense"']),
    "a negative width": (_part("config.json", "text_config", hidden_size=-64),
        ["config.json: text_config.hidden_size is -64", "from 1 to"]),
    "100,000 layers": (_part("config.json", "vision_config", num_hidden_layers=100_000),
        ["config.json: vision_config.num_hidden_layers is 100000", "from 1 to 512"]),
    "a padding token beyond the vocabulary": (_part("config.json", "text_config", pad_token_id=999),
        ["config.json: pad_token_id is 999", "from 0 to 383"]),
    "an end beyond the vocabulary": (edit("generation_config.json", eos_token_id=[2, 10**9]),
        ["generation_config.json: eos_token_id is [2, 1000000000]", "from 0 to 383"]),
    "a config of 100,000 brackets": (write("config.json", b"[" * 100_000), ["config.json is not readable JSON", "again"]),
    "a config without end": (_instead("config.json", lambda path: path.symlink_to("/dev/zero")),
        ["config.json is a folder, a pipe or a device", "again"]),
    "a pipe for a tokenizer": (_instead("tokenizer.json", os.mkfifo), ["tokenizer.json is a folder, a pipe", "again"]),
    "an expression that takes for ever": (edit("tokenizer.json", pre_tokenizer={"type": "Split", "pattern": {
        "Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}), ["tokenizer.json crashes", "again"]),
    "a normalizer that fills the memory": (edit("tokenizer.json", normalizer={"type": "Replace", "pattern": {
        "String": " "}, "content": "x" * 10**6}), ["tokenizer.json", "Download it again"]),
    "no weights": (remove("model.safetensors"), ["has no weights", "model.safetensors"]),
    "empty weights": (write("model.safetensors", b""), ["model.safetensors is damaged", "again"]),
    "half the weights": (_half("model.safetensors"), ["model.safetensors is damaged", "again"]),
    "text for weights": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        ["model.safetensors is damaged", "again"]),
    "a header that lies about a shape": (_lie("shape", [4096]), ["model.safetensors is damaged", "again"]),
    "a header that lies about a place": (_lie("data_offsets", [0, 2**40]), ["model.safetensors is damaged", "again"]),
    "a header that lies about a type": (_lie("dtype", "F64"), ["model.safetensors is damaged", "again"]),
    "a header of an endless length": (lambda folder: write("model.safetensors",
        (2**62).to_bytes(8, "little") + (folder / "model.safetensors").read_bytes()[8:])(folder),
        ["model.safetensors is damaged", "again"]),
    "a missing shard": (lambda folder: _shards(folder, keep=False), ["lacks model-00002-of-00002", "Download"]),
    "an index that lies": (lambda folder: _shards(folder, keep=True, lie=True), ["model.no_such.weight", "again"]),
    "a shard elsewhere": (lambda folder: _shards(folder, keep=True, out="../x.safetensors"), ["outside its folder"]),
    "an index of nothing": (write("model.safetensors.index.json", b"{}"), ["no weight_map", "again"]),
    "a missing weight": (weights(lambda tensors, key: tensors.pop(key), "q_proj.weight", "model.safetensors"),
        ["lacks 1 weights", "q_proj.weight", "again"]),
    "a weight too many": (weights(lambda tensors, key: tensors.update({"language_model.model.layers.9.x": torch.ones(2)}),
        "q_proj.weight", "model.safetensors"), ["no place for 1 weights", "layers.9.x"]),
    "a weight of another shape": (weights(lambda tensors, key: tensors.update({key: torch.ones(3, 5)}), "q_proj.weight",
        "model.safetensors"), ["q_proj.weight is (3, 5)", "in the model", "copy both from the same one"]),
    "a weight of whole numbers": (weights(lambda tensors, key: tensors.update({key: tensors[key].to(torch.int8)}),
        "q_proj.weight", "model.safetensors"), ["q_proj.weight", "16-bit model"]),
    "a weight that is no number": (weights(_value(float("nan")), "up_proj.weight", "model.safetensors"),
        NOT_FINITE),
    "a weight without end": (weights(_value(float("inf")), "linear_1.weight", "model.safetensors"),
        NOT_FINITE),
    "a pickle that runs a program": (_pickled(None), ["pytorch_model.bin", "any program", "Convert it to safetensors"]),
    "a plain pickle that runs a program": (_pickled(2), ["pytorch_model.bin"]),
    "a pickle of something else": (lambda folder: (remove("model.safetensors")(folder),
        torch.save([1, 2], folder / "pytorch_model.bin")), ["pytorch_model.bin", "mapping", "Convert it"]),
}  # fmt: skip
ADAPTERS: dict[str, tuple[Spoil, list[str]]] = {  # name -> how to spoil an adapter of that base
    "no adapter config": (remove("adapter_config.json"), ["model.adapter", "no adapter_config.json"]),
    "half an adapter config": (_half("adapter_config.json"), ["adapter_config.json is not readable JSON", "again"]),
    "another kind of adapter": (edit("adapter_config.json", peft_type="IA3"), ["model.adapter", "'IA3'", "only LoRA"]),
    "another rank": (edit("adapter_config.json", r=99), ["model.lora.rank", "99", "Set model.lora.rank = 99"]),
    "no adapter weights": (remove("adapter_model.safetensors"), ["model.adapter", "no adapter_model.safetensors"]),
    "half the adapter weights": (_half("adapter_model.safetensors"), ["adapter_model.safetensors is damaged", "again"]),
    "an adapter for a wider base": (weights(lambda tensors, key: tensors.update({key: torch.ones(4, 999)}),
        "q_proj.lora_A.weight", "adapter_model.safetensors"), ["q_proj.lora_A.weight is (4, 999)", "another base"]),
    "an adapter for a deeper base": (weights(
        lambda tensors, key: tensors.update({key.replace("layers.0", "layers.77"): tensors.pop(key)}),
        "layers.0.self_attn.q_proj.lora_A.weight", "adapter_model.safetensors"), ["layers.77", "belongs to another model"]),
    "an adapter that is no number": (weights(_value(float("nan")), "q_proj.lora_A.weight", "adapter_model.safetensors"),
        ["q_proj.lora_A.weight holds values that are not finite", "again"]),
    "an adapter's pickle that runs a program": (lambda folder: (remove("adapter_model.safetensors")(folder), torch.save(
        {"x": Program(folder)}, folder / "adapter_model.bin")), ["adapter_model.bin", "any program", "Convert it"]),
    "a projector of another width": (weights(lambda tensors, key: tensors.update({key: torch.ones(3, 5)}),
        "linear_1.weight", "non_lora_trainables.safetensors"), ["linear_1.weight is (3, 5)", "another base"]),
}  # fmt: skip


def copy_spoilt(good: Path, folder: Path, spoil: Spoil) -> Path:
    """A copy of a folder of which one thing is spoilt."""
    shutil.copytree(good, folder)
    spoil(folder)
    return folder
