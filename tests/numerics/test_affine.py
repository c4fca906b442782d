"""Grids of integers, and weight scales."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.affine import Affine, affine, weight_scales


@pytest.mark.parametrize(
    ("low", "high", "scheme", "expected"),
    [
        (-1.0, 4.1, "asymmetric", Affine(0.02, 50, 0, 255)),
        (0.5, 2.55, "asymmetric", Affine(0.01, 0, 0, 255)),  # stretched down to zero
        (-2.55, -1.0, "asymmetric", Affine(0.01, 255, 0, 255)),  # stretched up to zero
        (0.0, 1.0, "asymmetric", Affine(1 / 255, 0, 0, 255)),
        (-1.0, 2.54, "symmetric", Affine(0.02, 0, -127, 127)),
        (-2.54, 1.0, "symmetric", Affine(0.02, 0, -127, 127)),
        (0.0, 1.0, "symmetric", Affine(1 / 127, 0, -127, 127)),
    ],
)
def test_grid(low, high, scheme, expected):
    assert affine(low, high, scheme) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_zero_is_exact_and_the_range_is_covered(scheme):
    for low, high in [(-0.3, 7.0), (-5.0, 0.1), (0.2, 0.3), (-1e-30, 0.0), (0.0, 0.0)]:
        grid = affine(low, high, scheme)
        assert grid.lowest <= grid.zero_point <= grid.highest
        assert grid.scale * (grid.highest - grid.zero_point) >= high - grid.scale / 2
        assert grid.scale * (grid.lowest - grid.zero_point) <= low + grid.scale / 2
        assert 1 / torch.tensor(grid.scale, dtype=torch.float32) < torch.inf


def test_weight_scales_are_by_output_channel():
    weight = torch.tensor([[1.0, -2.54], [0.0, 0.0], [0.127, 0.1]])
    torch.testing.assert_close(weight_scales(weight), torch.tensor([0.02, 1.0, 0.001]))
    assert weight_scales(weight.view(3, 2, 1, 1).bfloat16()).dtype == torch.float32
