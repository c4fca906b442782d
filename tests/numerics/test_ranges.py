"""Activation ranges from values and from histograms."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.affine import affine
from compress.numerics.ranges import BINS, Range, histogram, minmax, mse_range, percentile_range


def rounding_error(values: torch.Tensor, kept: Range) -> float:
    """Mean squared error of `values` after uint8 rounding over `kept`."""
    scale, zero_point, lowest, highest = affine(*kept, "asymmetric")
    integers = (torch.round(values / scale) + zero_point).clamp(lowest, highest)
    return ((integers - zero_point) * scale - values).square().mean().item()


def outlier_values() -> torch.Tensor:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[0] = 60.0
    return values


def test_minmax_and_union():
    assert minmax(torch.tensor([[3.0, -1.0], [0.5, 2.0]])) == Range(-1.0, 3.0)
    assert Range(-1.0, 3.0).union(Range(-2.0, 1.0)) == Range(-2.0, 3.0)


def test_minmax_lets_nan_through():
    assert torch.tensor(minmax(torch.tensor([1.0, torch.nan]))).isnan().all()


def test_histogram_counts_every_value_once():
    values = torch.tensor([0.0, 0.0, 1.0, 4096.0])
    counts = histogram(values, Range(0.0, 4096.0))
    assert counts.shape == (BINS,)
    assert counts.sum() == 4
    assert (counts[0], counts[1], counts[-1]) == (2, 1, 1)


def test_histogram_of_a_constant():
    assert histogram(torch.full((10,), 3.0), Range(3.0, 3.0)).sum() == pytest.approx(10)


@pytest.mark.parametrize(("percentile", "low", "high"), [(100, 0, 100), (90, 5, 95), (98, 1, 99)])
def test_percentile_of_uniform_values(percentile, low, high):
    kept = percentile_range(torch.ones(BINS, dtype=torch.float64), Range(0.0, 100.0), percentile)
    assert kept == pytest.approx((low, high), abs=2 * 100 / BINS)


def test_percentile_cuts_an_outlier():
    values = outlier_values()
    full = minmax(values)
    kept = percentile_range(histogram(values, full), full, 99.99)
    assert full.high == 60
    assert 3 < kept.high < 5
    assert -5 < kept.low < -3


def test_mse_keeps_uniform_values_whole():
    kept = mse_range(torch.ones(BINS, dtype=torch.float64), Range(-2.0, 6.0))
    assert kept == pytest.approx((-2.0, 6.0), abs=0.1)


def test_mse_clips_where_that_lowers_the_error():
    values = outlier_values()
    full = minmax(values)
    kept = mse_range(histogram(values, full), full)
    assert kept.high < 60
    assert rounding_error(values, kept) <= rounding_error(values, full)
    many = torch.cat([values.clamp(-4, 4)] * 20 + [torch.tensor([60.0])])
    clipped = mse_range(histogram(many, Range(-4.0, 60.0)), Range(-4.0, 60.0))
    assert rounding_error(many, clipped) < 0.6 * rounding_error(many, Range(-4.0, 60.0))


def test_mse_searches_both_ends():
    """GELU's outputs: a short negative tail must not be traded for the positive one."""
    values = torch.nn.functional.gelu(3 * outlier_values()[1:])
    full = minmax(values)
    kept = mse_range(histogram(values, full), full)
    assert kept.low < -0.15
    assert kept.high > 8


def test_mse_of_a_one_sided_range_keeps_zero_at_its_end():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 2
    full = minmax(values)
    assert mse_range(histogram(values, full), full).low == 0
