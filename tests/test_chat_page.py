"""The page of `chat --web` in a real browser: dropped, asked, answered, chosen; and nothing on it is more than text."""

import base64
import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.browser import MISSING, open_browser
from helpers.exported import ROOT
from helpers.forked import Forked
from helpers.runs import PARITY
from llava_accel.storage.jsonl import read_json_lines

_MISSING = MISSING + ([] if importlib.util.find_spec("gradio") else ["gradio (the extra web)"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_MISSING), reason=f"no {' and no '.join(_MISSING)} on this machine"),
]

ONE = PARITY / "images" / "t0.png"
HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> **a** [b](javascript:c)"
)
NAME = '"><img src=x onerror="document.title=\'taken\'">.png'
DRIVER = """
import sys
from llava_accel.console.command_line import start
from llava_accel.inference.dialogue import Dialogue, Reply

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        place = arguments[1] if event == "socket.connect" else arguments
        if isinstance(place, tuple) and place[0] not in ("127.0.0.1", "localhost"):
            print("OUTSIDE", place, file=sys.stderr, flush=True)

def reply(self, turns, images, on_text=None, **others):
    if "hostile" not in turns[-1].text:
        return original(self, turns, images, on_text, **others)
    on_text(hostile)
    return Reply(hostile, 1, 1, False)

hostile, original, Dialogue.reply = sys.argv.pop(1), Dialogue.reply, reply
sys.addaudithook(watch)
start("chat")
"""
DROP = """
const [name, content] = arguments, data = new DataTransfer();
const bytes = Uint8Array.from(atob(content), (each) => each.charCodeAt(0));
data.items.add(new File([bytes], name, {type: "image/png"}));
const zone = document.querySelector("#image input[type=file]").closest("button, [role=button]");
zone.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
"""


class Page(NamedTuple):
    """A page that is served, and what is collected there."""

    address: str
    port: int
    collected: Path
    process: "subprocess.Popen[str]"
    errors: Path


@pytest.fixture(scope="module")
def page(lora_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    collected, errors = folder / "mine.jsonl", folder / "errors.txt"
    options = ["--web", "--collect", str(collected), "--port", "0", "--max-new-tokens", "6"]
    command = [sys.executable, "-c", DRIVER, HOSTILE, "--adapter", str(lora_run), *options]
    with errors.open("w") as file:
        process = Forked(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT)
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"page: (http://127\.0\.0\.1:(\d+)/\?key=\S+)\n", said)):
            line = process.stdout.readline()
            assert line, errors.read_text()
            said += line
        yield Page(found[1], int(found[2]), collected, process, errors)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def browser(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(page.address)
        yield driver


def until(is_so: Callable[[], Any]) -> Any:
    """What it returns once that is true."""
    for _ in range(300):
        if found := is_so():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def value(browser: Any, name: str) -> str:
    return browser.execute_script("return document.querySelector(`#${arguments[0]} textarea`)?.value ?? ''", name)


def press(browser: Any, name: str) -> None:
    until(lambda: browser.find_elements("id", name))[0].click()


def asked(browser: Any, question: str) -> list[str]:
    """Drop a picture with a hostile name, ask, and wait for the last of three answers."""
    browser.get(browser.current_url)
    until(lambda: browser.find_elements("css selector", "#image input[type=file]"))
    browser.execute_script(DROP, NAME, base64.b64encode(ONE.read_bytes()).decode())
    until(lambda: browser.find_elements("css selector", "#image img"))
    field = browser.find_element("css selector", "#question textarea")
    field.clear()
    field.send_keys(question)
    press(browser, "ask")
    until(lambda: value(browser, "answer2"))
    time.sleep(1)  # the page knows what was asked a moment later
    return [value(browser, f"answer{place}") for place in range(3)]


def test_a_picture_is_dropped_answers_appear_and_what_is_chosen_is_collected(browser: Any, page: Page) -> None:
    own, base, blind = asked(browser, "What is it?")
    assert own and base and blind and own != base
    press(browser, "better0")
    until(lambda: value(browser, "note").startswith("Saved in "))
    (pair,), (record,) = read_json_lines(page.collected.with_name("mine.pairs.jsonl")), read_json_lines(page.collected)
    assert (pair["question"], pair["chosen"], pair["rejected"]) == ("What is it?", own, base)
    assert record["conversations"][-1]["value"] == own
    assert (page.collected.parent / record["image"]).read_bytes() == ONE.read_bytes()
    press(browser, "better0")
    until(lambda: value(browser, "note") == "Nothing to save. Ask a question first")
    assert len(read_json_lines(page.collected)) == 1


def test_a_correction_is_collected_as_better_than_the_answer(browser: Any, page: Page) -> None:
    own, _, _ = asked(browser, "And now?")
    press(browser, "worse")
    until(lambda: value(browser, "written") == own)
    field = browser.find_element("css selector", "#written textarea")
    field.clear()
    field.send_keys("Two circles.")
    press(browser, "save")
    until(lambda: value(browser, "note").startswith("Saved in "))
    pair = read_json_lines(page.collected.with_name("mine.pairs.jsonl"))[-1]
    assert (pair["chosen"], pair["rejected"]) == ("Two circles.", own)


def test_markup_in_answers_names_and_errors_is_text(browser: Any, page: Page) -> None:
    assert asked(browser, "hostile <b>q</b>") == [HOSTILE] * 3
    field = browser.find_element("css selector", "#question textarea")
    field.clear()
    field.send_keys(f"<image> {HOSTILE}")
    press(browser, "ask")
    until(lambda: value(browser, "note").startswith("error: <image> in a question"))
    assert browser.title == "llava_accel"
    assert browser.execute_script("return document.querySelectorAll('img[src=x], a[href^=javascript]').length") == 0


def test_nothing_is_asked_of_other_machines(browser: Any, page: Page) -> None:
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    here = (f"http://127.0.0.1:{page.port}/", "data:", "blob:")
    assert loaded and [address for address in loaded if not address.startswith(here)] == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.errors.read_text() == ""


def test_files_of_this_machine_do_not_come_out(browser: Any, page: Page) -> None:
    fetch = "const done = arguments[1]; fetch(arguments[0]).then((answer) => done(answer.status))"
    for path in ("/etc/passwd", str(page.collected), str(ONE), "http://127.0.0.1:1/a"):
        assert browser.execute_async_script(fetch, f"/gradio_api/file={path}") in (403, 404), path
    data = {"data": [{"path": str(ONE), "meta": {"_type": "gradio.FileData"}}, "What?"], "fn_index": 0}
    join = """
      const [data, done] = arguments, session_hash = "other", get = (address) => fetch(address).then((r) => r.text());
      fetch("/gradio_api/queue/join", {method: "POST", headers: {"Content-Type": "application/json"},
        body: JSON.stringify({...data, session_hash})})
      .then(() => get("/gradio_api/queue/data?session_hash=other")).then(done)
    """
    said = browser.execute_async_script(join, data)
    assert '"success":false' in said and '"success":true' not in said
    assert "was not uploaded by a user" in page.errors.read_text()


def test_a_second_visitor_without_the_key_stays_outside(page: Page) -> None:
    for method, path in (("GET", "/"), ("GET", "/config"), ("POST", "/gradio_api/upload"), ("GET", "/gradio_api/info")):
        connection = HTTPConnection("127.0.0.1", page.port, timeout=30)
        connection.request(method, path)
        response = connection.getresponse()
        assert response.status == 401 and b"Open the address that the terminal shows" in response.read()
        connection.close()


def test_ctrl_c_ends_it_without_a_word(page: Page) -> None:
    before = page.errors.read_text()
    page.process.send_signal(signal.SIGINT)
    assert page.process.wait(30) == 130
    assert page.errors.read_text() == before
