"""Requests in OpenAI's form are answered as chat answers, for those who have the key, and nothing else comes through."""

import base64
import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from helpers.exported import CPU
from helpers.runs import PARITY
from helpers.verbs import assert_refused, start
from llava_accel import serve
from llava_accel.console.door import open_door
from llava_accel.exceptions import UserError
from llava_accel.inference.dialogue import Dialogue, Reply
from llava_accel.inference.origin import find_trained, load_trained

ONE, TWO = PARITY / "images" / "t0.png", PARITY / "images" / "t3.png"
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def dialogue(lora_run: Path) -> Dialogue:
    trained = find_trained(str(lora_run))
    return Dialogue(load_trained(trained, dtype=torch.float32, device=CPU), trained.recipe, 8)


@pytest.fixture(scope="module")
def server(dialogue: Dialogue) -> Iterator[serve.Server]:
    with serve.Server(open_door(0), dialogue, "mine", KEY) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_traceback(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing that a client does is a defect of the server."""
    yield
    assert capsys.readouterr().err == ""


@pytest.fixture
def ask(server: serve.Server) -> Callable[..., tuple[int, str]]:
    """Sends a request; its status and the text of its body."""

    def send(
        body: object = None,
        path: str = "/v1/chat/completions",
        method: str = "POST",
        **headers: str,
    ) -> tuple[int, str]:
        connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
        given = {"Authorization": f"Bearer {KEY}"} | {name.replace("_", "-"): text for name, text in headers.items()}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content if method == "POST" else None, given)
        response = connection.getresponse()
        assert response.getheader("Access-Control-Allow-Origin") is None
        return response.status, response.read().decode()

    return send


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def shown(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def chat(*contents: object, **others: object) -> dict[str, Any]:
    """A request of the user's and the assistant's messages in turn."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"model": "mine", "messages": messages, **others}


def error(answer: tuple[int, str]) -> tuple[int, dict[str, Any]]:
    """The status and what the form of errors says, which must be complete."""
    (found,) = json.loads(answer[1]).values()
    assert set(found) == {"message", "type", "param", "code"}
    assert found["type"] == ("server_error" if answer[0] >= 500 else "invalid_request_error")
    return answer[0], found


def test_it_answers_a_conversation_with_pictures_as_chat_does(
    ask: Callable[..., tuple[int, str]], dialogue: Dialogue
) -> None:
    dialogue.reset()
    dialogue.show(ONE)
    first = dialogue.ask("What is it?")
    dialogue.show(TWO)
    second = dialogue.ask("And this?")
    question = [{"type": "text", "text": "What is it?"}, shown(data_url(ONE))]
    status, text = ask(chat(question, first, [shown(data_url(TWO)), {"type": "text", "text": "And this?"}]))
    answer = json.loads(text)
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "mine"
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": second}
    assert answer["choices"][0]["finish_reason"] == "length"  # an untrained model goes on and on
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 8


def test_a_stream_is_the_answer_in_pieces(ask: Callable[..., tuple[int, str]]) -> None:
    request = chat("Tell me about it.", max_tokens=6, temperature=0.7)
    whole = json.loads(ask(request)[1])["choices"][0]["message"]["content"]
    status, text = ask(request | {"stream": True})
    *events, done, end = text.split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    assert status == 200 and (done, end) == ("data: [DONE]", "")
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == whole != ""
    assert len(pieces) > 2 and {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert [piece["choices"][0]["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert pieces[-1]["usage"]["completion_tokens"] == 6
    assert len({piece["id"] for piece in pieces}) == 1


def test_a_system_message_takes_the_place_of_the_templates_own(
    ask: Callable[..., tuple[int, str]], dialogue: Dialogue
) -> None:
    dialogue.reset()
    alone = json.loads(ask(chat("Hello"))[1])["usage"]["prompt_tokens"]
    request = chat("Hello")
    request["messages"].insert(0, {"role": "system", "content": "Be brief."})
    status, text = ask(request)
    assert status == 200 and json.loads(text)["usage"]["prompt_tokens"] < alone


def test_the_models_that_there_are(ask: Callable[..., tuple[int, str]]) -> None:
    status, text = ask(path="/v1/models", method="GET")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == ["mine"]


@pytest.mark.parametrize(
    "given", ["", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer ü\xff"]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/models"), ("POST", "/v1/chat/completions")])
def test_a_visitor_without_the_key_learns_nothing(
    given: str, method: str, path: str, ask: Callable[..., tuple[int, str]]
) -> None:
    with patch.object(Dialogue, "reply", side_effect=AssertionError):
        status, found = error(ask(chat("Hello"), path, method, Authorization=given))
    assert status == 401 and found["code"] == "invalid_api_key"
    assert "mine" not in found["message"] and KEY not in found["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.:80@x"])
def test_a_page_whose_address_leads_here_is_refused(host: str, ask: Callable[..., tuple[int, str]]) -> None:
    status, found = error(ask(chat("Hello"), Host=host))
    assert (status, found["code"]) == (403, "forbidden_host")


def test_it_is_reached_by_this_machines_own_names(server: serve.Server, ask: Callable[..., tuple[int, str]]) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    for host in ("localhost", "127.0.0.1", "LOCALHOST:8000"):
        assert ask(path="/v1/models", method="GET", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        (b"", 400, "the body"),
        (b"{", 400, "the body"),
        (b"\xff\xfe", 400, "the body"),
        (b"[" * 100_000, 400, "the body"),
        (b"[]", 400, "the body"),
        (b'{"model": "mine", "messages": NaN}', 400, "messages"),
        ({"model": "mine"}, 400, "messages"),
        ({"model": "mine", "messages": []}, 400, "messages"),
        (chat("Hello") | {"model": "other"}, 404, "there is no model 'other'. Ask for 'mine'"),
        (chat("Hello", max_tokens=0), 400, "max_tokens"),
        (chat("Hello", max_tokens="many"), 400, "max_tokens"),
        (chat("Hello", n=2), 400, "n is not known here"),
        (chat("Hello", tools=[{"type": "function"}]), 400, "tools is not known here"),
        (chat("Hello", response_format={"type": "json_object"}), 400, "response_format"),
        (chat("Hello", "Hi"), 400, "Put them in this order"),
        ({"model": "mine", "messages": [{"role": "assistant", "content": "Hi"}]}, 400, "Put them in this order"),
        ({"model": "mine", "messages": [{"role": "system", "content": "Hi"}]}, 400, "Put them in this order"),
        ({"model": "mine", "messages": chat("a")["messages"] * 3}, 400, "Put them in this order"),
        ({"model": "mine", "messages": [{"role": "tool", "content": "Hi"}]}, 400, "messages.0.role"),
        (chat("Is <image> it?"), 400, "<image> in a text has no image"),
        (chat("a", [shown(data_url(ONE))], "b"), 400, "an image comes from the assistant"),
        (chat([{"type": "input_audio"}]), 400, "messages.0.content"),
        (chat("why " * 2000), 400, "does not fit into the model's"),
        (chat([shown(str(ONE))]), 400, "Files and addresses are never read"),
        (chat([shown(ONE.as_uri())]), 400, "Files and addresses are never read"),
        (chat([shown("http://127.0.0.1:1/a.png")]), 400, "Files and addresses are never read"),
        (chat([{"type": "image_url"}]), 400, "Files and addresses are never read"),
        (chat([shown("data:image/png;base64,AAAA")]), 400, "Files and addresses are never read"),
        (chat([shown("data:text/html;base64," + "A" * 60)]), 400, "Files and addresses are never read"),
        (chat([shown(data_url(ONE)[:200])]), 400, "image_url' is not a readable image"),
    ],
)
def test_a_malformed_request_is_refused_with_what_is_wrong(
    request_: object, status: int, says: str, ask: Callable[..., tuple[int, str]]
) -> None:
    given, found = error(ask(request_))
    assert given == status and says in found["message"]
    assert "llava_accel_" not in found["message"] and "Traceback" not in found["message"]


def test_a_refusal_in_a_stream_is_an_answer_of_its_own(ask: Callable[..., tuple[int, str]]) -> None:
    assert error(ask(chat("why " * 2000, stream=True)))[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content_Length": str(1 << 40)}, 413),
        ({"Content_Length": "9" * 5000}, 413),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "\u00b2"}, 411),
        ({"Transfer_Encoding": "chunked"}, 411),
    ],
)
def test_a_body_of_unknown_or_endless_length_is_not_read(
    headers: Mapping[str, str], status: int, ask: Callable[..., tuple[int, str]]
) -> None:
    assert error(ask(b"{}", **headers))[0] == status


def test_a_body_that_is_too_large_is_refused_and_the_refusal_arrives(ask: Callable[..., tuple[int, str]]) -> None:
    status, found = error(ask(b" " * ((32 << 20) + 1)))
    assert (status, found["code"]) == (413, "request_too_large")


def test_other_addresses_methods_and_what_is_no_http(server: serve.Server, ask: Callable[..., tuple[int, str]]) -> None:
    assert error(ask({}, "/v1/embeddings"))[0] == 404
    assert error(ask(path="/../../etc/passwd", method="GET"))[0] == 404
    assert error(ask(path="/v1/models", method="OPTIONS"))[0] == 501
    for raw in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection(server.server_address[:2], timeout=10) as connection:  # pyright: ignore
            connection.sendall(raw)
            with connection.makefile("rb") as answer:
                assert b'Send a plain HTTP request", "type": ' in answer.read()


def test_answers_come_one_at_a_time_and_a_queue_has_an_end(
    server: serve.Server, ask: Callable[..., tuple[int, str]]
) -> None:
    at_once, most, begun, goes_on = [0], [0], threading.Semaphore(0), threading.Event()

    def reply(*_: object, **__: object) -> Reply:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        begun.release()
        assert goes_on.wait(30)
        at_once[0] -= 1
        return Reply("Yes.", 1, 1, False)

    with patch.object(server.dialogue, "reply", reply):
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(chat("Hello"))[0])) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert begun.acquire(timeout=30)
        while server.waiting._value:
            threading.Event().wait(0.01)
        status, found = error(ask(chat("Hello")))
        assert (status, found["code"]) == (429, "rate_limit_exceeded")
        goes_on.set()
        for thread in threads:
            thread.join()
    assert answers == [200] * 8 and most == [1]


@pytest.mark.parametrize("streams", [False, True])
def test_the_answer_of_a_client_that_has_gone_ends(streams: bool, server: serve.Server) -> None:
    ended, first, gone = threading.Event(), threading.Event(), threading.Event()

    def reply(_turns: object, _images: object, on_text: Callable[[str], None], **_: object) -> Reply:
        first.set()
        assert gone.wait(30)
        try:
            for _number in range(1000):
                on_text("more " * 1000)
        except ConnectionError:
            ended.set()
            raise
        return Reply("", 1, 1, False)

    with patch.object(server.dialogue, "reply", reply):
        body = json.dumps(chat("Hello", stream=streams)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        with socket.create_connection(server.server_address[:2], timeout=10) as connection:  # pyright: ignore
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert first.wait(30)
        gone.set()
        assert ended.wait(30)


def test_a_defect_is_said_in_the_terminal_and_not_to_the_client(
    server: serve.Server, ask: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(server.dialogue, "reply", side_effect=RuntimeError("of the card")):
        status, found = error(ask(chat("Hello")))
    assert status == 500 and "of the card" not in found["message"]
    assert ask(chat("Hello"))[0] == 200
    assert "RuntimeError: of the card" in capsys.readouterr().err


def test_a_client_that_sends_nothing_is_not_waited_for(server: serve.Server) -> None:
    with patch.object(serve._Visit, "timeout", 0.1):
        for raw in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"):
            with socket.create_connection(server.server_address[:2], timeout=10) as connection:  # pyright: ignore
                connection.sendall(raw)
                with connection.makefile("rb") as answer:
                    assert answer.read() == b""


@pytest.mark.parametrize("key", ["", "short", "with a space", "schl\u00fcssel-schl\u00fcssel", "a\nb: cdefgh"])
def test_a_key_that_no_header_can_carry_is_refused(key: str, lora_run: Path) -> None:
    assert_refused(start("serve", "--adapter", str(lora_run), "--key", key, "--port", "0"), ["--key"])


def test_a_port_that_is_taken_is_refused(server: serve.Server) -> None:
    with pytest.raises(UserError, match=r"--port \d+: Address already in use. Name another one"):
        open_door(server.server_address[1])
