"""The page of `chat --web`: an image, a question, and answers side by side, streamed as they are written.

What a model writes is shown in text fields, which read no markup. Only requests from this machine, with the key, are
answered.
"""

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_accel.console.door import HOST, LARGEST_BODY, is_key, is_local_name
from llava_accel.data.conversation import IMAGE, Turn
from llava_accel.data.images import check_images
from llava_accel.exceptions import UserError
from llava_accel.inference.beside import as_base
from llava_accel.inference.collected import Collection
from llava_accel.inference.dialogue import Dialogue
from llava_accel.inference.origin import Loaded

if TYPE_CHECKING:
    import gradio

ANSWER, BASE, BLIND = "Answer", "The base's answer", "Answer without the image"
_POLICY = b"default-src 'self' 'unsafe-inline' data: blob:; frame-ancestors 'none'; form-action 'self'"


class Asked(NamedTuple):
    """A question that was answered."""

    question: str
    image: str
    answers: list[str]


class Columns:
    """Answers to a question, one after the other: each in a column of its own.

    Args:
        has_base: Whether the base answers too.
    """

    def __init__(self, dialogue: Dialogue, loaded: Loaded, *, has_base: bool) -> None:
        self.titles = [ANSWER, BASE, BLIND] if has_base else [ANSWER, BLIND]
        self._dialogue, self._loaded = dialogue, loaded
        self._one = ThreadPoolExecutor(1)  # whoever asks: the model writes one answer at a time
        self._is_over = Event()

    def answers(self, question: str, image: str) -> Iterator[list[str]]:
        """The texts of all columns, again whenever one of them grows.

        Raises:
            UserError: there is no question, or one that cannot be asked.
        """
        if not question or IMAGE in question:
            problem = f"{IMAGE} in a question has no image" if question else "there is no question"
            raise UserError(f"{problem}. Write one in words, and drop the image beside it")
        check_images([image] if image else [], whole=True)
        said = [""] * len(self.titles)
        for place, title in enumerate(self.titles):
            for piece in self._written(title, question, image) if image or title != BLIND else ():
                said[place] += piece
                yield list(said)

    def close(self) -> None:
        """End the answer that is being written."""
        self._is_over.set()
        self._one.shutdown(wait=False, cancel_futures=True)

    def _written(self, title: str, question: str, image: str) -> Iterator[str]:
        """The pieces of an answer as another thread writes them; that thread ends when nobody reads on."""
        pieces: SimpleQueue[str | None] = SimpleQueue()
        is_heard = [True]

        def on_text(text: str) -> None:
            if self._is_over.is_set() or not is_heard:
                raise InterruptedError
            pieces.put(text)

        def write() -> None:
            turns = [Turn("user", f"{IMAGE}\n" * bool(image) + question)]
            with as_base(self._loaded) if title == BASE else nullcontext():
                self._dialogue.reply(turns, [image] if image else [], on_text, blind=title == BLIND)

        written = self._one.submit(write)
        written.add_done_callback(lambda _: pieces.put(None))
        try:
            yield from iter(pieces.get, None)
            written.result()
        finally:
            is_heard.clear()


class Guard:
    """Answers only requests from this machine that bring the key: first in the address, then in a cookie.

    Args:
        app: The page, as an ASGI application.
    """

    def __init__(self, app: Callable[..., Any], key: str, port: int) -> None:
        self._app, self._key, self._cookie = app, key, f"llava_accel_{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse a request, or pass it on."""
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, RedirectResponse

        async def send_safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # the page opens no other connections
        request, refused = Request(scope), None
        host, length = request.headers.get("host"), request.headers.get("content-length", "")
        if not is_local_name(host) or request.headers.get("origin", f"http://{host}") != f"http://{host}":
            refused = PlainTextResponse(f"This page is for http://{HOST} alone.", 403)
        elif is_key(request.query_params.get("key", ""), self._key):
            refused = RedirectResponse("/", 303)
            refused.set_cookie(self._cookie, self._key, httponly=True, samesite="strict")
        elif request.url.path != "/manifest.json" and not is_key(request.cookies.get(self._cookie, ""), self._key):
            refused = PlainTextResponse("The key is missing. Open the address that the terminal shows.", 401)
        elif "transfer-encoding" in request.headers or (length.isdigit() and int(length) > LARGEST_BODY):
            refused = PlainTextResponse("The request is too large.", 413)
        await (refused or self._app)(scope, receive, send_safely)


def page(columns: Columns, collection: Collection | None) -> "gradio.Blocks":
    """The page itself. Without a collection it has no buttons that save answers."""
    import gradio

    def ask(dropped: object, question: object) -> Iterator[list[object]]:
        answers = [""] * len(columns.titles)
        yield [*answers, None, ""]
        image = ""
        try:
            image, text = _path(dropped), str(question or "").strip()
            for answers in columns.answers(text, image):
                yield [*answers, None, ""]
            yield [*answers, Asked(text, image, answers), ""]
        except UserError as error:
            yield [*answers, None, f"error: {error}".replace(image or "\0", "the image")]

    def save(place: int | None, asked: Asked | None, written: str = "") -> tuple[None, str] | tuple[Asked | None, str]:
        """Save the answer of a column, or the text that was written in place of the first one's."""
        assert collection is not None
        if asked is None:
            return None, "Nothing to save. Ask a question first"
        others = asked.answers[1:-1] if place == 0 else asked.answers[:1]
        answer = written.strip() if place is None else asked.answers[place]
        try:
            return None, collection.add(asked.question, asked.image, answer, "".join(others))
        except UserError as error:
            return asked, f"error: {error}"

    with gradio.Blocks(title="llava_accel", analytics_enabled=False) as blocks:
        asked = gradio.State(None)
        with gradio.Row():
            image = gradio.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="Image",
                elem_id="image",
                height=320,
                buttons=[],
            )
            with gradio.Column():
                question = gradio.Textbox(label="Question", max_lines=6, elem_id="question")
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
                note = gradio.Textbox(label="Messages", interactive=False, elem_id="note")
        with gradio.Row():
            fields = [
                gradio.Textbox(label=title, lines=6, interactive=False, elem_id=f"answer{place}")
                for place, title in enumerate(columns.titles)
            ]
        private: dict[str, Any] = {"api_visibility": "private", "preprocess": False, "show_progress": "hidden"}
        gradio.on([button.click, question.submit], ask, [image, question], [*fields, asked, note], **private)
        if collection is not None:
            with gradio.Row():
                for place, title in enumerate(columns.titles[:-1]):
                    better = gradio.Button(f"{title} is right: save it", elem_id=f"better{place}")
                    better.click(partial(save, place), asked, [asked, note], **private)
                worse = gradio.Button(f"{ANSWER} is wrong: correct it", elem_id="worse")
            written = gradio.Textbox(label="What it should have said", lines=3, elem_id="written")
            kept = gradio.Button("Save the correction", elem_id="save")
            worse.click(lambda asked: asked.answers[0] if asked else "", asked, written, **private)
            kept.click(partial(save, None), [asked, written], [asked, note], **private)
    # Only `launch` sets this; without it gradio takes any file of the machine for one that was dropped.
    blocks.has_launched = True
    return blocks.queue(max_size=16)


def show(columns: Columns, collection: Collection | None, door: socket.socket) -> None:
    """Serve the page until Ctrl-C, and print its address. No other machine is contacted."""
    key, port = secrets.token_urlsafe(24), door.getsockname()[1]
    with TemporaryDirectory(prefix="llava_accel_") as dropped:
        # Read when gradio is imported; without them it reports starts to its makers, and all users can read the images.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": dropped}
        import fastapi
        import gradio
        import uvicorn
        from gradio.themes import Base

        app = gradio.mount_gradio_app(
            fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            page(columns, collection),
            "/",
            server_name=HOST,
            server_port=port,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=LARGEST_BODY,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=Base(font=["sans-serif"], font_mono=["monospace"]),  # the default's are fetched
        )
        settings = uvicorn.Config(Guard(app, key, port), log_level="critical", timeout_graceful_shutdown=1)

        async def serve() -> None:  # which ends in order from its first line on
            print(f"page: http://{HOST}:{port}/?key={key}\nCtrl-C ends it.", flush=True)
            await uvicorn.Server(settings).serve(sockets=[door])

        try:
            asyncio.run(serve())
            raise KeyboardInterrupt  # nothing else ends it, and not every version of uvicorn hands it on
        finally:
            columns.close()


def _path(dropped: object) -> str:
    """The file of an image that was dropped; UserError if it did not come in through the page."""
    path = dropped.get("path") if isinstance(dropped, dict) else None
    if path is not None and not Path(str(path)).resolve().is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()):
        raise UserError("this image was not dropped here. Drop it again")
    return str(path or "")
