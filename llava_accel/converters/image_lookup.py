"""Finds a published data set's images below the folder that the user names, and records which are missing."""

import os
from pathlib import Path

from llava_accel.data.images import find_image
from llava_accel.sources.problems import DataError, quoted, some


class ImageLookup:
    """Finds images in a folder, or one folder below, and records those that are missing.

    Args:
        folder: The folder that --images names.
        source: Where the images can be downloaded, for the message about missing ones.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: Path, source: str) -> None:
        if not folder.is_dir():
            raise DataError("missing_image", f"there is no folder {folder}", "Check --images")
        self.folder, self.source = folder, source
        self._places = ["", *sorted(f"{entry.name}/" for entry in os.scandir(folder) if entry.is_dir())]
        self._content: dict[str, frozenset[str]] = {}
        self._found: dict[str, str] = {}
        self.missing: dict[str, None] = {}
        """Names that no file has, in the order in which they were asked for."""

    def find(self, *names: str) -> str:
        """The name of an image relative to the folder, the same whenever the same image is asked for.

        Args:
            names: Names that it may have, the best first.

        Raises:
            DataError: it is missing, or lies outside the folder. Without file and row.
        """
        image = self._found.get(names[0])
        if image is None:
            image = next((place + name for name in names for place in self._places if self._has(place + name)), None)
            if image is None:
                self.missing[names[0]] = None
                problem = f"there is no image {quoted(names[0])} in {self.folder}"
                raise DataError("missing_image", problem, f"Add it, from {self.source}")
            find_image(self.folder, image)
            self._found[names[0]] = image
        return image

    def shortage(self) -> tuple[str, str]:
        """How many images are missing, with the names of some, and the remedy."""
        total = len(self.missing) + len(self._found)
        names = [name if name.isprintable() else quoted(name) for name in self.missing]
        return (
            f"{len(self.missing):,} of {total:,} images are not in {self.folder}: {some(names)}",
            f"Give the folder that holds them, or the one above it, with --images; they are in {self.source}",
        )

    def _has(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self._content:
            path = self.folder / folder
            is_listed = "\0" not in folder and os.path.isdir(path)
            self._content[folder] = frozenset(os.listdir(path)) if is_listed else frozenset()
        return file in self._content[folder]
