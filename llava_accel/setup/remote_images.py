"""Fetches the images of a corpus whose names are URLs, before anything else is done with it."""

import json
from collections.abc import Iterator
from pathlib import Path

from llava_accel.console.output import Console
from llava_accel.data.corpus import Corpus
from llava_accel.exceptions import UserError
from llava_accel.recipe import DataTable
from llava_accel.sources.downloads import fetch, is_remote, place_of, refuse
from llava_accel.sources.problems import quoted
from llava_accel.storage.kept_files import store, stored


def fetch_images(corpus: Corpus, data: DataTable, console: Console, *, refuses: bool = True) -> None:
    """Fetch missing images into the cache; a row whose image cannot be fetched is reported as any other broken row.

    Args:
        refuses: Raise where the recipe says that a record that cannot be used is an error.

    Raises:
        DataError: some could not be fetched; it lists them.
    """
    folder = corpus.sources[0].downloads
    missing = [url for url in _urls(corpus, folder.with_name("urls")) if not place_of(url, folder).is_file()]
    if not missing:
        return
    with console.bar("fetching images", len(missing)) as bar:
        problems = fetch(missing, folder, bar.advance)
    if problems and refuses and data.on_bad_record == "error":
        raise refuse(problems)
    failed = ""
    if problems:
        url, problem = next(iter(problems.items()))
        failed = f"; {len(problems):,} could not be fetched, such as {quoted(url, 200)}: {problem}"
    console.line(f"fetched {len(missing) - len(problems):,} images into {folder}{failed}")


def _urls(corpus: Corpus, kept: Path) -> list[str]:
    """The URLs that records name as images. Kept for the next start: web data has URLs in every row, so all are parsed."""
    if not corpus.may_have_urls:
        return []
    path = kept / f"{corpus.fingerprint()}.json"
    urls = stored(path, lambda path: list[str](json.loads(path.read_bytes())))
    if urls is None:
        urls = list(dict.fromkeys(_read_urls(corpus)))
        store(path, lambda unfinished: unfinished.write_text(json.dumps(urls), encoding="utf-8"))
    return urls


def _read_urls(corpus: Corpus) -> Iterator[str]:
    for row in corpus.rows_with_urls():
        try:
            yield from filter(is_remote, corpus.record(row).images)
        except UserError:
            pass  # a broken record: it is reported when all are read
