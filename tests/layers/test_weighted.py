"""One kind of weight for every layer: read as (groups, out, in, taps), and written back where it belongs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from compress.layers.weighted import add_bias, fits, matrices, outputs, unwritable, write

IN, OUT = 4, 6
IMAGE = (2, IN, 5, 5)

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), (2, 3, IN), (1, OUT, IN, 1)),
    "Conv1D": (lambda: Conv1D(OUT, IN), (2, 3, IN), (1, OUT, IN, 1)),
    "conv1d": (lambda: nn.Conv1d(IN, OUT, 3), (2, IN, 5), (1, OUT, IN, 3)),
    "conv2d": (lambda: nn.Conv2d(IN, OUT, (2, 3)), IMAGE, (1, OUT, IN, 6)),
    "groups": (lambda: nn.Conv2d(IN, OUT, 2, groups=2), IMAGE, (2, 3, 2, 4)),
    "depthwise": (lambda: nn.Conv2d(IN, IN, 3, groups=IN), IMAGE, (IN, 1, 1, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(IN, OUT, 3, stride=2), IMAGE, (1, OUT, IN, 9)),
    "transposed groups": (lambda: nn.ConvTranspose2d(IN, OUT, 2, groups=2), IMAGE, (2, 3, 2, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(IN), IMAGE, (IN, 1, 1, 1)),
}


def run(layer: nn.Module, x: Tensor) -> Tensor:
    """The output with its features last."""
    made = layer.double().eval()(x)
    return made if isinstance(layer, nn.Linear | Conv1D) else made.movedim(1, -1)


def biased(layer: nn.Module) -> Tensor:
    """The bias of `layer`, set to random numbers."""
    bias = layer.get_parameter("bias")
    bias.data.normal_()
    return bias.detach().double()


@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_of_each_layout_takes_a_scale_of_its_outputs(name: str) -> None:
    torch.manual_seed(0)
    make, sizes, stacked = LAYERS[name]
    layer, x = make().double(), torch.randn(sizes, dtype=torch.float64)
    bias, before = biased(layer), run(layer, x)
    weight = matrices(layer)
    assert (tuple(weight.shape), outputs(layer)) == (stacked, stacked[0] * stacked[1])
    scale = torch.rand(outputs(layer), dtype=torch.float64) + 1
    write(layer, weight * scale.view(*stacked[:2], 1, 1), bias * scale + 2)
    assert torch.allclose(run(layer, x), before * scale + 2, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "batch norm"])
def test_the_weight_of_each_layout_takes_a_scale_of_its_inputs(name: str) -> None:
    torch.manual_seed(0)
    make, sizes, (groups, _, features, _) = LAYERS[name]
    layer, x = make().double(), torch.randn(sizes, dtype=torch.float64)
    scale = torch.rand(IN, dtype=torch.float64) + 1
    axis = -1 if isinstance(layer, nn.Linear | Conv1D) else 1
    expected = run(layer, (x.movedim(axis, -1) * scale).movedim(-1, axis))
    write(layer, matrices(layer) * scale.view(groups, 1, features, 1), None)
    assert torch.allclose(run(layer, x), expected, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_read_is_written_back(name: str) -> None:
    layer = LAYERS[name][0]()
    own = layer.get_parameter("weight")
    before, weight = own.detach().clone(), matrices(layer)
    own.data.zero_()
    write(layer, weight, None)
    assert torch.equal(own, before)
    assert unwritable(layer) == ""


def test_a_bias_is_added_where_there_is_none() -> None:
    layer = nn.ConvTranspose2d(IN, OUT, 2, groups=2, bias=False).half()
    layer.weight.requires_grad_(False)
    write(layer, matrices(layer), torch.arange(OUT).double())
    assert layer.bias is not None
    assert layer.bias.tolist() == list(range(OUT))
    assert (layer.bias.dtype, layer.bias.requires_grad) == (torch.float16, False)
    add_bias(layer)
    assert layer.bias.tolist() == list(range(OUT))


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.conv2d(input, self.weight - self.weight.mean())


class Still(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.LayerNorm(4), "is a LayerNorm, and no linear map or convolution"),
        (nn.BatchNorm1d(4, affine=False), "is a BatchNorm1d without weight"),
        (Still(4), "is a Still, which may not use its bias"),
        (Standardized(4, 6, 1, bias=False), "is a Standardized, which may not use a bias"),
        (parametrizations.weight_norm(nn.Linear(4, 6)), "has a weight that is computed from others"),
    ],
    ids=["another kind", "no weight", "bias unused", "no bias", "computed"],
)
def test_what_cannot_be_written_to(layer: nn.Module, why: str) -> None:
    assert unwritable(layer) == why


def test_values_that_do_not_fit() -> None:
    layer = nn.Linear(2, 2).half()
    assert fits(layer, torch.tensor([60_000.0]), None)
    assert not fits(layer, torch.tensor([1.0]), torch.tensor([70_000.0]))
    assert fits(nn.Linear(2, 2), torch.tensor([70_000.0]))
