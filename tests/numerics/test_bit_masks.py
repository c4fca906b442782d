"""Masks as bits, and rows that are stored as values and bits."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.bit_masks import gathered, pack_bits, packed_width, spread, unpack_bits


@pytest.mark.parametrize("size", [1, 7, 8, 9, 24, 61])
def test_bits_give_the_mask_back(size: int) -> None:
    torch.manual_seed(0)
    mask = torch.rand(13, size) < 0.4
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert bits.shape == (13, packed_width(size)) == (13, (size + 7) // 8)
    assert torch.equal(unpack_bits(bits, size), mask)


def test_the_first_place_is_the_lowest_bit() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    assert pack_bits(mask).tolist() == [[5, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "count"), [(10, 3), (16, 16), (9, 1)])
def test_rows_are_what_they_were(dtype: torch.dtype, size: int, count: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(12, size).to(dtype)
    mask = torch.zeros(12, size, dtype=torch.bool).scatter(1, torch.rand(12, size).topk(count).indices, True)
    made = spread(gathered(rows, mask), pack_bits(mask), size)
    assert made.dtype == dtype
    assert torch.equal(made, rows * mask)


def test_a_value_may_be_zero_or_not_finite() -> None:
    mask = torch.tensor([[True, False, True]])
    made = spread(torch.tensor([[0.0, torch.inf]]), pack_bits(mask), 3)
    assert made.tolist() == [[0.0, 0.0, torch.inf]]


def test_gradients_reach_the_values() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    values = torch.ones(2, 2, requires_grad=True)
    (spread(values, pack_bits(mask), 3) * torch.arange(6.0).view(2, 3)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 2.0], [4.0, 5.0]]
