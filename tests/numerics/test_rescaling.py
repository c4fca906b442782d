"""A map with a scale and a shift of its output or its input is one map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from compress.numerics.rescaling import rescale_after, rescale_before, scale_and_shift

GROUPS, OUT, IN, KERNEL = 2, 3, 5, 2


def random(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` (batch, groups * in, height, width) with the stacked `weight` (groups, out, in, taps) of a square kernel."""
    kernel = weight.reshape(GROUPS * OUT, IN, KERNEL, KERNEL)
    return conv2d(x, kernel, bias, groups=GROUPS)


def rescaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale[:, None, None] + shift[:, None, None]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_after_a_map_of_groups(biased: bool, shifted: bool) -> None:
    x, weight = random(2, GROUPS * IN, 4, 4), random(GROUPS, OUT, IN, KERNEL**2)
    bias = random(GROUPS * OUT) if biased else None
    scale, shift = random(GROUPS * OUT), random(GROUPS * OUT) * shifted
    found = rescale_after(weight, bias, scale, shift)
    assert torch.allclose(
        convolved(x, *found), rescaled(convolved(x, weight, bias), scale, shift), atol=1e-12
    )
    assert (found[1] is None) == (not biased and not shifted)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_before_a_map_of_groups(biased: bool, shifted: bool) -> None:
    x, weight = random(2, GROUPS * IN, 4, 4), random(GROUPS, OUT, IN, KERNEL**2)
    bias = random(GROUPS * OUT) if biased else None
    scale, shift = random(GROUPS * IN), random(GROUPS * IN) * shifted
    found = rescale_before(weight, bias, scale, shift)
    assert torch.allclose(
        convolved(x, *found), convolved(rescaled(x, scale, shift), weight, bias), atol=1e-12
    )
    assert (found[1] is None) == (not biased and not shifted)


def test_the_inputs_stay_as_they_are() -> None:
    weight, bias = random(1, 3, 3, 1), random(3)
    before = weight.clone(), bias.clone()
    for rule in (rescale_after, rescale_before):
        rule(weight, bias, random(3), random(3))
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_in_numbers(affine: bool) -> None:
    norm = nn.BatchNorm2d(4, eps=0.1, affine=affine)
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 2)
    scale, shift = scale_and_shift(norm, (1, 4, 1, 1))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    expected = (norm.weight if affine else 1) / (norm.running_var.double() + 0.1).sqrt()
    assert torch.allclose(scale, expected, atol=1e-12)
    assert torch.allclose(shift, (norm.bias if affine else 0) - expected * norm.running_mean, atol=1e-12)


def test_a_norm_in_training_is_read_as_in_evaluation_and_stays() -> None:
    norm = nn.BatchNorm1d(3).train()
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    scale, shift = scale_and_shift(norm, (1, 3))
    assert torch.allclose(scale, torch.full((3,), (1 + norm.eps) ** -0.5, dtype=torch.float64))
    assert torch.equal(shift, torch.zeros(3, dtype=torch.float64))
    assert norm.training
    assert norm.weight.dtype == torch.float32
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
