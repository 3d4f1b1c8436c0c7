"""What the machine lacks is said before anything is read, and check says what train would."""

from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.runs import recipe, tables
from helpers.verbs import start
from llava_accel.exceptions import UserError
from llava_accel.loop.machine import check_machine
from llava_accel.recipe.toml import to_toml

CPU = torch.device("cpu")
LACKING: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "flash": ({"model": {"attention": "flash_attention_2"}, "run": {"precision": "bf16"}}, r"model\.attention: flash"),
    "flex": ({"model": {"attention": "flex_attention"}}, r"model\.attention: flex_attention"),
    "compiler": ({"model": {"compile": True}}, r"model\.compile: "),
    "liger": ({"model": {"kernels": "liger"}}, r'model\.kernels = "liger" needs a GPU'),
    "pages": (
        {"optim": {"optimizer": "paged_adamw_8bit"}},
        r"optim\.optimizer: 'paged_adamw_8bit' .* Use 'adamw_8bit'",
    ),
}


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no_such_compiler")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the messages are for machines without a GPU")
@pytest.mark.parametrize("name", LACKING)
def test_train_says_it_first_and_check_says_it_too(name: str, tmp_path: Path) -> None:
    changes, says = LACKING[name]
    with pytest.raises(UserError, match=says):
        verb.train(recipe(tmp_path, **changes, data={"train": str(tmp_path / "nowhere.json")}))
    assert not (tmp_path / "run").exists()
    (tmp_path / "r.toml").write_text(to_toml(tables(tmp_path, **changes)))
    ended = start("check", str(tmp_path / "r.toml"))
    assert ended.code == 2 and says.partition(":")[0].replace("\\", "") in ended.messages[0]


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    made = recipe(tmp_path, model={"compile": True}, optim={"optimizer": "paged_adamw_8bit"})
    with pytest.raises(UserError, match=r"(?s)model\.compile: .*\n.*optim\.optimizer: "):
        check_machine(made, CPU)
    check_machine(recipe(tmp_path), CPU)
