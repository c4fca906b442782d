"""Scales that move the difficulty of quantization from activations to weights.

SmoothQuant: Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", arXiv 2211.10438.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-5
"""Weight maxima and scales are kept above it, so that no channel is blown up."""


def smoothing_scales(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """activation^alpha / weight^(1 - alpha), by channel: all (channels,), float64.

    `activation` and `weight` are the largest absolute values of each input channel, the weight's over all
    linear maps that read it. Dividing the activations and multiplying the weights by the scales keeps the
    function. A channel that is zero on either side keeps the scale 1.
    """
    activation, weight = activation.double(), weight.double()
    scales = activation**alpha / weight.clamp(min=SMALLEST) ** (1 - alpha)
    dead = (activation == 0) | (weight == 0)
    return torch.where(dead, torch.ones_like(scales), scales.clamp(min=SMALLEST))


def head_columns(features: int, kv_heads: int, repeats: int) -> Tensor:
    """Which of the `features` of a value projection each input of the output projection mixes: (features *
    repeats,).

    Every one of the `kv_heads` serves `repeats` query heads in a row (Ainslie et al. 2023, arXiv 2305.13245).
    """
    return torch.arange(features).view(kv_heads, 1, -1).expand(-1, repeats, -1).reshape(-1)


def largest_by_feature(columns: Tensor, origin: Tensor, features: int) -> Tensor:
    """The largest of `columns` (inputs,) that come from each feature, `origin` (inputs,): (features,)."""
    largest = torch.zeros(features, dtype=columns.dtype)
    return largest.scatter_reduce(0, origin, columns, "amax", include_self=True)
