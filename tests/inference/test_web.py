"""The columns of `chat --web` are what the model says, one after the other; and only who has the key comes in."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers.exported import CPU
from helpers.runs import PARITY
from helpers.verbs import assert_refused, start
from llava_accel import chat
from llava_accel.data.conversation import Turn
from llava_accel.exceptions import UserError
from llava_accel.inference.beside import as_base
from llava_accel.inference.dialogue import Dialogue, Reply
from llava_accel.inference.origin import Loaded, find_trained, load_trained
from llava_accel.inference.web import BASE, BLIND, Columns, Guard, _path

ONE = str(PARITY / "images" / "t0.png")
KEY, PORT = "the-key-of-the-page", 7860
HERE = f"127.0.0.1:{PORT}"


@pytest.fixture(scope="module")
def opened(lora_run: Path) -> tuple[Dialogue, Loaded]:
    trained = find_trained(str(lora_run))
    loaded = load_trained(trained, dtype=torch.float32, device=CPU, keep_base=True)
    return Dialogue(loaded, trained.recipe, 8), loaded


@pytest.fixture
def columns(opened: tuple[Dialogue, Loaded]) -> Iterator[Columns]:
    columns = Columns(*opened, has_base=True)
    yield columns
    columns.close()


def test_each_column_is_an_answer_of_its_own(columns: Columns, opened: tuple[Dialogue, Loaded]) -> None:
    dialogue, loaded = opened
    turns = [Turn("user", "<image>\nTell me about it.")]
    own, blind = dialogue.reply(turns, [ONE]).text, dialogue.reply(turns, [ONE], blind=True).text
    with as_base(loaded):
        base = dialogue.reply(turns, [ONE]).text
    steps = list(columns.answers("Tell me about it.", ONE))
    grown = [[len(text) for text in step] for step in steps]
    assert len(steps) > 3 and grown == sorted(grown)
    for place, whole in enumerate((own, base, blind)):
        assert len(steps[-1][place]) == len(whole)  # an untrained model breaks characters, which are mended at the end


def test_without_a_picture_there_is_no_blind_answer(columns: Columns) -> None:
    said = list(columns.answers("Hello", ""))[-1]
    assert columns.titles[-1] == BLIND and said[0] and said[1] and not said[2]


@pytest.mark.parametrize(
    ("question", "image", "says"),
    [
        ("", ONE, "there is no question. Write one in words"),
        ("Is <image> it?", ONE, "<image> in a question has no image"),
        ("why " * 3000, "", "does not fit into the model's"),
        ("What?", str(PARITY / "labels_golden.json"), "is not a readable image"),
        ("What?", str(PARITY / "nowhere.png"), "is not a readable image"),
    ],
)
def test_what_cannot_be_asked_is_refused(question: str, image: str, says: str, columns: Columns) -> None:
    with pytest.raises(UserError, match=says):
        list(columns.answers(question, image))
    assert list(columns.answers("Hello", ""))[-1][0]


def test_an_answer_ends_when_nobody_reads_on_and_the_next_one_waits_for_it(
    columns: Columns, opened: tuple[Dialogue, Loaded]
) -> None:
    at_once, most, ended = [0], [0], threading.Event()

    def reply(_turns: object, _images: object, on_text: Callable[[str], None], **_: object) -> Reply:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            while True:
                on_text("more ")
        finally:
            at_once[0] -= 1
            ended.set()

    with patch.object(opened[0], "reply", reply):
        for _visit in range(2):
            ended.clear()
            asked = columns.answers("Hello", "")
            assert next(asked)[0] == "more "
            asked.close()  # pyright: ignore[reportAttributeAccessIssue]  a generator
            assert ended.wait(10)
    assert most == [1]


def test_a_defect_is_not_taken_for_the_end_of_an_answer(columns: Columns, opened: tuple[Dialogue, Loaded]) -> None:
    with patch.object(opened[0], "reply", side_effect=RuntimeError("of the card")):
        with pytest.raises(RuntimeError, match="of the card"):
            list(columns.answers("Hello", ""))


def test_without_a_base_its_column_is_left_out(opened: tuple[Dialogue, Loaded]) -> None:
    assert BASE not in Columns(*opened, has_base=False).titles


def test_a_picture_comes_from_the_folder_of_what_was_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "dropped"))
    inside = tmp_path / "dropped" / "a" / "b.png"
    assert _path({"path": str(inside)}) == str(inside)
    assert _path(None) == _path({"path": None}) == _path("text") == ""
    (tmp_path / "dropped").mkdir()
    (tmp_path / "dropped" / "link.png").symlink_to(ONE)
    for path in (
        ONE,
        "/etc/passwd",
        f"{tmp_path}/dropped/../other.png",
        f"{tmp_path}/dropped/link.png",
        "http://a/b.png",
    ):
        with pytest.raises(UserError, match="was not dropped here"):
            _path({"path": path})


def visit(path: str = "/", **headers: str) -> tuple[int, dict[str, str]]:
    """The status of a request and the headers of its response; 299 if the page itself has answered."""
    pytest.importorskip("starlette", reason="the extra web is not installed")
    sent: list[Any] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    given = {"host": HERE} | {name.replace("_", "-"): text for name, text in headers.items()}
    place, _, query = path.partition("?")
    scope = {"type": "http", "method": "POST", "path": place, "query_string": query.encode(), "scheme": "http"}
    scope["headers"] = [(name.encode(), text.encode("latin-1")) for name, text in given.items()]
    asyncio.run(Guard(page, KEY, PORT)(scope, receive, send))
    return sent[0]["status"], {name.decode(): text.decode() for name, text in sent[0]["headers"]}


def test_the_first_address_gives_a_cookie_that_no_script_and_no_other_site_gets() -> None:
    status, headers = visit(f"/?key={KEY}")
    assert status == 303 and headers["location"] == "/"
    name, _, rest = headers["set-cookie"].partition("=")
    assert name == f"llava_accel_{PORT}" and "HttpOnly" in rest and "SameSite=strict" in rest
    status, headers = visit(cookie=headers["set-cookie"].partition(";")[0])
    assert status == 299 and "frame-ancestors 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path", ["/", "/?key=wrong", "/?key=", "/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/config"]
)
@pytest.mark.parametrize("cookie", ["", f"llava_accel_{PORT}=wrong", f"llava_accel_1={KEY}", "llava_accel_7860=\xfc"])
def test_a_second_visitor_without_the_key_stays_outside(path: str, cookie: str) -> None:
    assert visit(path, cookie=cookie)[0] == 401


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "", "127.0.0.1.evil.example"])
def test_a_page_whose_address_leads_here_stays_outside(host: str) -> None:
    assert visit(f"/?key={KEY}", host=host)[0] == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": f"http://{HERE}"}, 299),
        ({"content_length": str(1 << 30)}, 413),
        ({"transfer_encoding": "chunked"}, 413),
        ({"content_length": "100"}, 299),
    ],
)
def test_what_another_page_sends_and_what_has_no_end_stays_outside(headers: dict[str, str], status: int) -> None:
    assert visit(cookie=f"llava_accel_{PORT}={KEY}", **headers)[0] == status


def test_without_the_extra_it_is_said_how_to_install_it(lora_run: Path) -> None:
    with patch.object(chat, "find_spec", return_value=None):
        ended = start("chat", "--adapter", str(lora_run), "--web")
    assert_refused(ended, ["--web needs gradio", 'pip install "llava_accel[web]"'])
