"""The best checkpoint is what a run exports, shows and hands to every verb; each says which step it loaded."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_accel.train as verb
from helpers.exported import assert_same, export, logits, prove_here
from helpers.runs import metrics, mixed_records, on_tiny, recipe, talk, trained, write_records
from helpers.verbs import start
from llava_accel.recipe.toml import to_toml

pytestmark = pytest.mark.slow

BEST, LAST = 1, 3


def keys(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """What is learned is not what is asked for, so that the first step is the best."""
    data = write_records(folder / "data.json", mixed_records(6))
    other = write_records(
        folder / "other.json", [talk(number, "Tell me.", "Yes. No. Yes.", "t1.png") for number in range(4)]
    )
    optim = {"learning_rate": 2e-2, "projector_learning_rate": 2e-2, "schedule": "constant", "warmup_fraction": 0.0}
    evaluation = {"every": 1, "blind_limit": 0, "at_start": False, "train_limit": 2}
    tables: dict[str, Any] = {"optim": optim, "eval": evaluation, "data": {"eval": str(other)}}
    tables |= {"train": {"max_steps": LAST, "epochs": LAST}, "checkpoint": {"verify": True, "every": 1}}
    for table, settings in changes.items():
        tables[table] = tables.get(table, {}) | settings
    return on_tiny(base, folder, data, **tables)


@pytest.fixture(scope="module")
def made(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose best step is not its last, and what it printed."""
    folder = tmp_path_factory.mktemp("which")
    (folder / "recipe.toml").write_text(to_toml(keys(llava_folder, folder)))
    with pytest.MonkeyPatch.context() as patch:
        prove_here(patch)
        ended = start("train", str(folder / "recipe.toml"))
    assert ended.code == 0, ended.err
    losses = [line["eval"]["loss"] for line in metrics(folder / "run") if "eval" in line]
    assert losses.index(min(losses)) == BEST - 1 < LAST - 1, "the test needs a run that gets worse"
    return folder / "run", ended.out


def test_the_export_is_the_best_and_was_verified_as_such(made: tuple[Path, str]) -> None:
    run, said = made
    exported, best, last = (trained(run / place) for place in ("export", "best", f"checkpoints/step-{LAST:06d}"))
    assert all(torch.equal(exported[name], best[name]) for name in best)
    assert any(not torch.equal(exported[name], last[name]) for name in last)
    found = re.search(r"export in plain transformers and peft.*logits differ by (\S+) at most", said)
    assert found and float(found[1]) < 1e-4, said
    for place in ("export", "best"):
        facts = json.loads((run / place / "llava_accel.json").read_text())
        assert facts["step"] == BEST and [line["step"] for line in facts["evaluations"]] == [BEST]


def test_the_end_of_the_run_speaks_of_the_best(made: tuple[Path, str]) -> None:
    run, said = made
    assert f"some answers of step {BEST}" in said
    assert f"export (step {BEST}, the best by eval.metric = loss)" in said
    answers = [json.loads(line) for line in (run / "predictions" / f"step-{BEST:06d}.jsonl").read_text().splitlines()]
    assert all(answer["prediction"].split()[0] in said for answer in answers if answer["prediction"].strip())
    assert f"at its best checkpoint, step {BEST}" in (run / "report.html").read_text()


def test_chat_evaluate_and_export_say_the_step(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = made
    named = f"{run / 'best'}, step {BEST}"
    talked = start("chat", "--adapter", str(run), "--once", "What?", "--max-new-tokens", "2")
    assert named in talked.err and named not in talked.out
    scored = start("evaluate", str(run / "recipe.toml"), "--adapter", str(run))
    assert f"model.adapter: {named}" in scored.out, scored.err
    assert f"evaluation loss {metrics(run)[1]['eval']['loss']:.4f}" in scored.out
    export(monkeypatch, run, "peft", tmp_path / "peft")
    assert_same(logits(tmp_path / "peft"), logits(run / "export"))


def test_a_recipe_goes_on_from_a_run(made: tuple[Path, str], llava_folder: Path, tmp_path: Path) -> None:
    run, _ = made
    model = {"adapter": str(run), "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    still = {"learning_rate": 0.0, "projector_learning_rate": 0.0}
    table = keys(llava_folder, tmp_path, model=model, optim=still, train={"max_steps": 1}, checkpoint={"verify": False})
    (tmp_path / "recipe.toml").write_text(to_toml(table))
    checked, ended = (start(name, str(tmp_path / "recipe.toml")) for name in ("check", "train"))
    assert checked.code == ended.code == 0, checked.err + ended.err
    assert f"model.adapter: {run / 'best'}, step {BEST}" in ended.out
    before, after = trained(run / "best"), trained(tmp_path / "run" / "export")
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("train", ["projector", "full"])
def test_evaluate_takes_runs_of_every_kind(
    train: str, llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove_here(monkeypatch)
    verb.train(recipe(tmp_path, **keys(llava_folder, tmp_path, model={"train": train}, optim={"learning_rate": 1e-2})))
    run = tmp_path / "run"
    lines = [line for line in metrics(run) if "eval" in line]
    best = min(lines, key=lambda line: line["eval"]["loss"])
    scored = start("evaluate", str(run / "recipe.toml"), "--adapter", str(run))
    assert f"evaluation loss {best['eval']['loss']:.4f}" in scored.out, scored.err
    assert f"{run / 'best'}, step {best['step']}" in scored.out
    assert "fingerprint" not in scored.out, "its base is the one of the run"
    key = {"projector": "model.projector", "full": "model.base"}[train]
    again = start("evaluate", str(run / "recipe.toml"), f'{key}="{run}"')
    assert f"evaluation loss {best['eval']['loss']:.4f}" in again.out, again.err


def test_a_stage_1_run_named_as_an_adapter_is_sent_to_the_right_key(
    llava_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = keys(llava_folder, tmp_path, model={"train": "projector"}, checkpoint={"verify": False})
    verb.train(recipe(tmp_path, **one))
    (tmp_path / "recipe.toml").write_text(
        to_toml(keys(llava_folder, tmp_path, run={"output_dir": str(tmp_path / "two")}))
    )
    refused = start("train", str(tmp_path / "recipe.toml"), f'model.adapter="{tmp_path / "run"}"')
    assert refused.code == 2 and "name it in model.projector" in refused.err
    two = [str(tmp_path / "recipe.toml"), f'model.projector="{tmp_path / "run"}"']
    for name, words in (("check", two), ("train", [*two, "train.max_steps=2"]), ("check", two), ("train", two)):
        ended = start(name, *words)
        assert ended.code == 0 and "fingerprint" not in ended.out, ended.err + ended.out
    answered = start("chat", "--adapter", str(tmp_path / "two"), "--once", "What?")
    assert answered.code == 0 and "fingerprint" not in answered.out + answered.err, "its base is the one of the run"


def test_without_a_best_it_is_the_last_step_everywhere(llava_folder: Path, tmp_path: Path) -> None:
    table = keys(llava_folder, tmp_path, checkpoint={"best": False, "verify": False})
    (tmp_path / "recipe.toml").write_text(to_toml(table))
    ended = start("train", str(tmp_path / "recipe.toml"))
    assert f"some answers of step {LAST}" in ended.out and f"export (step {LAST})" in ended.out, ended.err
    last = trained(tmp_path / "run" / "checkpoints" / f"step-{LAST:06d}")
    assert all(torch.equal(tensor, last[name]) for name, tensor in trained(tmp_path / "run" / "export").items())
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    talked = start("chat", "--adapter", str(tmp_path / "run"), "--once", "What?", "--max-new-tokens", "2")
    assert f"export, step {LAST}" in talked.err
