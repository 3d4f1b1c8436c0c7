"""WebDataset shards: tar archives in which neighbouring members with the same name but for the suffix are one sample.

The rows and the places of the images are read once into the table of each shard. Then any sample is reached in any order, as
the data order of a resumed run demands; streaming readers replay a shard to find their place, and MDS needs a copy of all
images.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from llava_accel.sources.extraction import OWN, Extraction
from llava_accel.sources.image_parts import digest_of_ends, is_image_name
from llava_accel.sources.json_rows import MAX_BYTES
from llava_accel.sources.problems import DataError, quoted

_TEXTS = {"txt": "caption", "text": "caption", "caption": "caption", "cls": "label"}
"""Suffix of a text member -> the field of the row that it becomes."""
_IMAGES = ("image", "images")


def tar_rows(path: Path, extraction: Extraction) -> Iterator[bytes]:
    """Each sample as JSON: the fields of its .json, a caption from its .txt, and its images, which stay in the file.

    Raises:
        DataError: the file is not a tar archive, is compressed, or a text in it cannot be read.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            files = (one for one in archive if _is_part(one, path) and not Path(one.name).name.startswith("."))
            known: set[str] = set()
            for number, (name, members) in enumerate(groupby(files, _key), start=1):
                try:
                    if name in known:
                        problem = f"the files of the sample {quoted(name.removeprefix('/'))} are not side by side"
                        raise DataError("json", problem, "Write the archive in the order of names: tar --sort=name -cf")
                    known.add(name)
                    row = _row(archive, name.removeprefix("/"), members, extraction)
                except DataError as error:
                    raise error.at(str(path), number, None) from None
                yield extraction.row(row)
    except (tarfile.TarError, EOFError) as error:
        problem = f"not a readable tar archive ({error})"
        remedy = "Unpack a compressed one (gunzip), so that images can be read where they are; else write it again"
        raise DataError("json", problem, remedy, file=str(path)) from None


def _is_part(member: tarfile.TarInfo, path: Path) -> bool:
    """Whether a member is a file; DataError for a link, as its sample would lack the content."""
    if member.islnk() or member.issym():
        problem = f"{member.name} is a link to {member.linkname}, which holds nothing"
        raise DataError("json", problem, "Write files in its place: tar --hard-dereference -h", file=str(path))
    return member.isreg()


def _key(member: tarfile.TarInfo) -> str:
    """The part of the name that all files of a sample share: up to the first dot of the file name."""
    folder, _, name = member.name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _row(
    archive: tarfile.TarFile, name: str, members: Iterable[tarfile.TarInfo], extraction: Extraction
) -> dict[str, object]:
    fields: dict[str, object] = {"id": name}
    images: list[dict[str, object]] = []
    texts: dict[str, str] = {}
    for member in members:
        suffix = member.name.rpartition(".")[2].lower()
        if suffix in ("json", *_TEXTS) and (other := texts.setdefault(suffix, member.name)) != member.name:
            problem = f"{other} and {member.name} are of one sample: their names are equal up to the first dot"
            raise DataError("fields", problem, "Write no dot into the name of a sample")
        if is_image_name(member.name):
            with _opened(archive, member) as file:
                key = digest_of_ends(file).hex()
            place = [OWN, member.offset_data, member.size]
            read = partial(_content, archive, member)
            images.append(extraction.part(key, member.name, read, partial(list, place)))
        elif suffix == "json":
            fields |= _object(_short(archive, member), member.name)
        elif suffix in _TEXTS:
            fields[_TEXTS[suffix]] = _text(_short(archive, member), member.name)
    if images:  # names in the .json are those that the images had before they were packed
        fields = {name: value for name, value in fields.items() if name not in _IMAGES}
        fields["image"] = images
    return fields


def _short(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_BYTES:
        problem = f"{member.name} is longer than {MAX_BYTES >> 20} MiB"
        raise DataError("json", problem, "Write one conversation per sample")
    return _content(archive, member)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _opened(archive, member) as file:
        return file.read()


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader:
    file = archive.extractfile(member)
    assert isinstance(file, io.BufferedReader), "a regular file"
    return file


def _object(content: bytes, name: str) -> dict[str, object]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError("json", f"{name} is not valid JSON ({error})", "Correct it") from None
    if not isinstance(fields, dict):
        raise DataError("json", f"{name} is not a JSON object", "Write {...}")
    return fields


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise DataError("json", f"{name} is not UTF-8 ({error})", "Save it as UTF-8") from None
