"""The figures of a GPU are measured by a script that works, a row that could not be measured says so, and the shapes are
those that it says."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gpu import figures
from gpu.figures import Row, main, rows_of
from gpu.measures import FIGURES, Figure, Measured, Setting, losses, recipe_for
from gpu.seven_billion import llava_config, make_base
from gpu.wheels import closure, names_in
from helpers.forked import Forked
from helpers.traces import planned_alone


@pytest.mark.slow
def test_the_quickest_figures_come_as_lines_and_as_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("subprocess.Popen", Forked)
    rows = main(["--rehearse", "--rounds", "1", "--folder", str(tmp_path), "--only", "ceilings", "lora"])
    assert {row.figure for row in rows} == {"ceilings", "lora"}
    measured = [row for row in rows if row.value is not None]
    assert len(measured) >= 5 and all(row.value and row.value > 0 for row in measured)
    said = capsys.readouterr().out
    assert "rehearsed: of no meaning" in said and all(row.title in said for row in rows)
    written = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [Row(**each) for each in written] == rows and "TFLOP/s" in (tmp_path / "figures.txt").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_bits_that_differ_after_a_resume_are_seen(tmp_path: Path) -> None:
    found = list(FIGURES["resume"].measure(Setting(tmp_path, True, 1)))
    assert [row.value for row in found] == [0.0, 0.0] or any("deterministic" in row.note for row in found)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerator")
def test_a_switch_that_cannot_be_had_is_said_and_not_a_figure() -> None:
    assert len([each for each in losses({}) if isinstance(each, float)]) == 3
    refused = losses({"model": {"attention": "flash_attention_2"}})
    assert isinstance(refused, str) and "flash_attention_2" in refused


def stub(monkeypatch: pytest.MonkeyPatch, folder: Path, program: str) -> None:
    """Let the process of a figure be another program."""
    file = folder / "program.py"
    file.write_text(program)
    monkeypatch.setattr(figures, "__file__", str(file))


def test_a_figure_that_fails_or_takes_too_long_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"row": {"figure": "lora", "title": "first", "value": 1.0}})
    stub(monkeypatch, tmp_path, f"print({line!r}, flush=True)\nraise SystemExit('no memory is left')")
    first, second = rows_of("lora", [], 60)
    assert first.value == 1.0 and second.value is None and second.note == "no memory is left"
    assert second.cells[1] == "not measured: no memory is left" and second.reached == ""
    stub(monkeypatch, tmp_path, "import time; time.sleep(60)")
    (late,) = rows_of("lora", [], 0.2)
    assert late.value is None and "stopped after" in late.note
    (never,) = rows_of("lora", [], 0)
    assert never.value is None and "no time is left" in never.note


def test_a_target_is_the_least_or_the_most() -> None:
    least, most = (Row("t", 2.0, "x", 3, is_limit, figure="a") for is_limit in (False, True))
    assert least.reached == "no" and most.reached == "yes"
    assert Row("t", 2.0, figure="a").reached == "" and least.cells[2] == "at least 3 x"


def test_every_row_of_a_figure_is_printed_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(setting: Setting) -> Iterator[Measured]:
        yield Measured("first", 1.5, "x", 1)
        assert '"title": "first"' in capsys.readouterr().out
        yield Measured("second", note="no such key")

    monkeypatch.setitem(FIGURES, "lora", Figure("LoRA", measure))
    assert main(["--rehearse", "--one", "lora", "--folder", str(tmp_path)]) == []
    assert '"note": "no such key"' in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would start")
def test_without_a_gpu_the_large_model_is_refused_and_the_rehearsal_named() -> None:
    with pytest.raises(SystemExit, match="--rehearse"):
        main([])


def test_the_large_shapes_are_those_of_llava_1_5_7b() -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config(tiny=False, image_token_id=32000))

    def count(*parts: torch.nn.Module) -> int:
        return sum(weight.numel() for part in parts for weight in part.parameters())

    assert count(model.model.language_model, model.lm_head) == pytest.approx(6.74e9, rel=1e-3)
    assert count(model.model.vision_tower) == pytest.approx(303.5e6, rel=1e-2)
    assert count(model.model.multi_modal_projector) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096


@pytest.mark.slow
def test_the_peak_of_qlora_is_planned_below_its_limit(tmp_path: Path, fresh_accelerator: None) -> None:
    base = make_base(tmp_path / "base", tiny=False, weights=False)
    four = {"gradient_checkpointing": True, "quantization": {"bits": 4}}
    table = recipe_for(Setting(tmp_path, False, 1), 2, base=base, **four)
    found = planned_alone(table)
    assert 4e9 < found.quantised + found.weights < found.total < 12e9


def test_the_wheels_are_of_what_a_machine_with_torch_lacks(tmp_path: Path) -> None:
    present = names_in(["numpy==2.0", "Pillow >= 3  # a comment", "", "# nothing"])
    assert present == {"numpy", "pillow"}
    found = closure(["transformers", "peft"], {"torch"})
    assert {"transformers", "peft", "tokenizers", "safetensors"} <= set(found)
    assert not {"torch", "sympy", "filelock"} & set(found), "torch brings them along"
    assert "tokenizers" not in closure(["transformers"], {"torch", "tokenizers"})
    assert found["peft"] == sys.modules["importlib.metadata"].version("peft")
