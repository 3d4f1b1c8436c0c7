"""Compiled layers compute what they computed before, in few graphs that take every length."""

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
)

import llava_accel.train as verb
from helpers.decoders import DECODERS
from helpers.kinds import ALL_KINDS
from helpers.runs import mixed_records, recipe, write_records
from helpers.tiny import make_llava as make_folder
from helpers.toys import VOCABULARY, about_one_image, batch_of, gradients, make_llava, talk
from llava_accel.data.trie import Row, build_row, chain
from llava_accel.exceptions import UserError
from llava_accel.kernels import compiled
from llava_accel.kernels.compiled import MOST_GRAPHS, compile_layers, require_compiler
from llava_accel.model.build import load_model
from llava_accel.model.lora import language_model_linears, lora_config, prepare_trainable
from llava_accel.model.memory import enable_checkpointing, lighten_dropout
from llava_accel.model.objective import Objective
from llava_accel.model.processing import load_processing
from llava_accel.recipe import LoraTable, make_recipe
from llava_accel.setup import assembly

# torch.compile itself makes an instance of what is only a namespace.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
TOLERANCE = 1e-5
LENGTHS = (1, 4, 11, 35)
HAS_COMPILER = shutil.which("g++") is not None


class Counting:
    """A backend of torch.compile that runs each graph as it is, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    # torch.compile does not see through the checks of types that tests run with.
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


def deep(lora: LoraTable | None = None, checkpointing: bool | int = False) -> Objective:
    """A LLaVA of five layers, whose adapter, if it has one, is no longer at its start."""
    model = make_llava()
    layers = model.model.language_model.layers
    assert isinstance(layers, nn.ModuleList)
    for _ in range(3):
        layers.insert(1, copy.deepcopy(layers[0]))
    layer: Any
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number  # its place in the cache of keys and values
    text: Any = model.config.text_config
    text.num_hidden_layers = len(layers)
    whole: nn.Module = model
    if lora:
        model.requires_grad_(False)
        model.name_or_path = "toy"
        whole = get_peft_model(model, lora_config(lora, language_model_linears(model), "toy"))
        model.model.multi_modal_projector.requires_grad_(True)
    enable_checkpointing(model, checkpointing)
    lighten_dropout(whole)
    for name, parameter in whole.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return Objective(whole, VOCABULARY).train()


def kinds(length: int) -> list[list[Row]]:
    """Batches of one row and of several, with branches and without."""
    rows = [chain(talk(30 + length + n, 3 + length + n, 3, "ab"[n % 2])) for n in range(3)]
    branches = build_row([*about_one_image(), talk(7, length, 2, "a")])
    return [rows, rows[:1], [branches, *rows], [branches]]


def assert_same(ours: Objective, theirs: Objective, rows: list[Row], tolerance: float = TOLERANCE) -> None:
    found, expected = [], []
    for objective, made in ((ours, found), (theirs, expected)):
        torch.manual_seed(5)
        loss = objective(**batch_of(rows))
        made += [loss.detach(), gradients(objective, loss)]
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 10
    scale = torch.stack([each.norm() for each in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert torch.dist(found[1][name], gradient) <= tolerance * max(gradient.norm(), 1e-3 * scale), name


LORA = LoraTable(rank=4, alpha=8, dropout=0.0)


@pytest.mark.parametrize(
    ("lora", "checkpointing"),
    [
        pytest.param(LORA, 2, id="LoRA, every second layer checkpointed"),
        pytest.param(None, True, id="all weights, checkpointed", marks=pytest.mark.slow),
        # With LLAVA_ACCEL_ALL_KINDS=1: the first has layers that are not checkpointed, too.
        *([pytest.param(LORA, False, id="LoRA", marks=pytest.mark.slow)] if ALL_KINDS else []),
    ],
)
def test_every_length_of_every_kind_takes_four_graphs(lora: LoraTable | None, checkpointing: bool | int) -> None:
    """A break would be one more for each of them."""
    ours, theirs, counting = deep(lora, checkpointing), deep(lora, checkpointing), Counting()
    names = list(ours.state_dict())
    compile_layers(ours.llava.model.language_model, counting)
    assert list(ours.state_dict()) == names
    for length in LENGTHS:
        for rows in kinds(length):
            assert_same(ours, theirs, rows)
    assert counting.graphs == MOST_GRAPHS


@pytest.mark.slow
def test_a_first_layer_without_a_gradient_is_one_more_of_each_kind() -> None:
    ours, theirs, counting = deep(LORA), deep(LORA), Counting()
    for objective in (ours, theirs):
        objective.llava.model.multi_modal_projector.requires_grad_(False)
    compile_layers(ours.llava.model.language_model, counting)
    two = (0, 3)  # without a mask and with one, of several rows and of one
    for length in LENGTHS[:2]:
        for number in two:
            assert_same(ours, theirs, kinds(length)[number])
    assert counting.graphs == 2 * len(two)


def test_making_a_graph_draws_no_random_numbers_of_the_run() -> None:
    """A run that goes on makes its graphs at other steps than it did at first."""
    objective, losses = deep(LORA.model_copy(update={"dropout": 0.5}), True), []
    compile_layers(objective.llava.model.language_model, Counting())
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(objective(**batch_of(kinds(4)[0])).item())
    assert losses[0] == losses[1]
    torch.manual_seed(2)
    assert objective(**batch_of(kinds(4)[0])).item() != losses[0], "nothing is dropped"


@pytest.mark.slow
@pytest.mark.parametrize(("config_class", "model_class"), DECODERS)
def test_every_decoder_is_compiled(config_class: type[PreTrainedConfig], model_class: type[nn.Module]) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = model_class(config_class(**sizes))
    counting, ids = Counting(), torch.arange(20).reshape(2, 10)
    inputs = {"input_ids": ids, "position_ids": torch.arange(10).repeat(2, 1), "use_cache": False}
    expected = model(**inputs).last_hidden_state
    compile_layers(model, counting)
    assert torch.dist(model(**inputs).last_hidden_state, expected) <= TOLERANCE
    assert counting.graphs == 1


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # dynamo does so, for bitsandbytes
def test_4_bit_weights_take_as_many_graphs(tmp_path: Path) -> None:
    tables = {
        "run": {"name": "t"}, "data": {"train": "x.json"},
        "model": {
            "base": str(make_folder(tmp_path)), "quantization": {"bits": 4}, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}
        },
    }  # fmt: skip
    settings, counting, made = make_recipe(tables), Counting(), []
    for backend in (None, counting):
        loaded = load_model(
            settings, load_processing(settings.model, "pad"), dtype=torch.float32, device=torch.device("cpu")
        )
        torch.manual_seed(0)
        prepare_trainable(loaded.model, settings)
        decoder = loaded.model.model.language_model
        if backend:
            compile_layers(decoder, backend)
        outputs = []
        for rows, seq in ((2, 7), (1, 5), (3, 40)):
            torch.manual_seed(seq)
            embeds = torch.randn(rows, seq, decoder.get_input_embeddings().weight.shape[1], requires_grad=True)
            places = torch.arange(seq).repeat(rows, 1)
            made_of = decoder(inputs_embeds=embeds, position_ids=places, use_cache=False).last_hidden_state
            made_of.square().sum().backward()
            assert embeds.grad is not None
            outputs.append(embeds.grad)
        made.append(outputs)
    for one, other in zip(*made, strict=True):
        assert torch.dist(one, other) <= TOLERANCE * one.norm()
    assert counting.graphs == 2


def test_evaluation_and_generation_compile_nothing() -> None:
    ours, theirs, counting = deep().eval(), deep().eval(), Counting()
    compile_layers(ours.llava.model.language_model, counting)
    rows, made = batch_of(kinds(4)[2]), []
    for objective in (ours, theirs):
        llava: Any = objective.llava
        with torch.no_grad():
            loss = objective(**rows)
        made.append((loss, llava.generate(inputs=torch.tensor([[1, 5, 9, 4]]), max_new_tokens=5, do_sample=False)))
    assert torch.allclose(made[0][0], made[1][0], rtol=1e-5) and torch.equal(made[0][1], made[1][1])
    assert counting.graphs == 0


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler")
def test_compiled_code_gives_the_same_losses_and_gradients() -> None:
    """What g++ makes of the layers for rows with a mask, within 1e-5 in fp32.

    Each graph takes a quarter of a minute: test_backends_cases.py has one without a mask.
    """
    ours, theirs = deep(LORA, True), deep(LORA, True)
    compile_layers(ours.llava.model.language_model)
    for length in LENGTHS:
        assert_same(ours, theirs, kinds(length)[2])


@pytest.mark.slow
def test_what_a_graph_is_first_made_for_is_the_same_whatever_comes_first() -> None:
    """A run that goes on begins with other lengths than it began with, and its code must be the same."""
    shapes = []
    for first in (LENGTHS[0], LENGTHS[-1]):
        torch.compiler.reset()
        seen: list[list[tuple[Any, ...]]] = []

        def note(graph: torch.fx.GraphModule, inputs: Sequence[Any], seen: list[Any] = seen) -> Callable[..., Any]:
            places = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
            hints: Any = [place.shape for place in places if isinstance(place, Tensor)]
            seen.append([tuple(getattr(getattr(size, "node", None), "hint", size) for size in each) for each in hints])
            return graph.forward

        objective = deep(LORA)
        compile_layers(objective.llava.model.language_model, note)
        for number in (0, 3):  # without a mask and with one, of several rows and of one
            objective(**batch_of(kinds(first)[number])).backward()
        shapes.append(seen)
    assert shapes[0] == shapes[1] and len(shapes[0]) == 2


def test_a_run_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(assembly, "load_model", None)
    with pytest.raises(UserError, match=r"model\.compile: "):
        verb.train(recipe(tmp_path, write_records(tmp_path / "data.json", mixed_records(4)), model={"compile": True}))


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"model\.compile: .*g\+\+.*apt-get install.*model\.compile = false"):
        require_compiler(torch.device("cpu"))


def test_a_compiler_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compile_nothing(*_: object, **__: object) -> Callable[..., Any]:
        raise RuntimeError("Python.h: no such file\nand more")

    monkeypatch.setattr(compiled.torch, "compile", compile_nothing)
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    with pytest.raises(UserError, match=r"model\.compile: .*\(Python\.h: no such file\)"):
        require_compiler(torch.device("cpu"))
