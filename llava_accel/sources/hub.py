"""Data sets of the Hugging Face hub, through its library `datasets`: which files they have, and which commit."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from llava_accel import compat
from llava_accel.exceptions import in_short
from llava_accel.recipe.paths import is_file_name
from llava_accel.sources.problems import DataError, quoted, some

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MADE_OF = re.compile(r"/([0-9a-f]{40})/")  # the folder in which datasets keeps what it made of a commit


def is_name(text: str) -> bool:
    """Whether a text may be the name of a data set, org/name, rather than a path."""
    return _NAME.fullmatch(text) is not None and not is_file_name(text)


def is_of_hub(name: str) -> bool:
    """Whether a name is that of a data set or model of the hub, as there is no such file or folder here."""
    return is_name(name) and not Path(name).exists()


def files(name: str, config: str, splits: Sequence[str], revision: str) -> list[Path]:
    """The Arrow files of a split, which `datasets` downloads and makes once.

    Args:
        name: org/name, or a folder that is a copy of a data set of the hub.
        splits: The first of these that exists is taken.

    Raises:
        DataError: it cannot be loaded; says what the hub has instead, where that is known.
    """
    import datasets  # which takes a second, and is needed only here
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        present = datasets.get_dataset_split_names(name, config or None, revision=revision or None)
        split = choose_split(present, splits, name)
        # Whatever HF_DATASETS_IN_MEMORY_MAX_SIZE says: a data set in memory has no files.
        dataset = datasets.load_dataset(
            name, config or None, split=split, revision=revision or None, keep_in_memory=False
        )
    except DatasetNotFoundError:
        remedy = "Check the name; for a private or gated one, log in with `hf auth login`"
        raise DataError("json", f"there is no file, no folder and no data set {quoted(name)}", remedy) from None
    except DatasetGenerationError as error:
        problem = f"the data set {name} cannot be read by datasets ({in_short(error)})"
        raise DataError("json", problem, "Download its files, and name these") from None
    except (DatasetsError, ValueError, RuntimeError, OSError, HfHubHTTPError, compat.hub_http_error()) as error:
        problem = f"there is no file or folder {quoted(name)}, and no such data set can be loaded ({in_short(error)})"
        remedy = "Check the path; for a data set check its name, config, split and revision, and the network"
        raise DataError("json", problem, remedy) from None
    assert isinstance(dataset, datasets.Dataset)
    paths = [str(each["filename"]) for each in dataset.cache_files]
    others = [made[1] for path in paths if (made := _MADE_OF.search(path)) and made[1] != revision]
    if _COMMIT.fullmatch(revision) and others:  # offline, datasets takes what it has
        problem = f"for the data set {name} the cache has commit {others[0]}, and not {revision}"
        raise DataError("json", problem, "Repeat this with a network, or set that revision")
    return list(map(Path, paths))


def splits(name: str) -> list[str]:
    """The splits of a data set, or of a folder that is a copy of one; empty if it is neither."""
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return list(datasets.get_dataset_split_names(name))
    except (DatasetsError, ValueError, RuntimeError, OSError, HfHubHTTPError, compat.hub_http_error()):
        return []


def pinned(name: str, config: str, splits: Sequence[str], revision: str) -> str:
    """The commit that a revision of a data set points to at this moment; a commit is returned as it is.

    Offline, it is the commit that was downloaded last.

    Raises:
        DataError: there is no such data set or revision, or offline nothing was downloaded.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision or None).sha or revision
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"revision {quoted(revision)} of it" if isinstance(error, RevisionNotFoundError) else "such data set"
        raise DataError("json", f"data set {name}: the hub has no {what}", "Check its name and revision") from None
    except (OfflineModeIsEnabled, HfHubHTTPError, OSError, compat.hub_http_error()):
        made = _MADE_OF.search(str(files(name, config, splits, revision)[0]))
        return made[1] if made else revision


def cache_root() -> Path:
    """Where `datasets` keeps what it downloads, images that were packed apart from the rows among them."""
    import datasets

    return Path(datasets.config.HF_CACHE_HOME)  # pyright: ignore[reportAttributeAccessIssue]


def choose_split(present: Sequence[str], wanted: Sequence[str], what: str) -> str:
    """The first wanted split that is present; or the only one that is present, if the default "train" is wanted."""
    for name in wanted:
        if name in present:
            return name
    if len(present) == 1 and wanted[0] == "train":
        return present[0]
    problem = f"{what} has no split {' or '.join(map(repr, wanted))}, but {some(list(map(repr, present)), 10)}"
    raise DataError("json", problem, f'Name one: {{path = "{what}", split = "{present[0] if present else "..."}"}}')
