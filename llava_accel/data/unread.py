"""Content of a record that none of our fields holds: images under other names, videos, boxes. Training without it would be
wrong and look right, so such records are refused.
"""

import re
from collections.abc import Sequence

from llava_accel.data.columns import Columns
from llava_accel.data.conversation import Turn
from llava_accel.data.messages import Fields, present
from llava_accel.recipe.toml import toml_value
from llava_accel.sources.downloads import is_remote
from llava_accel.sources.image_parts import is_image_name, part_of, shown
from llava_accel.sources.problems import DataError, quoted, some

_TEXTS = {
    "id", "question_id", "question", "answer", "query", "response", "instruction", "input", "output", "prompt", "completion",
    "caption", "text", "prefix", "suffix", "system", "system_prompt", "chosen", "rejected", "rejected_response",
}  # fmt: skip
"""Fields whose value is a text even if it ends like the name of an image."""
_LONGEST_NAME = 300
_CALLED_IMAGE = re.compile(r"image|img|photo|picture", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:image|img)_?\d\d?")
"""Names of further images of a record: larger numbers tell the size of a smaller copy."""
_IDS = ("image_id", "img_id")
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
_BOXES = ("<bbox>", "<ref-object>")
_PATH_IN_TEXT = re.compile(r"<img>[^<>\n]+</img>")


def check_all_is_read(fields: Fields, turns: Sequence[Turn], images: Sequence[str], columns: Columns) -> None:
    """DataError if the record shows something that is not among its images.

    Args:
        turns, images: Those that were read from it.
        columns: If these name the image, a record without a value there has no image.
    """
    for name in _OTHER_MEDIA:
        if fields.get(name):
            problem = f"{name!r} is {quoted(fields[name])}, and only images are learned"
            raise DataError("fields", problem, "Remove such records, or leave them out with a data.reader")
    if "objects" in fields and any(box in turn.text for turn in turns for box in _BOXES):
        problem = f"'objects' holds the values of {' and '.join(_BOXES)}, which are not put into the texts"
        raise DataError("fields", problem, "Write names and numbers into the texts, as the model is to say them")
    others = fields.get("images")
    if images and isinstance(others, list) and len(others) > len(images) and "image" not in dict(columns):
        problem = f"'images' has {len(others)}, and 'image' {len(images)}, which alone is read"
        raise DataError("image_count", problem, "Write all of them in 'images', and drop 'image'")
    if "image" in dict(columns):
        return
    if images:
        for name in filter(_NUMBERED.fullmatch, fields):
            if _is_of_image(name, fields[name]):
                problem = f"{name!r} seems to be an image beside the one that is read"
                raise DataError("image_count", problem, "Write all of them in 'images', or remove it from the record")
        return
    if any(turn.role == "user" and "</img>" in turn.text and _PATH_IN_TEXT.search(turn.text) for turn in turns):
        raise DataError(
            "image_count", "a text names an image in <img>...</img>", "Write <image>, and its name in 'image'"
        )
    named = [name for name, value in fields.items() if name not in _TEXTS and _is_of_image(name, value)]
    others = f" (and so does {some(list(map(repr, named[1:])))})" if len(named) > 1 else ""
    for name in [*named, *(name for name in _IDS if fields.get(name) is not None)]:
        value = fields[name]
        seen = shown(value) if isinstance(value, str) else value
        problem = f"{name!r} is {quoted(seen)}, which seems to be an image{others}, and no field that is read names one"
        mapped = toml_value({**dict(columns), "image": name})
        remedy = "Write its file in 'image'" if name in _IDS else f"Name the column, data.columns = {mapped}"
        remedy += "; or write all of them in 'images'" if others else "; or remove it from the record"
        raise DataError("image_count", problem, remedy)


def _is_of_image(name: str, value: object) -> bool:
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = present(value, "path", "url")
    if not isinstance(value, str):
        return False
    is_name = is_image_name(value) and len(value) <= _LONGEST_NAME and "\n" not in value
    return is_name or part_of(value) is not None or (is_remote(value) and bool(_CALLED_IMAGE.search(name)))
