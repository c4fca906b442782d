"""Random pictures that are not white noise."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

OCTAVES = (2, 4, 8, 16, 32, 64)
"""Rows and columns of the noise of which pictures are made."""


def structured(count: int, side: int, seed: int) -> Tensor:
    """Random pictures (count, 3, side, side) in which near places are alike: noise of octaves, coarse ones stronger."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.zeros(count, 3, side, side)
    for cells in OCTAVES:
        noise = torch.randn(count, 3, cells, cells, generator=generator) / cells
        pictures += interpolate(noise, size=side, mode="bicubic")
    return pictures / pictures.std((1, 2, 3), keepdim=True)
