"""Uniform affine quantization: x is about scale * (q - zero_point), q an 8-bit integer.

After Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", arXiv 1712.05877.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scheme = Literal["asymmetric", "symmetric"]
"""asymmetric: uint8 with a zero point (ONNX Runtime on x86). symmetric: int8, zero point 0 (TensorRT,
ARM)."""


class Affine(NamedTuple):
    """A grid of real values: `scale` * (q - `zero_point`) for the integers q in [`lowest`, `highest`]."""

    scale: float
    zero_point: int
    lowest: int
    highest: int


SMALLEST_SCALE = 2.0**-60
"""Keeps the inverse of a scale finite in float32. A range this narrow holds nothing but zeros."""


def affine(low: float, high: float, scheme: Scheme) -> Affine:
    """The grid for values in [`low`, `high`], stretched to contain 0 so that zeros stay exact."""
    if scheme == "symmetric":
        return Affine(max(abs(low), abs(high), 127 * SMALLEST_SCALE) / 127, 0, -127, 127)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max(high - low, 255 * SMALLEST_SCALE) / 255
    return Affine(scale, round(-low / scale), 0, 255)


def weight_scales(weight: Tensor) -> Tensor:
    """Symmetric scales of a weight (out, ...), one for each output channel: float32 (out,), largest value /
    127.

    A channel of zeros has the scale 1.
    """
    largest = weight.detach().float().flatten(1).abs().amax(1)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))
