"""Images whose names are URLs: fetched once into the cache, a few at a time, before anything is trained.

Data sets come from others: the content of a URL must be an image, and not too large; link-local addresses, where clouds hand
out credentials, are not requested.
"""

import hashlib
import http.client
import ipaddress
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llava_accel.sources.image_parts import looks_like_image
from llava_accel.sources.problems import DataError, quoted
from llava_accel.storage.atomic import atomic_file

DOWNLOADS = "downloads"
"""Folder of the cache that fetched images are kept in."""
_AT_ONCE = 16
_TIMEOUT_S = 20.0
_LARGEST = 32 << 20  # bytes
_TRIES = 2
_OF_URLS = "!#$%&'()*+,/:;=?@[]~"
"""Characters with a meaning in a URL, sent as they are; others, such as spaces and other alphabets' letters, are escaped."""
_AGENT = "llava_accel (fetches the images of a training set)"


def is_remote(name: str) -> bool:
    """Whether an image name is a URL that is fetched."""
    return name[:8].lower().startswith(("http://", "https://"))


def may_hold(row: bytes) -> bool:
    """Whether a text of a row, which is JSON, may be such a URL."""
    return b'"http' in row.lower()


def place_of(url: str, folder: Path) -> Path:
    """The file that the content of a URL is kept in."""
    return folder / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fetched(url: str, folder: Path) -> Path:
    """The file of a URL that was fetched.

    Raises:
        DataError: it was not fetched, or its file is gone.
    """
    path = place_of(url, folder)
    if not path.is_file():
        problem = f"the image {quoted(url)} is a URL that was not fetched"
        raise DataError("missing_image", problem, "Run `llava-accel check`, which says why not, or save it as a file")
    return path


def fetch(urls: Sequence[str], folder: Path, progress: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Fetch each URL into its file.

    Returns:
        URL -> the problem, for URLs that could not be fetched.
    """
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for url, problem in zip(urls, threads.map(lambda url: _attempt(url, folder), urls), strict=True):
            if problem:
                problems[url] = problem
            progress(1)
    return problems


def refuse(problems: dict[str, str], shown: int = 20) -> DataError:
    """The error for URLs that could not be fetched, which lists the first `shown` of them."""
    lines = [f"\n  {quoted(url, 200)}: {problem}" for url, problem in list(problems.items())[:shown]]
    more = f"\n  and {len(problems) - shown:,} more" if len(problems) > shown else ""
    return DataError(
        "missing_image",
        f"{len(problems):,} images could not be fetched:{''.join(lines)}{more}",
        "Repeat this with a network, save them below data.images and name the files, or leave their records out with "
        'data.on_bad_record = "skip"',
    )


def _attempt(url: str, folder: Path) -> str:
    """Fetch one URL and return the problem, "" if there is none."""
    problem = ""
    for _ in range(_TRIES):
        try:
            content = _read(url)
        except (OSError, ValueError, http.client.HTTPException) as error:  # the name is wrong, or HTTP fails
            problem = " ".join(str(getattr(error, "reason", "") or error).split()) or type(error).__name__
            continue
        if not looks_like_image(content[:16]):
            return "its content is not an image of a format that is read"
        with atomic_file(place_of(url, folder), is_private=True) as unfinished:
            unfinished.write_bytes(content)
        return ""
    return problem


def _read(url: str) -> bytes:
    request = urllib.request.Request(urllib.parse.quote(url, safe=_OF_URLS), headers={"User-Agent": _AGENT})
    with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
        content = answer.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST >> 20} MiB")
        if answer.length:  # bytes that are still to come: `read` takes the end of a connection for that of the image
            raise ConnectionError("the connection ended in the middle of it")
    return content


class _Guarded(urllib.request.HTTPRedirectHandler):
    """Refuses link-local addresses, such as 169.254.169.254, also after a redirection."""

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        host = urllib.parse.urlsplit(request.full_url).hostname or ""
        try:
            is_forbidden = ipaddress.ip_address(host).is_link_local
        except ValueError:
            is_forbidden = host == "metadata.google.internal"
        if is_forbidden:
            raise ValueError(f"{host} is not requested: such addresses do not serve images")
        return request

    https_request = http_request


def _opener() -> urllib.request.OpenerDirector:
    """An opener for HTTP and HTTPS only: the usual one also reads files and FTP."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Guarded,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    )  # fmt: skip
    for handler in handlers:
        opener.add_handler(handler())
    return opener


_OPENER = _opener()
