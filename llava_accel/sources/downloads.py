"""Images whose names are URLs: fetched once into the cache, a few at a time, before anything is trained.

Data come from others: what a URL gives must be an image, and small; addresses of this machine's own network that clouds give
their secrets at are not asked.
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
"""Folder of the cache that they are kept in."""
_AT_ONCE = 16
_TIMEOUT_S = 20.0
_LARGEST = 32 << 20  # bytes
_TRIES = 2
_OF_URLS = "!#$%&'()*+,/:;=?@[]~"
"""What has a meaning in a URL; spaces and letters of other alphabets are not sent as they are."""
_AGENT = "llava_accel (fetches the images of a training set)"


def is_remote(name: str) -> bool:
    """Whether an image name is a URL that is fetched."""
    return name[:8].lower().startswith(("http://", "https://"))


def may_hold(row: bytes) -> bool:
    """Whether a text of a row, which is JSON, may be such a URL."""
    return b'"http' in row.lower()


def place_of(url: str, folder: Path) -> Path:
    """The file that a URL is kept in."""
    return folder / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fetched(url: str, folder: Path) -> Path:
    """The file of a URL that was fetched.

    Raises:
        DataError: it was not, or its file is gone.
    """
    path = place_of(url, folder)
    if not path.is_file():
        problem = f"the image {quoted(url)} is a URL that was not fetched"
        raise DataError("missing_image", problem, "Run `llava-accel check` with a network, or save it as a file")
    return path


def fetch(urls: Sequence[str], folder: Path, progress: Callable[[int], None] = lambda _: None) -> dict[str, str]:
    """Fetch each into its file.

    Returns:
        URL -> what is wrong with those that could not be fetched.
    """
    problems: dict[str, str] = {}
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for url, problem in zip(urls, threads.map(lambda url: _attempt(url, folder), urls), strict=True):
            if problem:
                problems[url] = problem
            progress(1)
    return problems


def refuse(problems: dict[str, str], shown: int = 20) -> DataError:
    """The error of URLs that could not be fetched, with the list."""
    lines = [f"\n  {quoted(url, 200)}: {problem}" for url, problem in list(problems.items())[:shown]]
    more = f"\n  and {len(problems) - shown:,} more" if len(problems) > shown else ""
    return DataError(
        "missing_image",
        f"{len(problems):,} images could not be fetched:{''.join(lines)}{more}\n ",
        "Repeat this with a network; or save them below data.images and name the files",
    )


def _attempt(url: str, folder: Path) -> str:
    """Fetch one; what is wrong, or nothing."""
    problem = ""
    for _ in range(_TRIES):
        try:
            content = _read(url)
        except (OSError, ValueError, http.client.HTTPException) as error:  # of HTTP, of the name, of the connection
            problem = " ".join(str(getattr(error, "reason", "") or error).split()) or type(error).__name__
            continue
        if not looks_like_image(content[:16]):
            return "what it gives is no image of a format that is read"
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
        if answer.length:  # that are still to come: `read` takes the end of a connection for that of the image
            raise ConnectionError("the connection ended in the middle of it")
    return content


class _Guarded(urllib.request.HTTPRedirectHandler):
    """Asks nothing of addresses of the link itself, such as 169.254.169.254, neither at once nor after a redirection."""

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        host = urllib.parse.urlsplit(request.full_url).hostname or ""
        try:
            is_forbidden = ipaddress.ip_address(host).is_link_local
        except ValueError:
            is_forbidden = host == "metadata.google.internal"
        if is_forbidden:
            raise ValueError(f"{host} is not asked: it is no address of images")
        return request

    https_request = http_request


def _opener() -> urllib.request.OpenerDirector:
    """It knows HTTP alone: neither files nor FTP, which the usual one reads as well."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Guarded,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    )  # fmt: skip
    for handler in handlers:
        opener.add_handler(handler())
    return opener


_OPENER = _opener()
