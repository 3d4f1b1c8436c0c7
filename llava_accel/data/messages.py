"""A list of messages -> turns: who speaks, and texts that are written in parts, with images between them."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from llava_accel.data.conversation import IMAGE, Role, Turn
from llava_accel.sources.problems import DataError, quoted

Fields = Mapping[str, object]
Named = list[str | int | None]
"""What each image part of a conversation names: a file, a place in `images`, or nothing."""

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "system": "system",
    "gpt": "assistant", "assistant": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "ai": "assistant",
}  # fmt: skip
_TOOLS = ("function_call", "observation", "tool", "function", "tool_call", "tool_response")
_LEARNED = ("weight", "loss", "train", "train_on_turn")
"""Fields of a message that say in other tools' forms whether an answer is learned."""
IMAGE_FIELDS = ("image", "images", "image_path", "img", "image_url")


def present(fields: Fields, *names: str) -> object:
    """The first of these fields that is there. A null counts as absent: Parquet has no other way to leave a field out."""
    for name in names:
        if (value := fields.get(name)) is not None:
            return value
    return None


def read_messages(rows: Sequence[object]) -> tuple[list[Turn], Named]:
    """The turns of `{"from": ..., "value": ...}` or `{"role": ..., "content": ...}`, and the images that parts name.

    Raises:
        DataError: an entry is not a message, its speaker is not known, or it has no text.
    """
    turns: list[Turn] = []
    named: Named = []
    for position, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError("fields", f"turn {position} is {quoted(row)}", 'Write {"from": ..., "value": ...}')
        speaker, text = row.get("from"), row.get("value")
        if (
            len(row) == 2 and isinstance(speaker, str) and isinstance(text, str) and speaker in _ROLES
        ):  # nearly all are LLaVA's
            turns.append(Turn(_ROLES[speaker], text))
            continue
        text = present(row, "value", "content")
        role = role_of(row) or _refused(row, position)
        if role == "assistant" and (unlearned := [name for name in _LEARNED if row.get(name) in (False, 0)]):
            problem = f"turn {position} has {unlearned[0]!r} = {row[unlearned[0]]}, and every answer is learned"
            raise DataError("fields", problem, "Remove it together with its question, or let the record begin after it")
        turns.append(Turn(role, text if isinstance(text, str) else _joined(text, role, position, named)))
    return turns, named


def read_images(fields: Fields, named: Named) -> tuple[str, ...]:
    """The image names of a row: those of its field, or those that its parts name.

    Raises:
        DataError: a value is not a name, or field and parts do not name the same images.
    """
    value = present(fields, *IMAGE_FIELDS)
    if isinstance(value, str) and value and not named:
        return (value,)
    listed = [] if value is None else list(map(image_reference, value if isinstance(value, list) else [value]))
    if all(each is None for each in named):
        return tuple(listed)
    images: list[str] = []
    for each in named:
        if each is None or (isinstance(each, int) and not 0 <= each < len(listed)):
            problem = "an image part names no image" if each is None else f"an image part names image {each}"
            problem += f", where others do; 'images' has {len(listed)}"
            raise DataError("image_count", problem, "Name an image in every part, or in none and all in 'images'")
        images.append(listed[each] if isinstance(each, int) else each)
    if unused := [name for name in listed if name not in images]:
        problem = f"'images' has {quoted(unused[0])}, which no image part names"
        raise DataError("image_count", problem, "Name the images in the parts, or in 'images', not in both")
    return tuple(images)


def image_reference(value: object) -> str:
    """The name of an image that is given by its name, or by an object with its path or address.

    Raises:
        DataError: it is neither.
    """
    name = value
    if isinstance(value, dict) and value.get("bytes") is None:
        name = present(value, "path", "url")
    if not isinstance(name, str) or not name:
        raise DataError("fields", f"'image' holds {quoted(value)}, not a file name", "Name a file, or drop it")
    return name


def role_of(message: object) -> Role | None:
    """The role of the speaker; None if it is missing or not known."""
    speaker = present(message, "from", "role") if isinstance(message, dict) else None
    if not isinstance(speaker, str):
        return None
    return _ROLES.get(speaker) or _ROLES.get(speaker.strip().lower())


def _refused(message: Fields, position: int) -> NoReturn:
    speaker = present(message, "from", "role")
    problem = f"turn {position} " + ("has no 'from' or 'role'" if speaker is None else f"is from {quoted(speaker)}")
    if isinstance(speaker, str) and speaker.lower() in _TOOLS:
        raise DataError("roles", f"{problem}: tool calls are not learned", "Remove such turns, or the record")
    raise DataError("roles", problem, f"Use one of {', '.join(_ROLES)} in 'from'")


def _joined(content: object, role: Role, position: int, named: Named) -> str:
    """The text of a turn in parts, with `<image>` in the place of each image, which is added to `named`."""
    if not isinstance(content, list):
        raise DataError("fields", f"the text of turn {position} is {quoted(content)}", "Write its text as a string")
    texts: list[str] = []
    for part in content:
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
        if kind in ("text", None) and isinstance(text, str):
            texts.append(text)
        elif kind not in ("image", "image_url"):
            problem = f"turn {position} has the part {quoted(part)}"
            raise DataError("fields", problem, 'Write {"type": "text", "text": ...} or {"type": "image"}')
        elif role != "user":
            raise DataError(
                "image_count", f"turn {position} is from {role!r} and has an image", "Move it into a question"
            )
        else:
            value, index = present(part, "image", "image_url", "url", "path", "base64"), part.get("index")
            is_index = isinstance(index, int) and not isinstance(index, bool)
            named.append(image_reference(value) if value is not None else index if is_index else None)
            texts.append(IMAGE)
    return "".join(texts)
