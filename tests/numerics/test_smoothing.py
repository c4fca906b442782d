"""SmoothQuant's scales."""

from __future__ import annotations

import torch

from compress.numerics.smoothing import head_columns, largest_by_feature, smoothing_scales

ACTIVATION = torch.tensor([16.0, 4.0, 0.0, 1.0])
WEIGHT = torch.tensor([0.25, 1.0, 3.0, 0.0])


def test_formula_at_one_half():
    scales = smoothing_scales(ACTIVATION, WEIGHT, 0.5)
    torch.testing.assert_close(scales, torch.tensor([8.0, 2.0, 1.0, 1.0], dtype=torch.float64))


def test_alpha_one_evens_out_the_activations():
    scales = smoothing_scales(ACTIVATION[:2], WEIGHT[:2], 1.0)
    torch.testing.assert_close(ACTIVATION[:2] / scales, torch.ones(2, dtype=torch.float64))


def test_alpha_zero_evens_out_the_weights():
    scales = smoothing_scales(ACTIVATION[:2], WEIGHT[:2], 0.0)
    torch.testing.assert_close(WEIGHT[:2] * scales, torch.ones(2, dtype=torch.float64))


def test_scales_have_a_floor():
    assert smoothing_scales(torch.tensor([1e-30]), torch.tensor([1.0]), 1.0).item() == 1e-5
    assert smoothing_scales(torch.tensor([1.0]), torch.tensor([1e-30]), 0.0).item() <= 1e5 * (1 + 1e-9)


def test_grouped_heads_share_their_features():
    origin = head_columns(features=4, kv_heads=2, repeats=3)
    assert origin.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    columns = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6, 5, 5, 6, 4])
    assert largest_by_feature(columns, origin, 4).tolist() == [3, 9, 6, 6]


def test_one_head_is_the_identity():
    assert head_columns(5, 1, 1).tolist() == [0, 1, 2, 3, 4]
