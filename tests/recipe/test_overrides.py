"""Keys on the command line: lists as people write them, and what the shell takes apart is named with what to write."""

import shlex
from pathlib import Path

import pytest

from llava_accel.recipe import Recipe, RecipeError, accepts, load_recipe


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    path = tmp_path / "smallest.toml"
    path.write_text('[run]\nname = "r"\n[model]\nbase = "b"\n[data]\ntrain = "t.jsonl"\n')
    return path


def load(path: Path, line: str) -> Recipe:
    """With a line of the shell."""
    return load_recipe(path, shlex.split(line), warns=False)


@pytest.mark.parametrize(
    ("line", "trackers"),
    [
        ("log.trackers=wandb", ("wandb",)),
        ("log.trackers=wandb,tensorboard", ("wandb", "tensorboard")),
        ('log.trackers="wandb, tensorboard"', ("wandb", "tensorboard")),
        ('log.trackers=["wandb"]', ("wandb",)),
        ("""'log.trackers=["wandb", "aim"]'""", ("wandb", "aim")),
        ("log.trackers=", ()),
    ],
)
def test_a_list_is_taken_as_people_write_it(smallest: Path, line: str, trackers: tuple[str, ...]) -> None:
    assert load(smallest, line).log.trackers == trackers


def test_a_list_of_numbers_is_one_of_numbers(smallest: Path) -> None:
    assert load(smallest, "optim.betas=0.9,0.95").optim.betas == (0.9, 0.95)


def test_what_may_be_text_or_a_list_stays_as_it_is(smallest: Path) -> None:
    assert load(smallest, "model.lora.targets=auto data.train=a,b.json").data.train == "a,b.json"


@pytest.mark.parametrize(
    ("line", "says", "number"),
    [
        ("run.name=my run", 'run.name="my run"', 2),
        ("data.images=my own images train.epochs=2", 'data.images="my own images"', 3),
        ("data.images=a $b c", "data.images='a $b c'", 3),
        ("log.trackers=wandb aim", "log.trackers=wandb,aim", 2),
        ("optim.betas=0.9, 0.95", 'optim.betas="0.9, 0.95"', 2),
        ("optim.learning_rate = 1e-4", "optim.learning_rate=1e-4", 3),
        ("optim.learning_rate =1e-4", "optim.learning_rate=1e-4", 2),
        ("optim.learning_rate= 1e-4", "optim.learning_rate=1e-4", 2),
        ("run.name=a optim.learning_rate = 1e-4", "optim.learning_rate=1e-4", 3),
    ],
)
def test_what_the_shell_took_apart_is_named_with_what_to_write(
    smallest: Path, line: str, says: str, number: int
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(smallest, line.split(" "))
    (problem,) = caught.value.problems
    assert f"the shell made {number} words of it" in problem.expected and problem.remedy == f"Write {says}"
    assert str(problem.given["override"]) in line
    (override,) = shlex.split(says)
    if not override.startswith("run.name"):  # a name has no spaces, which the next message says
        load(smallest, says)


@pytest.mark.parametrize("line", ["x", "train.epochs=2 x", "run.name=a =b", "= 1", "a.b=="])
def test_other_words_are_no_override(smallest: Path, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(smallest, line.split(" "))
    assert not [problem for problem in caught.value.problems if "the shell made" in problem.expected]


def test_an_override_is_accepted_by_its_key_alone() -> None:
    assert accepts("optim.learning_rate=1e-4") and accepts("eval.patience=3")
    assert not accepts("optim.learning_rate=fast") and not accepts("optim.lr=1") and not accepts("optim")


def test_a_text_in_the_file_is_advised_as_a_list(smallest: Path) -> None:
    smallest.write_text(smallest.read_text() + '[log]\ntrackers = "wandb"\n')
    with pytest.raises(RecipeError, match=r'Write it as a list: `trackers = \["wandb"\]`'):
        load_recipe(smallest)
