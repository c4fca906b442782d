"""Layers whose zeros stay zeros when they train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.layers.linear import ScaledLinear, Scaling, is_conv, is_linear, matrix
from compress.layers.quantized import Activation, quantizable, quantized
from compress.layers.sparse import is_sparse, sparse

IN, OUT = 8, 6
LAYERS = {
    "linear": (lambda: nn.Linear(IN, OUT), (3, 5, IN)),
    "no bias": (lambda: nn.Linear(IN, OUT, bias=False), (3, 5, IN)),
    "Conv1D": (lambda: Conv1D(OUT, IN), (3, 5, IN)),
    "conv": (lambda: nn.Conv2d(IN, OUT, 3, stride=2, padding=1), (2, IN, 7, 7)),
    "reflected": (lambda: nn.Conv2d(IN, OUT, 3, padding=1, padding_mode="reflect"), (2, IN, 7, 7)),
}


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A dense layer with zeros in its weight, its sparse form with the same parameters, and an input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    dense = make()
    dense.weight.data *= torch.rand(dense.weight.shape) > 0.5
    return dense, sparse(dense), torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_it_gives_what_the_dense_layer_gives(name: str) -> None:
    dense, layer, x = made(name)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert torch.equal(layer(x), dense(x))
    with torch.no_grad():
        assert torch.equal(layer(x), dense(x))
    assert str(layer).removeprefix("Sparse") == str(dense)
    assert (is_linear(layer), is_conv(layer)) == (is_linear(dense), is_conv(dense))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", LAYERS)
def test_zeros_stay_while_the_rest_trains(name: str, decay: float) -> None:
    _, layer, x = made(name)
    zeros, before = layer.weight == 0, layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=decay)
    for _ in range(5):
        layer(x).square().sum().backward()
        assert not layer.weight.grad[zeros].any()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(layer.weight == 0, zeros)
    assert (layer.weight != before)[~zeros].all()


@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_graph_holds_no_mask(name: str) -> None:
    dense, layer, x = made(name)
    ops = [
        [node.target for node in torch.export.export(one, (x,)).graph.nodes if node.op == "call_function"]
        for one in (dense, layer)
    ]
    assert ops[0] == ops[1]


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_quantized_with_its_zeros(name: str) -> None:
    _, layer, _ = made(name)
    assert quantizable(layer)
    integers = quantized(layer, Activation(-3.0, 3.0)).integers
    weight = layer.weight if is_conv(layer) else matrix(layer)
    assert not integers[weight == 0].any()


def test_a_sparse_layer_is_its_own_sparse_form_and_is_copied_as_one() -> None:
    _, layer, x = made("linear")
    assert sparse(layer) is layer
    twin = copy.deepcopy(layer)
    assert is_sparse(twin)
    assert torch.equal(twin(x), layer(x))
    assert not is_sparse(nn.Linear(2, 2))
    assert not sparse(nn.Linear(2, 2).eval()).training


def test_one_that_multiplies_its_input_keeps_its_zeros_if_it_is_told_to() -> None:
    dense, _, x = made("linear")
    zeros = dense.weight == 0
    for told in (False, True):
        layer = ScaledLinear(dense.weight, None, Scaling(torch.full((IN,), 2.0)), told)
        layer(x).square().sum().backward()
        assert bool(layer.weight.grad[zeros].any()) is not told
