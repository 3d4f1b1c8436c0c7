"""liger-kernel's kernels take the place of a decoder's own, under the same names; where they cannot, a run is refused.

That they compute the same is tested in test_liger_kernels.py, where the packages are installed.
"""

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, LlamaModel, PreTrainedConfig
from transformers.models.llama import modeling_llama

import llava_accel.train as verb
from helpers.decoders import DECODERS
from helpers.runs import recipe
from llava_accel.exceptions import UserError
from llava_accel.kernels import liger
from llava_accel.kernels.decoder import LightNorm, lighten_decoder
from llava_accel.kernels.liger import liger_problem, require_liger_decoder, use_liger
from llava_accel.loop.machine import check_machine
from llava_accel.setup import assembly

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CALLS: list[str] = []


class Functions(ModuleType):
    """What liger-kernel 0.8 says of its functions, in PyTorch."""

    def liger_rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        CALLS.append("rope")
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    def liger_swiglu(self, a: Tensor, b: Tensor) -> Tensor:
        CALLS.append("swiglu")
        return F.silu(a) * b

    def liger_rms_norm(self, X: Tensor, W: Tensor, eps: float) -> Tensor:
        CALLS.append("norm")
        return F.rms_norm(X, W.shape, W, eps)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", Functions("functional"))


def numbers(model: nn.Module) -> dict[str, Tensor]:
    hidden = model(input_ids=torch.arange(14).reshape(2, 7), use_cache=False).last_hidden_state
    hidden.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"": hidden.detach()}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("config", "model"), DECODERS)
def test_every_norm_rotation_and_mlp_is_ligers_under_the_same_names(
    config: type[PreTrainedConfig], model: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    made = config(**SIZES)
    require_liger_decoder(made)
    plain = model(made)
    ours = copy.deepcopy(plain)
    lighten_decoder(ours)
    use_liger(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    wanted, found = numbers(plain), numbers(ours)
    norms = sum(isinstance(module, LightNorm) for module in ours.modules())
    assert CALLS.count("norm") == norms >= 5 and CALLS.count("rope") == CALLS.count("swiglu") == 2
    for name, value in wanted.items():
        assert torch.dist(found[name], value) <= 1e-5 * value.norm(), name


@pytest.mark.usefixtures("installed")
def test_other_models_and_the_library_stay_as_they_are() -> None:
    before = (F.cross_entropy, modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb)
    other, ours = LlamaModel(LlamaConfig(**SIZES)), LlamaModel(LlamaConfig(**SIZES))
    for model in (other, ours):
        lighten_decoder(model)
    use_liger(ours)
    numbers(other)
    assert CALLS == []
    assert before == (F.cross_entropy, modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb)


@pytest.mark.usefixtures("installed", "fresh_accelerator")
def test_a_run_trains_with_it_where_it_can_and_can_be_evaluated_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(tmp_path, model={"kernels": "liger"}, train={"max_steps": 1})
    monkeypatch.setattr(verb, "check_machine", lambda *_: None)
    verb.train(wanted)
    assert CALLS == [], "the CPU has no Triton"
    monkeypatch.setattr(assembly, "liger_problem", lambda device: "")
    verb.train(wanted.model_copy(update={"run": wanted.run.model_copy(update={"resume": "never"})}))
    assert {"norm", "rope", "swiglu"} == set(CALLS)


def test_a_run_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'model\.kernels = "liger" needs a GPU.*set model\.kernels = "native"'):
        check_machine(recipe(tmp_path, model={"kernels": "liger"}), torch.device("cpu"))


def test_compiled_layers_beside_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'Set model\.compile = false, or model\.kernels = "native"'):
        recipe(tmp_path, model={"kernels": "liger", "compile": True})


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None if name == "triton" else object())
    assert "the package triton, which" in (said := liger_problem(torch.device("cuda")))
    assert "llava-accel[kernels]" in said
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    assert liger_problem(torch.device("cuda")) == ""


@pytest.mark.parametrize("config", [GemmaConfig(), LlamaConfig(hidden_act="gelu")])
def test_another_decoder_is_refused_before_a_weight_is_read(config: PreTrainedConfig) -> None:
    with pytest.raises(UserError, match=r"one is (gemma|llama with gelu).*Choose another base, or set model\.kernels"):
        require_liger_decoder(config)
