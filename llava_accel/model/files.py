"""Model folders and the tensors in them. Every fault in a weights file is raised here, with the file's name and a remedy.

Nothing here runs code from a checkpoint: safetensors, or pickles restricted to tensors.
"""

import json
import os
import pickle
import stat
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava_accel.exceptions import UserError
from llava_accel.recipe.toml import is_deeper
from llava_accel.storage.run_weights import find_weights, is_run

_TEXT_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.toml"]
_ADAPTER_FILES = ["adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.*"]
_FLOATS = {"F64", "F32", "F16", "BF16", torch.float64, torch.float32, torch.float16, torch.bfloat16}
_REMEDY = "Download or copy it again"
_MAX_BYTES = {"tokenizer.json": 2**27, "tokenizer.model": 2**26}
"""Limits for files that are read as a whole; the largest known tokenizers take a quarter of that."""
_MAX_BYTES_OTHERS = 2**24
_MAX_DEPTH = 64
"""Nesting of a JSON file; libraries walk it by recursion."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: a lazy slice of a safetensors file, or memory-mapped. `status` is the file's before opening it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    is_float: bool
    tensor: Any
    status: os.stat_result

    def read(self) -> Tensor:
        """The tensor itself, on the CPU."""
        return self.tensor if isinstance(self.tensor, Tensor) else self.tensor[...]

    def read_finite(self) -> Tensor:
        """The tensor itself; UserError if it holds NaN or an infinite number."""
        tensor = self.read()
        if not is_finite(tensor):
            problem = f"{self.file}: {self.name} holds values that are not finite (NaN or infinite)"
            raise UserError(f"{problem}. {_REMEDY}, or take an earlier checkpoint of it")
        return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; True on the meta device, where only names and shapes are read."""
    if tensor.is_meta or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(low.isfinite() and high.isfinite())


def resolve_folder(name: str, key: str, beside: Path | None = None, weights: bool = True) -> Path:
    """The folder that `name` means: itself, in a run the folder with the weights, or else the download of a hub model.

    Args:
        name: A path, absolute or relative to the working directory, or a hub id.
        key: The recipe key that holds it, for errors.
        beside: A folder that, with its parent, is searched for a relative `name` first.
        weights: False downloads configs and tokenizer only.

    Raises:
        UserError: there is neither such a folder nor such a model within reach.
    """
    places = [beside / name, beside.parent / name] if beside else []
    for place in (*places, Path(os.path.expanduser(name))):
        if os.path.isdir(place):  # unlike pathlib's, it raises no error for a name that no file can have
            return find_weights(place) if is_run(place) else place
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"{key}: there is no folder {name}. Correct the path, or name a model of the hub as ORG/NAME")
    try:
        return _download(name, weights)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{key}: there is no folder {name!r}, and the hub has no such model within reach ({first_line(error)}). "
            "Correct the name, log in with `hf auth login` if the model is gated, or download it to a folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; UserError if it cannot be read, or is not an object."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = "Save it as UTF-8 without a byte order mark" if text.startswith("\ufeff") else _REMEDY
        raise UserError(f"{path} is not readable JSON ({first_line(error)}). {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object. {_REMEDY}")
    if is_deeper(value, _MAX_DEPTH):
        raise UserError(f"{path} has more than {_MAX_DEPTH} brackets within brackets. {_REMEDY}")
    return value


def read_text(path: Path) -> str:
    """A file of a model folder, in UTF-8; UserError if it cannot be read (`check_file`)."""
    check_file(path)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}). {_REMEDY}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Check its permissions, or copy it again") from error


def check_file(path: Path) -> None:
    """Check a file that is read as a whole; UserError if it is missing, a device, a pipe or a folder, or too long."""
    most = _MAX_BYTES.get(path.name, _MAX_BYTES_OTHERS)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: this is not a model folder, or it is incomplete. Check the path") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). {_REMEDY}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a folder, a pipe or a device, or a link to one, and not a file. {_REMEDY}")
    if status.st_size > most:
        raise UserError(f"{path} has {status.st_size:,} bytes, and such a file has at most {most:,}. {_REMEDY}")


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Check those of a folder's files that a library will read by itself. They may be missing.

    Raises:
        UserError: one cannot be read, or is not what its ending says: a JSON object or text.
    """
    for path in (folder / name for name in names):
        if os.path.lexists(path):
            check_file(path)
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix != ".model":
                read_text(path)


def read_weights(folder: Path) -> Iterator[StoredTensor]:
    """The tensors of a folder: safetensors before pickles, all shards if there is an index; UserError if there are
    none, or a file is missing or damaged."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{ending}.index.json", folder / f"{stem}.{ending}"
        if index.is_file():
            yield from _read_shards(index)
            return
        if single.is_file():
            yield from read_tensors(single)
            return
    hint = ""
    if (folder / "mm_projector.bin").is_file():
        hint = ". It is the result of stage 1: name it in model.projector, and its base in model.language_model"
    raise UserError(
        f"{folder} has no weights: no model.safetensors and no pytorch_model.bin, single or with an index{hint}. "
        "Download or copy all of the model"
    )


def read_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one file, without reading their values.

    Raises:
        UserError: the file is damaged, needs code to be unpickled, or holds something other than tensors.
    """
    status = path.stat()
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            for name in file.keys():
                part = file.get_slice(name)
                yield StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype() in _FLOATS, part, status)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({first_line(error)}). {_REMEDY}") from error
    else:
        for name, tensor in load_pickle(path).items():
            yield StoredTensor(path, name, tuple(tensor.shape), tensor.dtype in _FLOATS, tensor, status)


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file, with nothing but tensors allowed in it; UserError if it is damaged or holds more."""
    _refuse_compressed(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and unpickling it could run any program ({first_line(error)}). "
            "Convert it to safetensors if you trust it, and use that file"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or not a PyTorch file ({first_line(error)}). {_REMEDY}") from error
    if not isinstance(loaded, dict) or not all(_is_named(name, tensor) for name, tensor in loaded.items()):
        raise UserError(f"{path} does not hold a mapping of names to tensors. Convert it to safetensors")
    return loaded


def _refuse_compressed(path: Path) -> None:
    """UserError if a .bin file is compressed, so larger in memory than on disk: `torch.save` never compresses."""
    try:
        with zipfile.ZipFile(path) as file:
            is_compressed = any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # another kind of file, or a damaged one, which `torch.load` reports
    if is_compressed:
        raise UserError(f"{path} is compressed, and torch.save never compresses. Convert it to safetensors")


def _is_named(name: object, value: object) -> bool:
    """Whether this is a name and a dense tensor with values: neither sparse nor on the meta device."""
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _read_shards(index: Path) -> Iterator[StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map. {_REMEDY}")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{index} names the shard {name!r}, which lies outside its folder. {_REMEDY}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}: {index.name} names {len(names)} shards. "
            "Download or copy what is missing"
        )
    present: set[str] = set()
    for name in names:
        for tensor in read_tensors(index.parent / name):
            present.add(tensor.name)
            yield tensor
    absent = sorted(weight_map.keys() - present)
    if absent:
        raise UserError(f"{index} lists {len(absent)} weights that no shard holds, such as {absent[0]}. {_REMEDY}")


def _download(name: str, weights: bool) -> Path:
    """The folder of a hub model; without a network, what the local cache has of it."""
    folder = Path(snapshot_download(name, allow_patterns=_TEXT_FILES))
    if not weights:
        return folder
    try:
        files = list_repo_files(name)
    except OSError:
        return folder
    has_safe = any(file.startswith("model") and file.endswith(".safetensors") for file in files)
    kind = "model*.safetensors" if has_safe else "pytorch_model*.bin"
    return Path(snapshot_download(name, allow_patterns=[*_TEXT_FILES, *_ADAPTER_FILES, kind]))


def first_line(error: BaseException) -> str:
    """A library's error on one line of at most 200 characters, to quote in a message of ours."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
