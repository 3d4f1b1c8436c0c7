"""Finds the files of all that data.train and data.eval may name: files, folders, globs, data sets of the hub."""

import glob
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llava_accel.recipe.paths import SUFFIXES
from llava_accel.sources import hub
from llava_accel.sources.image_parts import is_image_name
from llava_accel.sources.problems import DataError, quoted, some

_GLOB = re.compile(r"[*?\[]")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
EVAL_SPLITS = ("validation", "val", "valid", "dev", "eval", "test")
"""Names that data sets give the split to evaluate on; the first of these that a data set has is chosen."""


class Named(NamedTuple):
    """One source, as a recipe names it: see `recipe.inputs.Source`."""

    path: str
    images: str = ""
    """"" = the folder of each file."""
    weight: float = 1.0
    limit: int = 0
    config: str = ""
    splits: tuple[str, ...] = ("train",)
    """For a data set with splits: the first of these that it has is read."""
    revision: str = ""

    @property
    def name(self) -> str:
        """A name that tells it from the recipe's other sources."""
        split = self.splits[0] if self.splits != ("train",) and len(self.splits) == 1 else ""
        return " ".join(filter(None, [self.path, self.config, split]))


def files_of(named: Named) -> list[Path]:
    """The files of a source, in the order of their names.

    Raises:
        DataError: it does not exist, or has no data file; names what was looked for.
    """
    path = Path(named.path)
    if path.is_dir():
        return _of_folder(path, named)
    if path.exists() or not (hub.is_name(named.path) or _GLOB.search(named.path)):
        return [path]  # if something is wrong with it, `Table` says what
    if hub.is_name(named.path):
        return hub.files(named.path, named.config, named.splits, named.revision)
    paths = sorted(Path(name) for name in glob.glob(named.path, recursive=True))
    files = [file for each in paths for file in (_of_folder(each, named) if each.is_dir() else [each])]
    if not files:
        raise DataError("json", f"no file has a name like {quoted(named.path, 200)}", "Check data.train and data.eval")
    return files


def held_out_split(path: str) -> str:
    """The split that a data set has for evaluation; "" if it has none, or if `path` is not a data set with splits."""
    folder = Path(path)
    present: list[str] = []
    if (folder / "dataset_dict.json").is_file():
        present = _saved(folder / "dataset_dict.json", lambda content: content["splits"])
    elif _is_of_files(folder) if folder.exists() else hub.is_name(path):
        present = hub.splits(path)
    return next((name for name in EVAL_SPLITS if name in present and "train" in present), "")


def _of_folder(folder: Path, named: Named) -> list[Path]:
    if (folder / "dataset_dict.json").is_file():
        splits = _saved(folder / "dataset_dict.json", lambda content: content["splits"])
        return _of_folder(folder / hub.choose_split(splits, named.splits, str(folder)), named)
    if (folder / "state.json").is_file():  # as `save_to_disk` of `datasets` leaves it
        names = _saved(folder / "state.json", lambda content: [each["filename"] for each in content["_data_files"]])
        return [folder / name for name in names]
    if files := _plain_files(folder):
        _check_all_unpacked(folder, files)
        return files
    if any(folder.iterdir()):
        compressed = [file.name for file in folder.iterdir() if file.suffix in _COMPRESSED]
        if compressed and not _is_repository(folder):
            problem = f"the folder {folder} holds only compressed files: {some(sorted(compressed))}"
            raise DataError("json", problem, "Unpack them")
        if all(is_image_name(file.name) for file in folder.iterdir()):
            problem = f"the folder {folder} holds images alone, and no records"
            raise DataError("json", problem, "Name the file of the records, and this folder in data.images")
        return hub.files(str(folder), named.config, named.splits, "")
    raise DataError("json", f"the folder {folder} holds no data file", f"Expected one of {', '.join(SUFFIXES)}")


def _check_all_unpacked(folder: Path, files: list[Path]) -> None:
    """DataError if a compressed file lies beside others of its form, as one of them that was not unpacked."""
    forms, names = {file.suffix.lower() for file in files}, {file.name for file in files}
    packed = [file for file in folder.iterdir() if file.suffix in _COMPRESSED and file.stem not in names]
    forms |= {".tgz"} if ".tar" in forms else set()
    if left := sorted(file.name for file in packed if {file.suffix, Path(file.stem).suffix.lower()} & forms):
        problem = f"the folder {folder} holds compressed files beside those that are read: {some(left)}"
        raise DataError("json", problem, f"Unpack them; or leave them out by a pattern: {folder}/*{files[0].suffix}")


def _is_of_files(folder: Path) -> bool:
    """Whether a folder is in the form of the hub, where the names of files and folders tell the splits."""
    return folder.is_dir() and not (folder / "state.json").is_file() and not _plain_files(folder)


def _plain_files(folder: Path) -> list[Path]:
    """The data files of a folder; none if it is a copy of a data set of the hub."""
    files = sorted(
        file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    return [] if _is_repository(folder) else files


def _is_repository(folder: Path) -> bool:
    """Whether this is a copy of a data set of the hub, whose card says which files are of which split."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes()[:4] == b"---\n"


def _saved(path: Path, read: Callable[[Any], list[str]]) -> list[str]:
    """The names in a file that `save_to_disk` of datasets wrote; DataError if it is not such a file, or names nothing."""
    try:
        names = list(map(str, read(json.loads(path.read_bytes()))))
    except (ValueError, KeyError, TypeError) as error:
        problem = f"not what `save_to_disk` of datasets writes ({error})"
        raise DataError("json", problem, "Save the data set again", file=str(path)) from None
    if not names:
        raise DataError("json", "it names no file and no split", "Save the data set again", file=str(path))
    return names
