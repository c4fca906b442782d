"""Quantized layers against a reference in numpy, and under export and training."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.layers.quantized import (
    Activation,
    QuantizedConv2d,
    QuantizedLinear,
    is_quantized,
    lowered,
    quantizable,
    quantized,
    swap,
)

LOW, HIGH = -1.5, 2.5


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def rounded(values: np.ndarray, scheme: str) -> tuple[np.ndarray, float]:
    """The reference for an activation, in float64, with its scale."""
    if scheme == "asymmetric":
        scale = (HIGH - LOW) / 255
        zero_point, lowest, highest = round(-LOW / scale), 0, 255
    else:
        scale, zero_point, lowest, highest = HIGH / 127, 0, -127, 127
    integers = np.clip(np.rint(values / scale) + zero_point, lowest, highest)
    return (integers - zero_point) * scale, scale


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_activation_agrees_with_the_reference(x, scheme):
    expected, scale = rounded(x.double().numpy(), scheme)
    found = Activation(LOW, HIGH, scheme)(x).numpy()
    assert np.abs(found - expected).max() <= scale * 1.001
    assert (np.abs(found - expected) > scale / 2).mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_activation_keeps_dtype_and_shape(x, dtype):
    found = Activation(LOW, HIGH)(x.to(dtype))
    assert (found.dtype, found.shape) == (dtype, x.shape)


def test_activation_passes_gradients_straight_through(x):
    x.requires_grad_()
    layer = Activation(LOW, HIGH)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    torch.testing.assert_close(layer(x), layer(x.detach()))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_linear_agrees_with_the_reference(x, kind):
    torch.manual_seed(0)
    linear = nn.Linear(16, 6) if kind is nn.Linear else Conv1D(6, 16)
    nn.init.normal_(linear.bias)
    layer = quantized(linear, Activation(LOW, HIGH))
    weight = (linear.weight if kind is nn.Linear else linear.weight.T).detach().double().numpy()
    scale = np.abs(weight).max(1) / 127
    integers = np.clip(np.rint(weight / scale[:, None]), -127, 127)
    assert (layer.integers.numpy() == integers).all()
    activations, step = rounded(x.double().numpy(), "asymmetric")
    expected = activations @ (integers * scale[:, None]).T + linear.bias.detach().numpy()
    largest_row = np.abs(weight).sum(1).max()
    assert np.abs(layer(x).detach().numpy() - expected).max() <= step * largest_row
    assert (layer.integers.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect", "bias": False},
        {"groups": 2, "padding": (0, 1)},
    ],
)
def test_conv_is_the_convolution_of_the_rounded_operands(settings):
    torch.manual_seed(0)
    conv, image = nn.Conv2d(16, 8, 3, **settings), torch.randn(2, 16, 9, 9)
    layer = quantized(conv, Activation(LOW, HIGH))
    assert isinstance(layer, QuantizedConv2d)
    reference = copy.deepcopy(conv)
    reference.weight.data = layer.dequantized(torch.float32)
    torch.testing.assert_close(layer(image), reference(Activation(LOW, HIGH)(image)))
    assert (layer.dequantized(torch.float32) - conv.weight).abs().max() <= layer.weight_scale.max() / 2


def test_what_has_a_quantized_form():
    class Noisy(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    class Named(nn.Linear):
        pass

    assert all(map(quantizable, (nn.Linear(2, 2), Named(2, 2), Conv1D(2, 2), nn.Conv2d(1, 1, 1))))
    assert not any(map(quantizable, (Noisy(2, 2), nn.Conv1d(1, 1, 1), nn.Embedding(2, 2), nn.LayerNorm(2))))


def test_swap_finds_a_shared_layer_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared))
    new = quantized(shared, Activation(LOW, HIGH))
    swap(model, {shared: new})
    assert model[0] is model[2] is model[3][0] is new


def test_lowered_sets_the_scheme_and_puts_it_back():
    model = nn.Sequential(QuantizedLinear(nn.Linear(4, 4, bias=False), Activation(LOW, HIGH)))
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(RuntimeError, match="stop"), lowered(model, "symmetric"):
        assert model[0].input.grid().lowest == -127
        assert not torch.equal(model(x), before)
        raise RuntimeError("stop")
    assert model[0].input.grid().lowest == 0
    assert torch.equal(model(x), before)
    assert is_quantized(model)
    assert not is_quantized(nn.Linear(2, 2))


@pytest.mark.parametrize("grad", [True, False])
def test_export_holds_the_operators_and_nothing_else(x, grad):
    model = nn.Sequential(nn.LayerNorm(16), quantized(nn.Linear(16, 8), Activation(LOW, HIGH))).eval()
    dynamic = torch.export.Dim.DYNAMIC
    with torch.set_grad_enabled(grad):
        shapes = ({0: dynamic, 1: dynamic},)
        program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).run_decompositions({})
    names = Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    assert names["quantized_decomposed.quantize_per_tensor.default"] == 1
    assert names["quantized_decomposed.dequantize_per_tensor.default"] == 1
    assert names["quantized_decomposed.dequantize_per_channel.default"] == 1
    assert not any("detach" in name or "sub" in name for name in names)
    other = torch.randn(7, 2, 16)
    torch.testing.assert_close(program.module()(other), model(other))


def test_a_quantized_layer_lets_what_is_before_it_train(x):
    model = nn.Sequential(nn.Linear(16, 16), quantized(nn.Linear(16, 1), Activation(-3.0, 3.0)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (model(x).squeeze(-1) - x.mean(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert model[1].integers.dtype == torch.int8
