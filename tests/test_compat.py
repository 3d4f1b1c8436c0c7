"""torch and transformers keep what `compat.py` reads in them; and no other file reads anything of that kind."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from contracts import contract
from llava_accel import compat

PACKAGE = Path(compat.__file__).parent
TESTS = Path(__file__).parent
FUNCTIONS = [node for node in ast.parse(Path(compat.__file__).read_text()).body if isinstance(node, ast.FunctionDef)]
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(1, 11)[None]


def language_model(kernel: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, initializer_range=0.2, pad_token_id=0, attn_implementation=kernel, **SIZES)  # pyright: ignore
    return LlamaForCausalLM(config)


DOCUMENTED = {
    "accelerate", "accelerate.optimizer", "accelerate.scheduler", "accelerate.tracking", "accelerate.utils",
    "bitsandbytes", "deepspeed", "deepspeed.utils", "peft", "peft.tuners.tuners_utils",
    "torch", "torch.autograd.graph", "torch.distributed",
    "torch.distributed.device_mesh", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.nn.attention.flex_attention", "torch.nn.functional", "torch.nn.parallel", "torch.optim.lr_scheduler",
    "torch.distributed.elastic.multiprocessing.errors", "torch.utils.benchmark",
    "torch.profiler", "torch.utils.checkpoint", "torch.utils.data",
    "transformers", "transformers.generation.streamers", "transformers.utils.import_utils",
    "transformers.utils.logging",
}  # fmt: skip
"""Modules of the six libraries from which the package takes what their references name."""
LIBRARIES = {name.partition(".")[0] for name in DOCUMENTED}
UNDOCUMENTED = {
    "backend_tokenizer", "ds_id", "ds_shape", "ds_tensor", "fp32_partitioned_groups_flat", "init_kwargs",
    "kineto_results", "log_with", "native_dropout", "pre_layrnorm", "quant_state", "single_partition_of_fp32_groups",
    "support_avx512bf16_for_cpu",
}  # fmt: skip
"""Names without an underscore that no reference explains."""
PYTHONS_OWN = {
    "_exit", "_replace", "__bases__", "__class__", "__doc__", "__enter__", "__exit__", "__file__", "__getitem__", "__init__",
    "__module__", "__name__", "__stdout__", "__traceback__",
}  # fmt: skip
ALLOWED = {
    # It shows that an export loads without this package, so it may import nothing of it.
    "release/plain_inference.py": {"support_avx512bf16_for_cpu"},
    # The classes whose forward pass is ours; tests/kernels/test_decoder.py compares each of them with its own.
    "kernels/decoder.py": {
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")),
        "transformers.modeling_utils",
    },
    # The layers whose form `LastLayer` repeats; tests/model/test_last_layer.py compares it with each of them.
    "model/last_layer.py": {
        f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "qwen3")
    },
    # The norm that transformers itself knew as one when LLaVA's code was written; tests/loop/test_optimizer.py compares the
    # groups that come of it with those of that code.
    "loop/optimizer.py": {"transformers.models.llama.modeling_llama"},
    # What `accelerate launch` itself runs; tests/test_start.py starts, ends and interrupts processes through it.
    "runtime/launcher.py": {"accelerate.commands.launch", "accelerate.commands.config"},
}


def reaches(path: Path) -> set[str]:
    """What a file touches of others' private or undocumented parts."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names, modules = [], []
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names = [
                each.value for each in node.args[1:2] if isinstance(each, ast.Constant) and isinstance(each.value, str)
            ]
        elif isinstance(node, ast.Import):
            modules = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("llava_accel", "__future__")):
            names, modules = [each.name for each in node.names], [node.module or ""]
        names += [part for module in modules for part in module.split(".")]
        found |= {name for name in names if name in UNDOCUMENTED or (name.startswith("_") and name not in PYTHONS_OWN)}
        found |= {module for module in modules if module.split(".")[0] in LIBRARIES and module not in DOCUMENTED}
    return found


def test_only_compat_touches_private_or_undocumented_parts_of_a_library() -> None:
    touched = {str(path.relative_to(PACKAGE)): reaches(path) for path in sorted(PACKAGE.rglob("*.py"))}
    assert len(touched.pop("compat.py")) > 20
    assert {path: names for path, names in touched.items() if names} == ALLOWED


def test_every_reach_has_a_contract_and_says_where_it_was_read_and_why() -> None:
    text = "".join(path.read_text() for path in TESTS.glob("test_compat*.py"))
    assert re.findall(r"^@contract\(compat\.(\w+)\)$", text, re.MULTILINE) == [function.name for function in FUNCTIONS]
    for function in FUNCTIONS:
        _, _, place = (ast.get_docstring(function) or "").partition("\n\n")
        assert re.match(r"Read in \w+ \d+\.\d+, [\w/]+.*`.*\. \S", place, re.DOTALL), function.name


def test_a_broken_contract_says_what_broke_and_where_to_look() -> None:
    @contract(compat.count_up)
    def broken() -> None:
        raise AttributeError("no such store")

    with pytest.raises(AssertionError) as raised:
        broken()
    words = ("torch 2", "compat.count_up: Add 1", "AttributeError: no such store", "distributed_c10d.py")
    assert all(word in str(raised.value) for word in words)


def test_compat_alone_imports_no_library() -> None:
    code = f"import sys, llava_accel.compat; assert not {LIBRARIES!r} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


# torch


@contract(compat.count_up)
def test_ranks_share_a_number(one_rank: None) -> None:
    assert [compat.count_up("a"), compat.count_up("a"), compat.count_up("b")] == [1, 2, 1]


@contract(compat.end_of_worker)
def test_the_end_of_a_worker_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        list(DataLoader(_Killing(), num_workers=1))  # pyright: ignore[reportArgumentType]
    assert str(compat.end_of_worker(caught.value)).startswith(("was killed by signal: Killed", "exited unexpectedly"))
    full = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    assert compat.end_of_worker(full) == "was unable to allocate shared memory"
    assert compat.end_of_worker(RuntimeError("DataLoader worker")) is None
    assert compat.end_of_worker(ValueError(str(caught.value))) is None


class _Killing(list[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: object) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@contract(compat.uncompiled)
def test_an_import_may_leave_functions_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: int) -> int:
        return 2 * x

    assert torch.compile(twice) is not twice
    monkeypatch.setattr(os, "environ", compat.uncompiled())
    assert torch.compile(twice) is twice


@contract(compat.ddp_bucket_bytes)
def test_ddp_tells_the_size_of_its_buckets(one_rank: None) -> None:
    layer = nn.Linear(8, 4, bias=False)
    assert compat.ddp_bucket_bytes(DistributedDataParallel(layer)) == 4 * 8 * 4
    assert compat.ddp_bucket_bytes(layer) == 0


@contract(compat.make_fsdp_root)
def test_a_layer_may_run_before_the_root_of_fsdp2_does(one_rank: None) -> None:
    # On two ranks: test_backends.py::test_evaluations_and_answers_are_those_of_one_process.
    model, mesh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), init_device_mesh("cpu", (1,))
    root: Any = fully_shard(model, mesh=mesh) if fully_shard(model[0], mesh=mesh) is model[0] else None
    compat.make_fsdp_root(root)
    assert model(model[0](torch.ones(1, 4))).shape == (1, 4)


@contract(compat.fake_tensors)
def test_fake_weights_take_no_memory_and_are_on_the_cpu() -> None:
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6, bias=False)  # 4 TB
    with compat.fake_tensors(model):
        out = model(torch.empty(3, 10**6))
        out.sum().backward()
    assert out.shape == (3, 10**6) and out.device.type == model.weight.device.type == "cpu"


@contract(compat.watch_operations)
def test_every_operation_is_seen_those_of_the_backward_pass_too() -> None:
    seen: list[tuple[list[Tensor], Tensor | None]] = []
    weight, inputs = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
    with compat.watch_operations(lambda made, cast: seen.append((made, cast))):
        loss = (inputs @ weight.t()).sum()
        forward = len(seen)
        loss.backward()
        weight.detach().bfloat16()
    shapes = [tuple(tensor.shape) for made, _ in seen for tensor in made]
    assert (4, 2) in shapes and any(shape in ((2, 3), (3, 2)) for shape in shapes[forward:])
    casts = [(made[0].dtype, cast.dtype) for made, cast in seen if cast is not None]
    assert casts == [(torch.bfloat16, torch.float32)]


@contract(compat.allocations)
def test_what_is_taken_and_given_back_is_told_in_its_order() -> None:
    def work() -> None:
        first = torch.empty(1000)
        del first
        torch.empty(3000)

    assert [size for size in compat.allocations(work) if abs(size) >= 4000] == [4000, -4000, 12000, -12000]


@contract(compat.silu_gradient)
def test_the_gradient_of_silu_is_that_of_autograd() -> None:
    inputs, gradient = torch.linspace(-4, 4, 50).requires_grad_(), torch.linspace(1, 2, 50)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(inputs), inputs, gradient)
    torch.testing.assert_close(compat.silu_gradient(gradient, inputs.detach()), expected)


# transformers


@contract(compat.attention_kernel)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_config_tells_the_kernel_of_its_model(kernel: str) -> None:
    assert compat.attention_kernel(language_model(kernel).config) == kernel


@contract(compat.set_attention_kernel)
def test_a_model_takes_the_kernel_that_its_config_is_given() -> None:
    class Taken(Exception):
        pass

    def taken(*_: Any, **__: Any) -> Any:
        raise Taken

    AttentionInterface.register("test_compat", taken)
    model = language_model()
    model(IDS)
    compat.set_attention_kernel(model.model.config, "test_compat")
    with pytest.raises(Taken):
        model(IDS)


@contract(compat.one_sequence_a_row)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_is_causal_without_a_look_at_any_value(kernel: str) -> None:
    model = language_model().eval()
    compat.set_attention_kernel(model.config, kernel)
    expected = model(IDS).logits
    again = torch.zeros_like(IDS)  # positions that begin again would be other sequences
    assert not torch.allclose(model(IDS, position_ids=again, use_cache=False).logits, expected, atol=1e-4)
    with compat.one_sequence_a_row():
        places = torch.arange(IDS.shape[1])[None].expand_as(IDS)
        assert torch.equal(model(IDS, position_ids=places, use_cache=False).logits, expected)
    with torch.device("meta"):
        shapes = language_model().eval()
    compat.set_attention_kernel(shapes.config, kernel)
    with compat.fake_tensors(shapes), compat.one_sequence_a_row():
        places = torch.empty(1, 10, dtype=torch.int64)
        found = shapes(input_ids=places, position_ids=places, use_cache=False).logits
        assert found.shape[1:] == (10, expected.shape[2])


@contract(compat.checkpoint_layer)
def test_one_layer_alone_is_computed_again() -> None:
    calls: list[str] = []

    def counted(function: Any, *arguments: Any) -> Any:
        calls.append("layer")
        return checkpoint(function, *arguments, use_reentrant=False)

    gradients = []
    for is_checkpointed in (False, True):
        model = language_model().train()
        if is_checkpointed:
            compat.checkpoint_layer(model.model.layers[0], counted)
        model(IDS, use_cache=False).logits.sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert calls == ["layer"] and torch.equal(*gradients)


@contract(compat.load_model)
def test_a_model_is_loaded_from_slices_of_a_file(tmp_path: Path) -> None:
    model = language_model()
    save_file(model.state_dict(), tmp_path / "weights")
    with safe_open(tmp_path / "weights", framework="pt") as file:
        state = {name: file.get_slice(name) for name in file.keys()}
        found = compat.load_model(LlamaForCausalLM, model.config, state, dtype=torch.float32)
        with pytest.raises(AssertionError, match="norm"):
            compat.load_model(
                LlamaForCausalLM, model.config, {n: s for n, s in state.items() if "norm" not in n}, dtype=torch.float32
            )
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


@contract(compat.new_projector)
def test_a_new_projector_is_that_of_a_llava() -> None:
    config = LlavaConfig(vision_config=CLIPVisionConfig(**SIZES), text_config=LlamaConfig(vocab_size=64, **SIZES))
    with torch.device("meta"):
        whole = LlavaForConditionalGeneration(config).model.multi_modal_projector.state_dict()
    alone = compat.new_projector(config).state_dict()
    assert {name: tensor.shape for name, tensor in alone.items()} == {n: tensor.shape for n, tensor in whole.items()}
    # PyTorch's own initial weights are even up to 1 / sqrt(inputs), transformers' are normal.
    assert 0.9 / 32**0.5 < float(alone["linear_1.weight"].abs().max()) <= 1 / 32**0.5


@contract(compat.tower_states)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_tower_up_to_a_layer_is_the_tower_there(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14, "initializer_range": 0.2}
    is_clip = kind == "clip"
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes)) if is_clip else SiglipVisionModel(SiglipVisionConfig(**sizes))
    pixels = torch.randn(2, 3, 28, 28)
    states = tower.eval()(pixels, output_hidden_states=True).hidden_states
    for layer in (1, 2):
        assert torch.equal(compat.tower_states(tower, pixels, layer), states[layer])


@contract(compat.tokenizer_backend)
def test_a_tokenizer_is_described_with_the_keys_that_its_encoder_changes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    from helpers.tiny import make_tokenizer

    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<x>"])
    spec = json.loads(compat.tokenizer_backend(tokenizer).to_str())
    assert {"model", "normalizer", "pre_tokenizer", "added_tokens", "truncation", "padding"} <= spec.keys()
    assert {"type", "vocab"} <= spec["model"].keys() and {"type", "prepend_scheme"} <= spec["pre_tokenizer"].keys()
    keys = {"id", "content", "special", "lstrip", "rstrip", "single_word"}
    assert all(keys <= token.keys() for token in spec["added_tokens"]) and spec["added_tokens"][-1]["content"] == "<x>"
    spec["pre_tokenizer"]["prepend_scheme"], spec["added_tokens"][-1]["special"] = "never", True
    changed = Tokenizer.from_str(json.dumps(spec))
    changed.encode_special_tokens = True
    assert not changed.encode("red", add_special_tokens=False).tokens[0].startswith("▁")
    assert "<x>" not in changed.encode("a<x>", add_special_tokens=False).tokens


@contract(compat.replace_tokenizer)
def test_a_tokenizer_can_be_made_of_another_description(tmp_path: Path) -> None:
    from helpers.tiny import make_tokenizer

    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<x>"], special_tokens=True)
    spec = json.loads(compat.tokenizer_backend(tokenizer).to_str())
    spec["added_tokens"][-1]["special"], spec["model"]["merges"] = False, []
    compat.replace_tokenizer(tokenizer, json.dumps(spec))
    ids = tokenizer("red<x>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "r", "e", "d", "<x>"]
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).endswith("<x>")


@contract(compat.forget_deepspeed)
def test_transformers_forgets_deepspeed() -> None:
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled  # pyright: ignore

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    compat.forget_deepspeed()
    assert not is_deepspeed_zero3_enabled() and config.is_zero3()
