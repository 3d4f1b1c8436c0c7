"""A run folder, a cache or an output that cannot be used is named before anything is computed for it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.broken_models import weights
from helpers.exported import prove_here
from helpers.forked import Forked, run
from helpers.runs import PARITY
from helpers.verbs import assert_refused, good_record, start, write_recipe
from llava_accel import compat


def _file(path: Path) -> Path:
    path.write_text("not a folder")
    return path


def _below_a_file(path: Path) -> Path:
    return _file(path) / "run"


PLACES: dict[str, Callable[[Path], Path]] = {
    "a file": _file,
    "a folder below a file": _below_a_file,
    "a dangling link": lambda path: path.symlink_to("gone/for/good") or path,
    "a place of the kernel": lambda path: Path("/proc/run"),
    "a name of 300 letters": lambda path: path.with_name("x" * 300),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("verb", ["check", "train"])
def test_broken_input_a_run_folder(tmp_path: Path, verb: str, name: str) -> None:
    place = PLACES[name](tmp_path / "place")
    ended = start(verb, str(write_recipe(tmp_path, run={"output_dir": str(place)})))
    # Before the folder is made, train looks for checkpoints in it, and a name that is too long fails there already.
    says = ["File name too long"] if "letters" in name else ["run.output_dir", "Choose another folder"]
    assert_refused(ended, [str(place)[:200], *says])


@pytest.mark.parametrize("name", ["a file", "a folder below a file", "a place of the kernel"])
@pytest.mark.parametrize("verb", ["check", "train", "evaluate"])
def test_broken_input_a_cache(tmp_path: Path, verb: str, name: str) -> None:
    place = PLACES[name](tmp_path / "place")
    data = {"cache_dir": str(place), "eval_fraction": 0.5}
    assert_refused(start(verb, str(write_recipe(tmp_path, data=data))), [str(place), "data.cache_dir"])


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that nobody may write, root included."""
    folder = tmp_path / "read only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("verb", ["check", "train"])
def test_broken_input_a_read_only_run_folder(tmp_path: Path, read_only: Path, verb: str) -> None:
    ended = start(verb, str(write_recipe(tmp_path, run={"output_dir": str(read_only / "run")})))
    assert_refused(ended, ["run.output_dir", str(read_only), "Read-only file system", "Choose another folder"])


def _damage(run: Path) -> Path:
    checkpoint = next((run / "checkpoints").iterdir())
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")
    return run / "checkpoints"


def _unlisted(run: Path) -> Path:
    checkpoint = next((run / "checkpoints").iterdir())
    (checkpoint / "manifest.json").write_text("{")
    return run / "checkpoints"


def _half(run: Path) -> Path:
    checkpoint = next((run / "checkpoints").iterdir())
    shutil.rmtree(checkpoint / "engine")
    return run / "checkpoints"


@pytest.mark.parametrize("spoil", [_damage, _unlisted, _half])
@pytest.mark.parametrize("verb", ["check", "train"])
def test_broken_input_a_half_written_run(
    tmp_path: Path, lora_run: Path, verb: str, spoil: Callable[[Path], Path]
) -> None:
    place = spoil(Path(shutil.copytree(lora_run, tmp_path / "run")))
    ended = start(verb, str(write_recipe(tmp_path)))
    assert_refused(ended, ["run.resume", str(place), "damaged", 'set run.resume = "never"'])


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_damaged_checkpoint_is_passed_over_with_a_word(
    tmp_path: Path, lora_run: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_here(monkeypatch)
    words = _resumed(tmp_path, lora_run)
    older = next((tmp_path / "run" / "checkpoints").iterdir())
    newest = Path(shutil.copytree(older, older.with_name("step-000009")))
    (newest / "adapter_model.safetensors").write_bytes(b"")
    ended = start(verb, *words)
    said = " ".join(ended.out.split())
    assert ended.code == 0 and f"{newest} is damaged" in said and f"{older} is damaged" not in said, ended.err


@pytest.mark.parametrize("verb", ["check", "train"])
def test_broken_input_a_run_of_another_recipe(tmp_path: Path, lora_run: Path, verb: str) -> None:
    shutil.copytree(lora_run, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    ended = start(verb, str(write_recipe(tmp_path, run={"seed": 7})))
    assert_refused(ended, ["run.resume", str(tmp_path / "run"), "run.seed", "model.adapter", "Set these back"])
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def _resumed(folder: Path, lora_run: Path, *overrides: str) -> list[str]:
    """The arguments that go on with a copy of a run."""
    shutil.copytree(lora_run, folder / "run")
    return [str(lora_run / "recipe.toml"), f"run.output_dir={folder / 'run'}", *overrides]


@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_run_goes_on_with_its_base_wherever_that_is_and_with_no_other(
    tmp_path: Path, lora_run: Path, llava_folder: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_here(monkeypatch)
    base = Path(shutil.copytree(llava_folder, tmp_path / "base"))
    words = _resumed(tmp_path, lora_run, f"model.base={base}")
    ended = start(verb, *words, fresh=True)
    assert ended.code == 0, ended.err
    weights(lambda tensors, key: tensors[key].mul_(2), "up_proj.weight", "model.safetensors")(base)
    monkeypatch.setattr(compat, "load_model", None)  # no weight is read before it is refused
    assert_refused(start(verb, *words, fresh=True), ["run.resume", str(tmp_path / "run"), str(base), "fingerprint"])


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.accumulation_steps=3", ["counts steps of", "Choose them so that their product is"]),
        ("run.precision=bf16", ["run.precision", "Set"]),
        ("data.train={other}", ["the data has changed", "Restore the files"]),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_by_check_as_by_train(
    tmp_path: Path, lora_run: Path, verb: str, override: str, says: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "load_model", None)  # no weight is read before it is refused
    (tmp_path / "other.json").write_text(json.dumps([good_record(number) for number in range(4)]))
    words = _resumed(tmp_path, lora_run, override.format(other=tmp_path / "other.json"))
    assert_refused(start(verb, *words), ["run.resume", str(tmp_path / "run"), *says])


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize("named", ["nowhere", "."])
def test_broken_input_a_checkpoint_that_is_none(tmp_path: Path, verb: str, named: str) -> None:
    ended = start(verb, str(write_recipe(tmp_path, run={"resume": str(tmp_path / named)})))
    assert_refused(ended, ["run.resume", str(tmp_path), "not a complete checkpoint", "Name a folder"])


def test_broken_input_an_export_to_a_place_that_is_taken(tmp_path: Path, lora_run: Path) -> None:
    place = _file(tmp_path / "place")
    for out in (place, place / "below", lora_run):
        ended = start("export", str(lora_run), "--to", "merged", "--out", str(out))
        assert_refused(ended, ["--out", str(out)])


ONES = {
    "a recipe": (["train", "{recipe}", "optim.lerning_rate=1"], "optim.lerning_rate"),
    "a model": (["check", "{recipe}", "model.base=/nowhere"], "model.base"),
    "a run folder": (["check", "{recipe}", "run.output_dir=/proc/run"], "run.output_dir"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ONES)
def test_broken_input_in_a_process_of_its_own(tmp_path: Path, name: str) -> None:
    """What the tests here see in one process is what a shell sees."""
    (verb, *arguments), word = ONES[name]
    file = write_recipe(tmp_path)
    command = [sys.executable, "-m", f"llava_accel.{verb}", *(text.format(recipe=file) for text in arguments)]
    how = subprocess.Popen if name == "a model" else Forked
    done = run(command, how, cwd=PARITY.parents[1])
    assert done.returncode == 2
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert word in done.stderr and "Traceback" not in done.stdout + done.stderr, message
