"""The last layer reads at some positions what the layer that it took the place of computes everywhere."""

import pytest
import torch
from torch import nn

from helpers.decoders import DECODERS
from llava_accel.model.last_layer import LastLayer, read_at_positions

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
READ = torch.tensor([3, 7, 8])


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    config, model = request.param
    torch.manual_seed(0)
    return model(config(**SIZES)).eval().double()


def gradients(model: nn.Module, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    hidden.square().sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def test_output_and_gradients_are_those_of_the_whole_layer(decoder: nn.Module) -> None:
    ids = torch.arange(10).reshape(2, 5)
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
    expected, wanted = whole.flatten(0, 1)[READ], gradients(decoder, whole.flatten(0, 1)[READ])
    names = list(decoder.state_dict())
    read_at_positions(decoder)
    assert isinstance(decoder.layers, nn.ModuleList) and isinstance(decoder.layers[-1], LastLayer)
    assert list(decoder.state_dict()) == names
    read = decoder(input_ids=ids, use_cache=False, read_positions=READ).last_hidden_state
    torch.testing.assert_close(read[0], expected, rtol=0, atol=1e-12)
    found = gradients(decoder, read)
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(decoder(input_ids=ids, use_cache=False).last_hidden_state, whole, rtol=0, atol=1e-12)
    assert torch.equal(
        decoder(input_ids=ids, use_cache=True).last_hidden_state, decoder(input_ids=ids).last_hidden_state
    )


def test_a_layer_of_another_form_stays_as_it_is() -> None:
    language_model = nn.Module()
    language_model.layers = nn.ModuleList([nn.Linear(2, 2)])
    read_at_positions(language_model)
    assert type(language_model.layers[-1]) is nn.Linear
