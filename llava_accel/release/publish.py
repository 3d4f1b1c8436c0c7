"""Sends a folder to the Hugging Face hub, without asking questions."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llava_accel import compat
from llava_accel.console.output import Console
from llava_accel.exceptions import UserError


def check_name(name: str) -> None:
    """Raise UserError, before any work is done, if `name` is not ORG/NAME as the hub allows it."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}. Write ORG/NAME") from None
    if name.count("/") != 1:
        raise UserError(f"--push {name}: the hub needs ORG/NAME, your user name or an organisation before the slash")


def check_login() -> None:
    """Raise UserError, before any work is done, if there is no token."""
    if get_token() is None:
        raise UserError("--push needs a token of the hub. Log in with `hf auth login`, or set HF_TOKEN")


def show_files(folder: Path, name: str, console: Console) -> None:
    """Print the files that a push would send."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    rows = [[str(path.relative_to(folder)), f"{size:,}"] for path, size in zip(files, sizes, strict=True)]
    console.table(f"would be pushed to {name}", ["file", "bytes"], [*rows, ["in all", f"{sum(sizes):,}"]])


def push(folder: Path, name: str, console: Console) -> None:
    """Make the repository unless it exists, and send the folder. A new one is private.

    Raises:
        UserError: the hub refused, or could not be reached.
    """
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with llava_accel")
    except (compat.hub_http_error(), OSError) as error:
        reason = re.sub(r"hf_\w+", "hf_...", str(error).strip().partition("\n")[0])
        raise UserError(
            f"--push {name}: {reason}. The export is complete in {folder}: check name, rights and network, and send it "
            f"with `hf upload {name} {folder}`"
        ) from None
    console.line(f"pushed: {address} (a new repository is private; its settings change that)")
