"""A linear map that repeats features: its output, its weight as others see it, and its gradient."""

from __future__ import annotations

import torch
from torch import nn

from compress.layers.repeated import RepeatedLinear

PIECES = ((0, 4), (2, 4), (4, 6), (2, 4))


def test_it_is_the_map_of_its_repeated_rows():
    torch.manual_seed(0)
    layer, x = RepeatedLinear(nn.Linear(5, 6), PIECES), torch.randn(2, 3, 5)
    rows = [0, 1, 2, 3, 2, 3, 4, 5, 2, 3]
    assert torch.equal(layer.weight, layer.distinct.weight[rows])
    assert torch.equal(layer.bias, layer.distinct.bias[rows])
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_without_bias_and_with_gradients():
    torch.manual_seed(0)
    layer = RepeatedLinear(nn.Linear(5, 6, bias=False), PIECES)
    assert layer.bias is None
    layer(torch.ones(1, 5)).sum().backward()
    assert torch.equal(layer.distinct.weight.grad[:, 0], torch.tensor([1.0, 1, 3, 3, 1, 1]))
