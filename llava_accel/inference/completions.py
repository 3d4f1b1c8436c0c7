"""The form of OpenAI's chat.completions: a request's messages become turns, and answers and errors take that form."""

import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llava_accel.data.conversation import IMAGE, Turn
from llava_accel.data.images import check_images
from llava_accel.exceptions import UserError
from llava_accel.inference.dialogue import Reply
from llava_accel.sources.extraction import image_of_base64
from llava_accel.sources.problems import quoted

_HARMLESS = {
    "n": 1, "tools": [], "functions": [], "stop": [], "logprobs": False, "modalities": ["text"],
    "response_format": {"type": "text"},
}  # fmt: skip
"""Fields that would change the form of an answer, each with the value that does not."""


class Refused(UserError):
    """A request that is not answered, with its HTTP status and its error in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.form = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Address(BaseModel):
    url: str


class _Part(BaseModel):
    type: Literal["text", "image_url"]
    text: str = ""
    image_url: _Address = _Address(url="")


class _Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[_Part]


class Request(BaseModel):
    """The fields of a request that are read. OpenAI's other fields have no effect, or are refused."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[_Message] = Field(min_length=1)
    stream: bool | None = False
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


def read_request(body: bytes, model: str, folder: Path) -> tuple[Request, list[Turn], list[str]]:
    """Read a request to the model of this name; returns it, its turns, and the paths of their images.

    Args:
        folder: Where images are written to.

    Raises:
        Refused: it is malformed, or asks for something that is not done here.
    """
    try:
        request = Request.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise Refused(400, f"{place or 'the body'}: {first['msg']}", param=place or None) from None
    if request.model != model:
        problem = f"there is no model {quoted(request.model)}. Ask for {quoted(model)}"
        raise Refused(404, problem, "model_not_found", "model")
    for name, harmless in _HARMLESS.items():
        if (request.model_extra or {}).get(name) not in (None, harmless):
            raise Refused(400, f"{name} is not known here. Leave it out, or use vLLM", "unsupported_parameter", name)
    images: list[str] = []
    turns = [_turn(message, f"messages.{place}", folder, images) for place, message in enumerate(request.messages)]
    roles = [turn.role for turn in turns[turns[0].role == "system" :]]
    if len(roles) % 2 == 0 or set(roles[::2]) != {"user"} or set(roles[1::2]) - {"assistant"}:
        problem = "roles go [system] user (assistant user) ... and end with a user's question. Put them in this order"
        raise Refused(400, problem, param="messages")
    return request, turns, images


def _turn(message: _Message, place: str, folder: Path, images: list[str]) -> Turn:
    """The turn of a message. Its images are added to `images`; their marks come first, as in `chat`."""
    parts = [_Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    text = "".join(part.text for part in parts if part.type == "text")
    urls = [part.image_url.url for part in parts if part.type == "image_url"]
    if IMAGE in text or (urls and message.role != "user"):
        problem = f"{IMAGE} in a text has no image" if IMAGE in text else f"an image comes from the {message.role}"
        raise Refused(400, f"{problem}. Give images as image_url parts of the user's messages", param=place)
    for url in urls:
        content, path = image_of_base64(url) if url.startswith("data:") else None, folder / uuid.uuid4().hex
        try:
            if content is None:
                problem = f"{quoted(url, 60)} is not data:image/png;base64,..."
                raise UserError(f"{problem} Files and addresses are never read")
            path.write_bytes(content)
            check_images([path], whole=True)
        except UserError as error:
            raise Refused(400, str(error).replace(str(path), "image_url"), "invalid_image_url", place) from None
        images.append(str(path))
    return Turn(message.role, f"{IMAGE}\n" * len(urls) + text)


def answer_form(same: dict[str, Any], reply: Reply | None = None, **said: dict[str, str]) -> dict[str, Any]:
    """An answer, or a piece of it.

    Args:
        same: What all pieces have in common.
        reply: The whole answer, where this form ends it.
        said: The `message` that it is, or the `delta` of a piece.
    """
    end = None if reply is None else "length" if reply.is_cut else "stop"
    kind = "chat.completion.chunk" if "delta" in said else "chat.completion"
    form = {**same, "object": kind, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": end}]}
    if reply:
        tokens = {"prompt_tokens": reply.num_asked, "completion_tokens": reply.num_written}
        form["usage"] = {**tokens, "total_tokens": sum(tokens.values())}
    return form
