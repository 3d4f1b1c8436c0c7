"""Answers that a person has chosen or written, as records that one can train on as they are."""

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

    Pictures are copied to FILE_images beside them, each once, under a name that is made from its content.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, file: Path) -> None:
        check_out(file, "--collect")
        self.file, self.pairs = file, file.with_name(f"{file.stem}.pairs.jsonl")
        self._images = file.with_name(f"{file.stem}_images")

    def add(self, system: str | None, question: str, image: str, answer: str, rejected: str) -> str:
        """Write an answer, and return what has been written, for people.

        Args:
            image: A picture that can be read, or empty.
            rejected: What it is better than; empty, or the same answer, if it is not.

        Raises:
            UserError: no record can hold the answer, or the disk has no room for it.
        """
        if IMAGE in answer:
            raise UserError(f"{IMAGE} in an answer has no image. Leave it out")
        same = {"id": uuid.uuid4().hex[:16]} | ({"image": self._name(image)} if image else {})
        said = [] if system is None else [{"from": "system", "value": system}]
        said += [{"from": "human", "value": f"{IMAGE}\n" * bool(image) + question}, {"from": "gpt", "value": answer}]
        record = json.dumps({**same, "conversations": said}) + "\n"
        parse_record(record.encode(), 1).check_answers()
        pair = same | ({} if system is None else {"system": system})
        pair |= {"question": question, "chosen": answer, "rejected": rejected}
        is_pair = rejected.strip() not in ("", answer.strip())
        try:
            if image:
                self._keep(Path(image))
            append_whole(self.file, record)
            if is_pair:
                append_whole(self.pairs, json.dumps(pair) + "\n")
        except OSError as error:
            raise UserError(f"{self.file} cannot be written ({error.strerror}). Make room, and save again") from None
        return f"Saved in {self.file}" + (f" and, as a preference, in {self.pairs}" if is_pair else "")

    def _name(self, image: str) -> str:
        with Image.open(image) as opened:
            suffix = str(opened.format).lower()
        return f"{self._images.name}/{hashlib.sha256(Path(image).read_bytes()).hexdigest()[:32]}.{suffix}"

    def _keep(self, image: Path) -> None:
        kept = self.file.parent / self._name(str(image))
        if not kept.exists():
            with atomic_file(kept) as unfinished:
                unfinished.write_bytes(image.read_bytes())
