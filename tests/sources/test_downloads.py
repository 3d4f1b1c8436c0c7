"""Images from the network: fetched once, checked, and refused with a list where they cannot be had."""

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from helpers.samples import encoder, record, write_lines
from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus, open_sources
from llava_accel.recipe import DataTable
from llava_accel.setup.remote_images import fetch_images
from llava_accel.sources import downloads
from llava_accel.sources.named import Named
from llava_accel.sources.problems import DataError

ASKED: list[str] = []


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ASKED.append(self.path)
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", {"/away": "/a.png", "/away-file": "file:///etc/passwd"}[self.path])
            self.end_headers()
            return
        content = {
            "/page": b"<html>", "/large": b"\xff\xd8\xff" + bytes(2000), "/chunks": b"99\r\n" + png(),
            **dict.fromkeys(("/a.png", "/b.png", "/half", "/a%20b.png", "/%C3%A4.png?x=1&y=%20"), png()),
        }  # fmt: skip
        found = content.get(self.path)
        self.send_response(200 if found is not None else 404)
        if self.path == "/half":
            self.send_header("Content-Length", str(2 * len(png())))
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(found or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def host() -> Iterator[str]:
    ASKED.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def corpus(folder: Path, urls: list[str]) -> Corpus:
    rows = [record("<image>\nQ", "A", image=url, id=str(n)) for n, url in enumerate(urls)]
    path = write_lines(folder / "a.jsonl", rows)
    return Corpus(open_sources([Named(str(path))], folder / "cache"), encoder())


def data(**keys: object) -> DataTable:
    return DataTable.model_validate({"train": "a.jsonl", **keys})


def test_each_image_is_fetched_once_and_never_again(tmp_path: Path, host: str) -> None:
    named = corpus(tmp_path, [f"{host}/a.png", f"{host}/b.png", f"{host}/a.png", f"{host}/away"])
    fetch_images(named, data(), Console())
    assert sorted(ASKED) == ["/a.png", "/a.png", "/away", "/b.png"], "the last was led to the first"
    for row in range(4):
        (address,) = named.image_files(row)
        assert Path(address).read_bytes() == png()
    fetch_images(named, data(), Console())
    assert len(ASKED) == 4
    names = [named.image_name(row, named.image_files(row)[0]) for row in range(3)]
    assert names[0] == names[2] != names[1]
    assert named.image_file(names[0]) == Path(named.image_files(0)[0])


def test_addresses_are_asked_for_as_browsers_do(tmp_path: Path, host: str) -> None:
    named = corpus(tmp_path, [f"{host}/a b.png", f"HTTP{host[4:]}/ä.png?x=1&y=%20"])
    fetch_images(named, data(), Console())
    assert sorted(ASKED) == ["/%C3%A4.png?x=1&y=%20", "/a%20b.png"]
    assert all(Path(named.image_files(row)[0]).read_bytes() == png() for row in range(2))


def test_a_later_start_reads_no_row_to_find_that_its_addresses_are_not_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [record("Q", "A", source="http://nowhere.invalid/page"), record("<image>\nQ", "A", image="a.png")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    named = Corpus(open_sources([Named(str(path))], tmp_path / "cache"), encoder())
    fetch_images(named, data(), Console())
    monkeypatch.setattr(Corpus, "record", lambda *_: pytest.fail("a row was read"))
    fetch_images(named, data(), Console())


def test_what_cannot_be_had_is_listed_with_its_reason(
    tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_LARGEST", 1000)
    urls = [f"{host}/{name}" for name in ("a.png", "none.png", "page", "large", "half", "chunks", "away-file")]
    urls.append("http://169.254.169.254/latest/meta-data/a.png")
    named = corpus(tmp_path, urls)
    with pytest.raises(DataError) as caught:
        fetch_images(named, data(), Console())
    text = str(caught.value)
    assert "7 images could not be fetched" in text
    reasons = ("Not Found", "not an image", "more than", "ended in the middle", "IncompleteRead", "", "not requested")
    for url, reason in zip(urls[1:], reasons, strict=True):
        line = next(line for line in text.splitlines() if url in line)
        assert reason in line
    assert "with a network" in text and 'data.on_bad_record = "skip"' in text and "\n ." not in text
    assert named.image_files(0), "the others are kept"
    with pytest.raises(DataError, match="was not fetched"):
        named.image_files(1)


def test_a_recipe_that_skips_goes_on_with_the_others(
    tmp_path: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = corpus(tmp_path, [f"{host}/a.png", f"{host}/none.png"])
    fetch_images(named, data(on_bad_record="skip"), Console())
    assert f"1 could not be fetched, such as '{host}/none.png': Not Found" in capsys.readouterr().out
    assert named.image_files(0)


def test_without_a_network_the_list_is_given(tmp_path: Path) -> None:
    named = corpus(tmp_path, ["http://127.0.0.1:9/a.png", "https://127.0.0.1:9/b.png"])
    with pytest.raises(DataError, match=r"(?s)2 images could not be fetched.*a.png.*refused.*b.png"):
        fetch_images(named, data(), Console())


def test_a_file_that_came_half_is_not_kept(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_LARGEST", 10)
    named = corpus(tmp_path, [f"{host}/a.png"])
    with pytest.raises(DataError):
        fetch_images(named, data(), Console())
    assert not list((tmp_path / "cache" / "downloads").glob("*"))
