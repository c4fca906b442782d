"""How a norm's parameters enter, found by running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.numerics.norm_form import divided


class Spelt(nn.Module):
    """An RMS norm whose names and form say nothing: y = x' * (offset + b) + w."""

    def __init__(self, features: int, offset: float, shift: bool) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(features))
        self.w = nn.Parameter(torch.randn(features)) if shift else None
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.offset + self.b)
        return x if self.w is None else x + self.w


class Squared(nn.Module):
    """A weight that enters in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(x, dim=-1) * self.weight**2


def layer_norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize(
    "build",
    [
        layer_norm,
        lambda: nn.LayerNorm(8, bias=False),
        lambda: nn.RMSNorm(8),
        lambda: Spelt(8, 0.0, False),
        lambda: Spelt(8, 1.0, False),
        lambda: Spelt(8, 1.0, True),
    ],
)
def test_output_is_divided(build):
    torch.manual_seed(0)
    norm, x, scales = build(), torch.randn(5, 8), torch.rand(8) + 0.2
    before = norm(x)
    folded = divided(norm, scales)
    assert folded is not None
    norm.load_state_dict(folded)
    torch.testing.assert_close(norm(x), before / scales, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(6), Squared()])
def test_what_cannot_be_divided_is_left_alone(norm):
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    assert divided(norm, torch.rand(8) + 0.2) is None
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
