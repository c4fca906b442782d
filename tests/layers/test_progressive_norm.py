"""A norm that fades into a batch norm: its two ends, its statistics, its plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.layers.progressive_norm import EPS, Fading, ProgressiveNorm, RepBatchNorm, Rescaling
from compress.numerics.batch_moments import moments
from compress.numerics.rescaling import scale_and_shift

FEATURES = 6


def shaken(norm: nn.Module) -> nn.Module:
    """`norm` in float64 with weights and biases that are neither 1 nor 0."""
    for parameter in norm.parameters():
        parameter.data = torch.randn(parameter.shape) + 1
    return norm.double()


def made(share: float, alpha: float = 0.7, tokens: Tensor | None = None) -> ProgressiveNorm:
    torch.manual_seed(0)
    batch = shaken(RepBatchNorm(FEATURES))
    assert isinstance(batch, RepBatchNorm)
    batch.alpha.data.fill_(alpha)
    return ProgressiveNorm(shaken(nn.LayerNorm(FEATURES)), batch, Fading(share, lambda _: tokens))


def inputs(*sizes: int) -> Tensor:
    return torch.randn(*sizes, FEATURES, generator=torch.Generator().manual_seed(1)).double() * 3 + 2


def test_at_the_beginning_the_norm_is_alone() -> None:
    layer, x = made(1.0), inputs(3, 5)
    assert torch.equal(layer(x), layer.norm(x))


def test_in_the_end_the_batch_norm_is_alone() -> None:
    layer, x = made(0.0), inputs(3, 5)
    batch = layer.batch
    flat = nn.functional.batch_norm(x.flatten(0, 1), None, None, batch.weight, batch.bias, True, 0.0, EPS)
    torch.testing.assert_close(layer(x), flat.view_as(x) + 0.7 * x, rtol=1e-12, atol=1e-12)
    # Other texts in the batch change the output, and gradients go through its statistics.
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    assert float(slope[1:].abs().min()) > 0


def test_between_them_is_their_mixture() -> None:
    x = inputs(3, 5)
    first, last = made(1.0)(x), made(0.0)(x)
    torch.testing.assert_close(made(0.25)(x), 0.25 * first + 0.75 * last, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing() -> None:
    tokens = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    x = inputs(2, 4)
    layer = made(0.0, tokens=tokens)
    other = torch.where(tokens[..., None], x, 1e3)
    assert torch.equal(layer(x)[tokens], layer(other)[tokens])
    assert layer.moments(x).count == 6


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_norm_that_is_fitted_gives_the_nearest_line(alpha: float) -> None:
    layer, x = made(0.0, alpha), inputs(8, 40)
    with torch.no_grad():
        layer.fit(x)
        given, wanted = layer(x).flatten(0, 1), layer.norm(x).flatten(0, 1)
    torch.testing.assert_close(given.mean(0), wanted.mean(0))
    flat = x.flatten(0, 1)
    for feature in range(FEATURES):
        line = torch.stack([flat[:, feature], torch.ones(len(flat)).double()], 1)
        best = line @ torch.linalg.lstsq(line, wanted[:, feature : feature + 1]).solution
        torch.testing.assert_close(given[:, feature], best[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_its_plain_forms_are_exact(alpha: float) -> None:
    layer, x = made(0.0, alpha), inputs(3, 5)
    with torch.no_grad():
        wanted = layer(x)
        settled = layer.settle(moments(x))
        torch.testing.assert_close(settled(x), wanted, rtol=1e-12, atol=1e-12)
        one = inputs(1, 1)
        plain = Rescaling(*scale_and_shift(settled, (1, 1, FEATURES)))
        torch.testing.assert_close(plain(one), settled(one), rtol=1e-12, atol=1e-12)
