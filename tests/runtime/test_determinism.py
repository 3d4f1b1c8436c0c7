"""Kernels that add up in a fixed order, where the recipe asks for them."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llava_accel.train as verb
from helpers.runs import metrics, recipe, trained, without_times
from llava_accel.exceptions import UserError
from llava_accel.runtime.determinism import determinism_explained, set_determinism

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (WORKSPACE, "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # is put back after the test, whatever that sets
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_run_chooses_them_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[bool, bool, str | None, str | None]] = []
    load = verb.load_processing

    def noting(*arguments: object) -> object:
        flags = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
        chosen.append((*flags, os.environ.get("FLASH_ATTENTION_DETERMINISTIC"), os.environ.get(WORKSPACE)))
        return load(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(verb, "load_processing", noting)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    verb.train(recipe(tmp_path / "off", train={"max_steps": 1}))
    verb.train(recipe(tmp_path / "on", run={"deterministic": True}, train={"max_steps": 1}))
    assert chosen == [(False, False, None, None), (True, False, "1", ":4096:8")]
    assert torch.backends.cudnn.allow_tf32, "it is put back"
    off, on = (tmp_path / name / "run" for name in ("off", "on"))
    assert without_times(metrics(off)) == without_times(metrics(on)), "on a CPU they are the same kernels"
    before, after = trained(off / "export"), trained(on / "export")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_next_run_in_a_process_is_not_bound_by_it() -> None:
    set_determinism(True)
    set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("found", "is_good"), [(":16:8", True), (":4096:8", True), (":0:0", False), ("", False)])
def test_a_setting_of_cublas_that_adds_up_in_no_order_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str, is_good: bool
) -> None:
    monkeypatch.setenv(WORKSPACE, found)
    if is_good:
        set_determinism(True)
        assert os.environ[WORKSPACE] == found
        return
    with pytest.raises(
        UserError, match=f"run.deterministic: {WORKSPACE} is '{found}'.*Unset it, or set it to ':4096:8'"
    ):
        set_determinism(True)


def test_an_operation_without_such_a_kernel_is_named_with_the_remedy() -> None:
    torch_says = "upsample_bicubic2d_backward does not have a deterministic implementation, but you set ..."
    with (
        pytest.raises(UserError, match=r"no kernel for upsample_bicubic2d_backward .* run\.deterministic = false"),
        determinism_explained(),
    ):
        raise RuntimeError(torch_says)
    # torch 2.13, aten/src/ATen/Context.cpp: alertCuBLASConfigNotDeterministic
    torch_says = (
        "... was enabled, but this operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2."
    )
    with (
        pytest.raises(UserError, match=rf"in a new process, or set {WORKSPACE}=:4096:8 in the environment"),
        determinism_explained(),
    ):
        raise RuntimeError(torch_says)
    with pytest.raises(RuntimeError, match="another"), determinism_explained():
        raise RuntimeError("another")
