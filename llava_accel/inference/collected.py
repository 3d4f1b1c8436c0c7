"""Stores answers that a person has chosen or written, as records that can be trained on as they are."""

import hashlib
import json
import uuid
from pathlib import Path

from PIL import Image

from llava_accel.data.conversation import IMAGE
from llava_accel.data.records import parse_record
from llava_accel.exceptions import UserError
from llava_accel.storage.atomic import atomic_file, check_out
from llava_accel.storage.jsonl import append_whole


class Collection:
    """Two files that grow: FILE.jsonl holds each answer, FILE.pairs.jsonl those that are preferred to another one.

    Images are copied to FILE_images beside them, under names that are made from their content.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, file: Path, system: str | None) -> None:
        check_out(file, "--collect", "mine.jsonl")
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.pairs = file, file.with_name(f"{file.stem}.pairs.jsonl")
        self._system = system

    def add(self, question: str, image: str, answer: str, rejected: str) -> str:
        """Write an answer, and return a line for the user about where it was saved.

        Args:
            image: An image that can be read, or empty.
            rejected: The answer that it is better than; empty, or the same answer, if there is none.

        Raises:
            UserError: no record can hold the answer, or the disk has no room for it.
        """
        if IMAGE in answer:
            raise UserError(f"{IMAGE} in an answer has no image. Leave it out")
        same = {"id": uuid.uuid4().hex[:16]}
        said = [] if self._system is None else [{"from": "system", "value": self._system}]
        said += [{"from": "human", "value": f"{IMAGE}\n" * bool(image) + question}, {"from": "gpt", "value": answer}]
        try:
            same |= {"image": self._kept(Path(image))} if image else {}
            record = json.dumps({**same, "conversations": said}) + "\n"
            parse_record(record.encode(), 1).check_answers()
            append_whole(self.file, record)
            if rejected.strip() in ("", answer.strip()):
                return f"Saved in {self.file}"
            pair = same if self._system is None else same | {"system": self._system}
            pair |= {"question": question, "chosen": answer, "rejected": rejected}
            append_whole(self.pairs, json.dumps(pair) + "\n")
        except OSError as error:
            raise UserError(f"{self.file} cannot be written ({error.strerror}). Make room, and save again") from None
        return f"Saved in {self.file} and, as a preference, in {self.pairs}"

    def _kept(self, image: Path) -> str:
        """Copy an image; returns the copy's name, relative to the folder of the file."""
        content = image.read_bytes()
        with Image.open(image) as opened:
            suffix = str(opened.format).lower()
        name = f"{self.file.stem}_images/{hashlib.sha256(content).hexdigest()[:32]}.{suffix}"
        if not (self.file.parent / name).exists():
            with atomic_file(self.file.parent / name) as unfinished:
                unfinished.write_bytes(content)
        return name
