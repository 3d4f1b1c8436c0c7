"""What a message advises is done here, word for word, and then the same command goes through: no advice leads in circles."""

import json
import re
import shlex
from pathlib import Path

import pytest

from helpers.broken_images import BROKEN as IMAGES
from helpers.broken_images import noise
from helpers.broken_models import copy_spoilt, edit
from helpers.broken_recipes import COMBINATIONS, SMALLEST, TOO_MUCH, TYPES, UNKNOWN, VALUES
from helpers.broken_rows import LINES, MALFORMED
from helpers.runs import metrics
from helpers.samples import record
from helpers.tiny import make_clip
from helpers.verbs import Ended, good_record, start, write_recipe
from llava_accel.recipe import RecipeError, load_recipe
from llava_accel.recipe.errors import Problem
from llava_accel.recipe.names import KEYS

ONE_KEY = UNKNOWN | TYPES | VALUES | TOO_MUCH
_VALUE = r'("[^"]*"|\[[^]]*\]|[^\s,;:`"]*[^\s,;:`".])'
_SET = re.compile(rf"((?:[a-z_]+\.)+[a-z_]+) = {_VALUE}")
_SHORT = re.compile(rf"`([a-z_]+) = {_VALUE}`")


def advised(problem: Problem) -> list[tuple[str, str]]:
    """The changes that a remedy names, each enough by itself: (key, value), an empty value for a key that goes."""
    key, value = next(iter(problem.given.items()))
    remedy = problem.remedy
    if "[" in key:  # an item of a list
        return []
    if problem.nearest:  # the key under its right name
        return [(problem.nearest[0], str(value))]
    found = _SET.findall(remedy)
    found += [(f"{key.rpartition('.')[0]}.{name}", text) for name, text in _SHORT.findall(remedy)]
    found += [(name, "") for name in re.findall(r"Remove ([a-z_]+\.[a-z_.]+)\b", remedy)]
    found += re.findall(r"(\S+) to a share of \S+ such as ([\d.]+)", remedy)
    found += [
        (key, text)
        for text in re.findall(rf"^Use {_VALUE}|Did you mean (\"[^\"]*\")\?", remedy)
        for text in text
        if text
    ]
    return [*found, (key, "")] if remedy == "Remove it." else found


def follow(recipe: Path, overrides: list[str], choice: int = 0) -> bool:
    """Do what is advised until the recipe is accepted; False where that takes a person's judgement.

    Args:
        choice: Which of the changes that the first message names; later ones go on with the first.
    """
    seen = {tuple(sorted(overrides))}
    while True:
        try:
            load_recipe(recipe, overrides, warns=False)
            return True
        except RecipeError as error:
            problem = error.problems[0]
        changes = advised(problem)
        if choice >= len(changes):
            return False
        key, value = changes[choice]
        choice = 0
        given = {name.partition("[")[0] for name in problem.given}
        gone = given if problem.nearest or (not value and key not in KEYS) else {key}
        overrides = [word for word in overrides if word.partition("=")[0].strip() not in gone]
        overrides += [f"{key}={value}"] if key in KEYS else []
        state = tuple(sorted(overrides))
        assert state not in seen, f"{problem} leads back to {overrides}"
        seen.add(state)


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    (tmp_path / "smallest.toml").write_text(SMALLEST)
    return tmp_path / "smallest.toml"


BY_HAND = {  # the rest, which name no value as it is typed: what is typed when they are followed
    "data.colums.image=x": "data.columns.image=x",
    "data.columns.imag=x": "data.columns.image=x",
    "data.columns.zzz=x": "data.columns.question=x",
    'data.train=[{pth="a"}]': 'data.train=[{path="a"}]',
    "optim.betas=[0.9]": "optim.betas=[0.9, 0.999]",
    "data.train=[3]": 'data.train=[{path="..."}]',
    "data.columns=photo": 'data.columns={image="photo"}',
    "data.columns.image=3": 'data.columns={image="..."}',
    "data.columns.image=": 'data.columns={image="..."}',
    "model.quantization=4": "model.quantization.bits=4",
    "model.lora.targets=['(']": "model.lora.targets=['\\\\.']",
    "log.trackers=['wandbb']": "log.trackers=['wandb']",
    "eval=3": "eval.every=3",
    "run.name=../up": "run.name=r run.output_dir=../up",
    "run.name=": "run.name=r",
    "epochs": "optim.learning_rate=1e-4",
    "=3": "optim.learning_rate=1e-4",
    "run.output_dir=~/run": f"run.output_dir={Path.home()}/run",
    "data.cache_dir=~/cache": f"data.cache_dir={Path.home()}/cache",
    'data.train=[{path="a", weight=0}]': 'data.train=[{path="a", weight=1.0}]',
    'data.train=[{path="a", weight=1e300}]': 'data.train=[{path="a", weight=1.0}]',
}


def test_what_is_advised_for_a_recipe_is_accepted(smallest: Path) -> None:
    cases = [[override] for override in ONE_KEY] + [shlex.split(words) for words in COMBINATIONS]
    done = {choice: [case for case in cases if follow(smallest, case, choice)] for choice in range(3)}
    assert [case for case in cases if case not in done[0]] == [
        [override] for override in ONE_KEY if override in BY_HAND
    ]
    assert len(done[1]) >= 8  # where a message names several ways out


@pytest.mark.parametrize("override", BY_HAND)
def test_what_is_advised_for_a_key_in_words_is_accepted(smallest: Path, override: str) -> None:
    typed = [BY_HAND[override]] if "{" in BY_HAND[override] or "[" in BY_HAND[override] else BY_HAND[override].split()
    assert load_recipe(smallest, typed, warns=False)


def assert_trained(folder: Path, ended: Ended, num_examples: int) -> None:
    assert ended.code == 0, ended.out + ended.err
    assert metrics(folder / "run")[-1]["num_examples"] == num_examples


def write(path: Path, *rows: bytes | dict[str, object]) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def next_words(ended: Ended) -> list[str]:
    """The arguments of the command that is named as the next one, which must be `train`."""
    (line,) = [line for line in ended.out.splitlines() if line.startswith("next: llava-accel train ")]
    return shlex.split(line)[3:]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every malformed record beside three good ones, two of which have pictures elsewhere."""
    broken = [json.dumps(row).encode() for row, _, _ in MALFORMED.values()] + [line for line, _ in LINES.values()]
    return write(tmp_path / "data.jsonl", *broken, *(good_record(number) for number in range(3)))


def test_records_are_left_out_by_the_keys_that_the_messages_name(tmp_path: Path, mixed: Path) -> None:
    recipe, words = str(write_recipe(tmp_path, mixed)), list[str]()
    for key, value in (("data.on_bad_record", '"skip"'), ("data.max_bad", "1.0")):
        ended = start("train", recipe, *words)
        (message,) = ended.messages
        assert f"{key} = {value}" in message or f"{key} = 0.001 allows. Raise it" in message
        words.append(f"{key}={value}")
    assert_trained(tmp_path, start("train", recipe, *words), 3)


def test_records_are_left_out_by_the_copy_that_check_advises(tmp_path: Path, mixed: Path) -> None:
    recipe = str(write_recipe(tmp_path, mixed))
    ended = start("check", recipe)
    (advice,) = [line for line in ended.out.splitlines() if line.startswith("next: ")]
    words = shlex.split(advice.partition("copy without them: ")[2].replace("DIR", str(tmp_path / "copy")))
    assert words[:2] == ["llava-accel", "check"]
    assert_trained(tmp_path, start("train", *next_words(start("check", *words[2:]))), 3)


def test_images_are_left_out_by_the_copy_that_check_advises(tmp_path: Path) -> None:
    noise(20, 10).save(tmp_path / "secret.png")
    rows = [record("<image>", "A", id="good", image="good.png")]
    (tmp_path / "images").mkdir()
    noise(20, 10).save(tmp_path / "images" / "good.png")
    for number, (name, make, _) in enumerate(IMAGES.values()):
        if "/" not in name and not name.startswith(".") and len(name) < 100:
            (tmp_path / "images" / str(number)).mkdir()
            make(tmp_path / "images" / str(number) / name)
            name = f"{number}/{name}"
        rows.append(record("<image>", "A", id=str(number), image=name))
    recipe = str(
        write_recipe(tmp_path, write(tmp_path / "data.jsonl", *rows), data={"images": str(tmp_path / "images")})
    )
    ended = start("check", recipe, "--fix", str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "left_out.txt").read_text().count("\n") == len(IMAGES), ended.out
    assert_trained(tmp_path, start("train", *next_words(ended)), 1)


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("one.jpg", "one.gif"),
        ("up.jpg", "UP.JPG"),
        (" a.png", "a.png"),
        ("a\\b.png", "a/b.png"),
        ("train/a.png", "a.png"),
    ],
)
def test_an_image_under_the_name_that_is_advised_is_read(tmp_path: Path, written: str, there: str) -> None:
    (tmp_path / "images" / there).parent.mkdir(parents=True)
    noise(20, 10).save(tmp_path / "images" / there)
    words = [str(write_recipe(tmp_path, tmp_path / "data.jsonl", data={"images": str(tmp_path / "images")}))]
    write(tmp_path / "data.jsonl", record("<image>", "A", image=written))
    (message,) = start("train", *words).messages
    advice = message.rpartition("data.jsonl, row 1: ")[2].partition(". ")[2]
    (name,) = re.findall(r"'([^']+)'(?:,| is) (?:which )?", advice)
    assert name == there
    write(tmp_path / "data.jsonl", record("<image>", "A", image=name))
    assert_trained(tmp_path, start("train", *words), 1)


@pytest.mark.parametrize("change_to", ["data.on_too_long=drop_turns", "data.on_too_long=skip", "data.max_length="])
def test_a_record_that_is_too_long_is_taken_as_each_advice_says(tmp_path: Path, change_to: str) -> None:
    long = record("Q", "A", "Q", "word " * 1000, id="long")
    recipe = str(write_recipe(tmp_path, write(tmp_path / "data.jsonl", good_record(1), long), data={"max_length": 300}))
    (message,) = start("train", recipe).messages
    key, _, value = change_to.partition("=")
    assert key in message and value in message
    if key == "data.max_length":
        (needed,) = re.findall(r"data.max_length to (\d+)", message)
        assert (
            f"data.max_length = {needed} takes all" in message
            and f"max_length = {needed}" in start("check", recipe).out
        )
        change_to += needed
    assert_trained(tmp_path, start("train", recipe, change_to), 1 if value == "skip" else 2)


KINDS = {
    "another LLaVA": {"model_type": "vipllava"},
    "a LLaVA-NeXT": {"model_type": "llava_next"},
    "another vision model": {"model_type": "qwen2_vl"},
    "PaliGemma": {"model_type": "paligemma"},
    "a kind that is not known": {"model_type": "omni"},
    "no kind": {"model_type": None},
    "a language model": {"model_type": "llama", "vision_config": None, "text_config": None},
    "an original with one layer": {"model_type": "llava_llama", "mm_vision_tower": "clip", "mm_projector_type": "linear"},
    "an original with tiles": {
        "model_type": "llava_llama", "mm_vision_tower": "clip", "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_no_two_keys_send_a_model_to_one_another(tmp_path: Path, llava_folder: Path, name: str) -> None:
    base, tower = (
        copy_spoilt(llava_folder, tmp_path / "base", edit("config.json", **KINDS[name])),
        make_clip(tmp_path / "clip"),
    )
    data = write(tmp_path / "data.jsonl", good_record(1))
    ways: dict[str, dict[str, object]] = {
        "model.base": {"base": str(base), "vision_tower": "", "adapter": ""},
        "model.language_model": {"base": "", "language_model": str(base), "vision_tower": str(tower), "adapter": ""},
    }
    said = {
        key: start("check", str(write_recipe(tmp_path, data, model=model)), fresh=True) for key, model in ways.items()
    }
    # A model is sent to the other key only if it gets further there.
    sent = [
        key
        for key, ended in said.items()
        for other in ways
        if other != key and f"name it in {other}" in ended.err.lower()
    ]
    assert len(sent) <= 1, [ended.err for ended in said.values()]
    assert all(ended.code == 2 and "Traceback" not in ended.err for ended in said.values())
