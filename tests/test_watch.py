"""`llava-accel watch`: who is answered, with what, and that a run that goes on is left as it is."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from helpers.report_run import write_run
from helpers.verbs import assert_refused, start
from llava_accel.pages.live import live_pages
from llava_accel.storage.folder_lock import FolderLock
from llava_accel.watch import Server


@contextmanager
def watched(*runs: Path) -> Iterator[int]:
    """The port on which these runs are served."""
    with Server(live_pages(runs), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """An answer; its text is in `msg`'s place, read."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    answer.text = answer.read().decode()  # pyright: ignore[reportAttributeAccessIssue]
    connection.close()
    return answer


def text(answer: http.client.HTTPResponse) -> str:
    return answer.text  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, num_steps=50, num_questions=12)


def raw(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_one_run_is_its_report_and_several_are_compared_with_links_to_each(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, name="other", seed=5, num_steps=50, num_questions=12)
    with watched(run) as port:
        assert "<title>okvqa_qlora: report</title>" in text(ask(port)) and ask(port, "/1").status == 404
    with watched(run, other) as port:
        page = text(ask(port))
        assert "<title>okvqa_qlora, other: comparison</title>" in page
        links = re.findall(r'<a href="(/\d+)">([^<]*)</a>', page)
        assert links == [("/1", str(run)), ("/2", str(other))]
        for address, name in (("/1", "okvqa_qlora"), ("/2", "other")):
            own = text(ask(port, address))
            assert f"<title>{name}: report</title>" in own and '<a href="/">Comparison</a>' in own


PATHS = (
    "/metrics.jsonl", "/../metrics.jsonl", "/recipe.toml", "/.", "/0", "/3", "/1/", "/%31", "/?x", "/etc/passwd",
    "http://127.0.0.1/", "/1%00", "/report.html", "*",
)  # fmt: skip


def test_nothing_but_the_pages_is_answered(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, name="other", num_steps=50, num_questions=12)
    with watched(run, other) as port:
        for path in PATHS:
            answer = ask(port, path)
            assert answer.status in (403, 404) and "learning_rate" not in text(answer), path


def test_nothing_but_get_and_head_is_answered(run: Path) -> None:
    with watched(run) as port:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "CONNECT", "get"):
            answer = ask(port, "/", method)
            assert answer.status == 501 and "report</title>" not in text(answer), method


def test_a_page_that_calls_this_machine_by_another_name_is_refused(run: Path) -> None:
    with watched(run) as port:
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1:{port}.evil.example", "", "[::1]"):
            answer = ask(port, Host=host)
            assert answer.status == 403 and "report</title>" not in text(answer), host
        for own in (f"LOCALHOST:{port}", "127.0.0.1", "localhost:9000"):  # the last as through `ssh -L 9000:...`
            assert ask(port, Host=own).status == 200


def test_two_names_or_none_are_refused_too(run: Path) -> None:
    with watched(run) as port:
        own = f"Host: 127.0.0.1:{port}\r\n"
        for headers in ("", own + "Host: evil.example\r\n"):
            assert raw(port, f"GET / HTTP/1.1\r\n{headers}\r\n".encode()).split(b"\r\n")[0].split()[1] == b"403"
        assert b"learning_rate" not in raw(port, b"GET /\r\n\r\n") + raw(port, b"\x16\x03\x01" + bytes(200))
        assert b" 200 OK" in raw(port, f"GET / HTTP/1.1\r\n{own}\r\n".encode())


def test_it_listens_on_this_machine_alone_and_no_other_page_may_show_or_read_it(run: Path) -> None:
    with watched(run) as port:
        answer = ask(port)
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        assert "Access-Control-Allow-Origin" not in answer.headers and "Python" not in answer.headers["Server"]
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_a_page_is_another_only_after_the_run_has_written_more(run: Path) -> None:
    with watched(run) as port:
        first = ask(port)
        tag, page = first.headers["ETag"], text(first)
        assert f"data-version={tag}" in page
        head = ask(port, "/", "HEAD")
        assert head.headers["ETag"] == tag and text(head) == ""
        assert ask(port, If_None_Match=tag).status == 304 and text(ask(port)) == page
        lines = (run / "metrics.jsonl").read_text().splitlines()
        line = json.loads(lines[-2]) | {"step": 51}
        (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(line), '{"step": 52, "lo']))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.monotonic", lambda: 1e12)  # it has rested
            assert ask(port, "/", "HEAD").headers["ETag"] != tag
            again = ask(port, If_None_Match=tag)
        assert again.status == 200 and again.headers["ETag"] != tag and text(again) != page


def test_a_drawn_page_rests_so_that_the_run_has_its_cores(run: Path) -> None:
    with watched(run) as port:
        tag = ask(port).headers["ETag"]
        (run / "data.json").write_text("{}")
        assert ask(port, "/", "HEAD").headers["ETag"] == tag


def test_a_run_that_is_not_there_yet_is_said_and_shown_once_it_is(run: Path, tmp_path: Path) -> None:
    later = tmp_path / "<u>later"
    with watched(run, later) as port:
        page = text(ask(port))
        assert "okvqa_qlora: comparison" in page and "&lt;u&gt;later: there is no run yet" in page and "<u>" not in page
        assert "There is nothing to show yet." in text(ask(port, "/2"))
        write_run(tmp_path, name="later", num_steps=50, num_questions=12).rename(later)
        assert "later: report</title>" in text(ask(port, "/2")) and "no run yet" not in text(ask(port, "/2"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recipe.toml", "[run", "cannot be read now"),
        ("environment.json", "{", "environment.json is damaged"),
        ("metrics.jsonl", '{"loss": 1.0}\n', "was not written by a run"),
        ("metrics.jsonl", '{"step": 1, "loss": "x", "epoch": []}\n', "could not be drawn"),
        ("predictions/step-000050.jsonl", '{"image": 1}\n', "could not be drawn"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_run_stands_on_the_page(run: Path, name: str, content: str, said: str) -> None:
    (run / name).write_text(content)
    with watched(run) as port:
        answer = ask(port)
        assert answer.status == 200 and said in text(answer) and "Traceback" not in text(answer)


def test_texts_of_a_run_are_never_markup(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, name=name, num_steps=50, num_questions=12, hostile=True) for name in ("one", "two")]
    with watched(*runs) as port:
        for page in (text(ask(port, address)) for address in ("/", "/1")):
            assert page.count("<script") == 1 and "<img src=x" not in page and "connect-src 'self'" in page


def test_a_run_that_another_process_holds_is_left_as_it_is(run: Path) -> None:
    lock = FolderLock(run)
    lock.take()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with watched(run) as port:
        page = text(ask(port))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    lock.release()
    assert "this file loads nothing" not in page.lower() and "llava-accel report updates it" not in page


def test_what_is_wrong_on_the_command_line_is_said(run: Path) -> None:
    assert_refused(start("watch", str(run), str(run)), ["named twice"])
    with watched(run) as port:
        assert_refused(start("watch", str(run), "--port", str(port)), ["--port", str(port)])
    assert start("watch", str(run), "--port", "70000").code == 2


@pytest.mark.slow
def test_the_verb_says_where_and_ends_with_ctrl_c(run: Path) -> None:
    command = [sys.executable, "-m", "llava_accel", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        url = process.stdout.readline().split()[1]
        assert ask(urlsplit(url).port or 0).status == 200
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout.read().strip() == "watch: ended. Runs go on" and process.stderr.read() == ""
