"""Rows with few non-zeros, stored as their values and a bit for each place.

A bit for every place is smaller than a number for every non-zero as soon as one place in eight is taken. All of it is
plain tensor arithmetic, so that an exported graph unpacks itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

BYTE = 8


def packed_width(size: int) -> int:
    """The bytes that a row of `size` bits takes."""
    return -(-size // BYTE)


def pack_bits(mask: Tensor) -> Tensor:
    """`mask` (rows, size), bool, as uint8 (rows, ceil(size / 8)): the first place is the lowest bit."""
    rows, size = mask.shape
    padded = torch.nn.functional.pad(mask, (0, packed_width(size) * BYTE - size))
    return (padded.view(rows, -1, BYTE) * _powers(mask)).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, size: int) -> Tensor:
    """The mask (rows, size), bool, that `bits` (rows, ceil(size / 8)) hold."""
    places = torch.bitwise_and(bits.unsqueeze(-1), _powers(bits)).bool()
    return places.flatten(1)[:, :size]


def spread(values: Tensor, bits: Tensor, size: int) -> Tensor:
    """Rows (rows, size) with `values` (rows, count) in order where `bits` have a one, and zeros elsewhere. Each row has
    `count` ones."""
    mask = unpack_bits(bits, size)
    order = mask.long().cumsum(1).clamp(min=1) - 1
    return values.gather(1, order).masked_fill(~mask, 0)


def gathered(rows: Tensor, mask: Tensor) -> Tensor:
    """The values (rows, count) of `rows` (rows, size) where `mask` has its `count` ones a row, in order."""
    return rows[mask].view(len(rows), -1)


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([1 << place for place in range(BYTE)], dtype=torch.uint8, device=like.device)
