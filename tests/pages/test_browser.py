"""The pages in a real browser, opened from disk. Skipped, with the reason, where there is no Chromium."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from helpers.browser import MISSING, open_browser
from helpers.report_run import write_run
from helpers.runs import talk
from helpers.verbs import start, write_recipe
from llava_accel.pages.live import live_pages
from llava_accel.pages.write import write_comparison, write_report
from llava_accel.watch import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)} on this machine"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, drawn: Any) -> dict[str, Path]:
    """A report with a hostile record in it, and a comparison of two runs."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder, hostile=True, overfits=True, num_steps=150, num_questions=42),
        write_run(folder, name="other", seed=5, skill=0.5, hostile=True, num_steps=150, num_questions=42),
    ]
    with patch("llava_accel.pages.plots.drawn", drawn):
        return {
            "report": write_report(runs[0]),
            "comparison": write_comparison(runs, folder / "comparison.html"),
            "check": check_page(folder / "data"),
        }


def check_page(folder: Path) -> Path:
    """The page of `check` on hostile records with an image each, some of which cannot be used."""
    folder.mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "a.png")
    texts = ["red", "<script>document.title = 'taken'</script>", "\u202egnp.exe", "long" * 200, "אדום"]
    rows = [talk(number, f"{texts[number % 5]}?", texts[number % 3], "a.png") for number in range(20)]
    rows += [{"id": text} for text in texts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"images": str(folder), "on_bad_record": "skip", "max_bad": 1.0}
    recipe = write_recipe(folder, folder / "data.jsonl", data=settings)
    assert start("check", str(recipe), "--html", str(folder / "check.html")).code == 0
    return folder / "check.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One headless Chromium for all tests, with a profile of its own."""
    with open_browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def opened(browser: Any, page: Path, width: int = 1280, mode: str = "light") -> Any:
    """Open a page afresh and return the browser."""
    media = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    console = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", console)
    browser.get(page.as_uri())
    return browser


def visible(browser: Any) -> list[str]:
    """The classes of the cards that are shown."""
    script = "return [...document.querySelectorAll('article')].filter(a => a.offsetParent).map(a => a.className)"
    return browser.execute_script(script)


def press(browser: Any, tag: str) -> None:
    browser.execute_script("document.querySelector(`button[data-tag='${arguments[0]}']`).click()", tag)


def search(browser: Any, text: str) -> None:
    field = browser.find_element("id", "search")
    field.clear()
    field.send_keys(text)


@pytest.mark.parametrize("name", ["report", "comparison", "check"])
def test_a_page_opens_from_disk_without_a_word_on_the_console(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [address for address in loaded if not address.startswith("data:")] == []
    broken = "return [...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.images.length") >= 8
    twice = "const ids = [...document.querySelectorAll('[id]')].map(e => e.id); return ids.length - new Set(ids).size"
    assert browser.execute_script(twice) == 0


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_markup_in_the_data_is_text_on_the_page(browser: Any, pages: dict[str, Path], name: str) -> None:
    opened(browser, pages[name])
    assert "taken" not in browser.title
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1
    assert browser.execute_script("return document.querySelectorAll('img[src=x]').length") == 0
    text = browser.execute_script("return document.body.textContent")
    assert '<script>document.title = "taken"</script>' in text
    assert r"\x00\x07\x1b[31m\u202egnp.exe\ud800" in text


def test_the_page_itself_forbids_scripts_and_addresses(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["report"])
    injected = (
        "const done = arguments[0]; const script = document.createElement('script');"
        "script.textContent = 'window.injected = true'; document.head.append(script);"
        "fetch('https://example.com/').then(() => done('reached'), () => done(String(window.injected)))"
    )
    assert browser.execute_async_script(injected) == "undefined"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_filters_and_search_show_what_they_say(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["report"])
    total = len(visible(browser))
    assert total == 42
    for verdict in ("right", "wrong"):
        press(browser, f"verdict:{verdict}")
        shown = visible(browser)
        assert 0 < len(shown) < total and set(shown) == {verdict}
        button = browser.find_element("css selector", f"button[data-tag='verdict:{verdict}']")
        assert button.get_attribute("aria-pressed") == "true"
        assert button.find_element("css selector", "span").text == str(len(shown))
    assert browser.find_element("id", "shown").text == f"{len(shown)} of {total} shown"

    press(browser, "question_type:color")
    both = visible(browser)
    assert 0 < len(both) < len(shown) and set(both) == {"wrong"}
    search(browser, "no such words")
    assert visible(browser) == [] and browser.find_element("id", "none").is_displayed()
    browser.find_element("id", "clear").click()
    assert len(visible(browser)) == total and not browser.find_element("id", "none").is_displayed()
    search(browser, "COLOUR triangle")
    script = "return [...document.querySelectorAll('article')].filter(a => a.offsetParent).map(a => a.innerText)"
    texts = [text.lower() for text in browser.execute_script(script)]
    assert texts and all("colour" in text and "triangle" in text for text in texts)


def test_a_comparison_filters_by_the_run_that_answers_best(browser: Any, pages: dict[str, Path]) -> None:
    opened(browser, pages["comparison"])
    total = len(visible(browser))
    press(browser, "better:0")
    first = len(visible(browser))
    press(browser, "better:1")
    assert 0 < first < total and len(visible(browser)) == total - first


@pytest.mark.parametrize("name", ["report", "comparison", "check"])
@pytest.mark.parametrize("width", [320, 390, 820])
def test_no_page_is_wider_than_the_screen(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    opened(browser, pages[name], width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


_CONTRAST = """
const luminance = (color) => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if (color !== "rgba(0, 0, 0, 0)") return color;
  }
};
const worst = {};
for (const element of document.querySelectorAll("p, dt, dd, h1, h2, h3, th, td, a, button, span, li, summary, text")) {
  if (!element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const ink = luminance(element.tagName === "text" ? style.fill : style.color), page = luminance(behind(element));
  const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  if (ratio < 4.5) worst[element.tagName + "." + element.className] = ratio;
}
return [worst, luminance(getComputedStyle(document.body).backgroundColor)];
"""


@pytest.mark.parametrize("name", ["report", "comparison", "check"])
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_all_text_is_readable_in_light_and_in_dark(browser: Any, pages: dict[str, Path], name: str, mode: str) -> None:
    unreadable, page = opened(browser, pages[name], mode=mode).execute_script(_CONTRAST)
    assert unreadable == {}
    assert page > 0.8 if mode == "light" else page < 0.05


def test_an_image_fills_the_window_after_a_click_and_shrinks_after_another_or_escape(
    browser: Any, pages: dict[str, Path]
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages["report"])
    image = browser.find_element("css selector", "article .zoom img")
    small = image.size["width"]
    image.click()
    assert image.size["width"] == 1280 > 3 * small and image.size["height"] == 900
    image.click()
    assert image.size["width"] == small
    image.click()
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert image.size["width"] == small


@pytest.fixture
def growing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Path]]]:
    """Two runs that are served, one of them with a hostile record: the URL, and their folders."""
    monkeypatch.setattr("llava_accel.pages.live._REST", 0.0)
    runs = [
        write_run(tmp_path, hostile=True, num_steps=50, num_questions=42),
        write_run(tmp_path, name="other", seed=5, num_steps=50, num_questions=42),
    ]
    with Server(live_pages(runs), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.url, runs
        server.shutdown()
        thread.join()


def grow(run: Path, step: int) -> None:
    """One more line of training, as the run writes it, and the beginning of another."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    line = json.loads(lines[-2]) | {"step": step}
    (run / "metrics.jsonl").write_text("".join([*lines[:-1], lines[-1].strip() + "\n", json.dumps(line) + "\n"]))


def drawn_for(browser: Any) -> str:
    return browser.find_element("id", "live").get_attribute("data-version")


def test_a_watched_page_grows_with_its_run_and_stays_where_it_was_scrolled_to(
    browser: Any, growing: tuple[str, list[Path]]
) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    url, runs = growing
    browser.get(f"{url}1")
    first = drawn_for(browser)
    browser.execute_script("window.isFirst = true; window.scrollTo(0, 1500)")
    time.sleep(4.5)
    assert browser.execute_script("return window.isFirst && window.scrollY") == 1500, "loaded anew without a reason"

    press(browser, "verdict:right")
    grow(runs[0], 51)
    waiting = WebDriverWait(browser, 30, ignored_exceptions=[StaleElementReferenceException])
    waiting.until(lambda _: "There is more to show" in browser.find_element("id", "live").text)
    assert browser.execute_script("return window.isFirst") and drawn_for(browser) == first, "a filter is set"
    browser.execute_script("document.getElementById('clear').click(); window.scrollTo(0, 1500)")
    waiting.until(lambda _: drawn_for(browser) != first)
    assert browser.execute_script("return window.isFirst") is None
    # A line more above it moves it by its height.
    waiting.until(lambda _: abs(browser.execute_script("return window.scrollY") - 1500) < 100)
    assert "taken" not in browser.title and browser.get_log("browser") == []


def test_watched_runs_are_compared_and_linked_and_the_end_of_watch_is_said(
    browser: Any, growing: tuple[str, list[Path]]
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    url, _ = growing
    browser.get(url)
    assert browser.title == "okvqa_qlora, other: comparison"
    links = browser.find_elements("css selector", "nav[aria-label=Runs] a")
    links[2].click()
    WebDriverWait(browser, 30).until(lambda _: browser.title == "other: report")
    browser.execute_script("window.fetch = () => Promise.reject(new TypeError('refused'))")
    WebDriverWait(browser, 30).until(lambda _: "has ended" in browser.find_element("id", "live").text)
    assert browser.get_log("browser") == []
