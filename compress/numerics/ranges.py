"""Activation ranges from calibration data: all of it, percentiles, or the least squared error.

The least-squares range follows the analysis of clipping in Banner et al. 2019, "Post training 4-bit
quantization of convolutional networks for rapid-deployment", arXiv 1810.05723: rounding noise inside the
range is uniform, with variance scale^2 / 12, and values outside of it are off by their distance to it. Here
the distribution is the measured histogram, and both ends are searched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 4096
CANDIDATES = 256


class Range(NamedTuple):
    """Real values `low` to `high`."""

    low: float
    high: float

    def union(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))


def minmax(values: Tensor) -> Range:
    """The smallest and the largest of `values`, of any shape and not empty. NaN anywhere gives NaN."""
    low, high = torch.aminmax(values.detach().float())
    return Range(low.item(), high.item())


def histogram(values: Tensor, full: Range) -> Tensor:
    """Counts of `values` (any shape) in `BINS` equal bins over `full`: float64 (BINS,), on the CPU."""
    if full.low == full.high:
        return torch.full((BINS,), values.numel() / BINS, dtype=torch.float64)
    counts = torch.histc(values.detach().float(), BINS, full.low, full.high)
    return counts.double().cpu()


def percentile_range(counts: Tensor, full: Range, percentile: float) -> Range:
    """The range that leaves at most (100 - `percentile`) / 2 per cent of the values outside at each end.

    `counts` (BINS,) are over `full`; the answer is exact to one bin.
    """
    share = torch.cumsum(counts, 0) / counts.sum()
    tail = (100 - percentile) / 200
    step = (full.high - full.low) / BINS
    first, last = int((share <= tail).sum()), int((share < 1 - tail).sum())
    return Range(full.low + first * step, full.low + (last + 1) * step)


def mse_range(counts: Tensor, full: Range, levels: int = 255) -> Range:
    """The range over which rounding to `levels` steps has the least squared error, both ends searched.

    `counts` (BINS,) are over `full`. Zero stays inside: an end on the wrong side of zero moves to zero.
    """
    step = (full.high - full.low) / BINS
    centers = full.low + step * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    shares = torch.linspace(1, 0, CANDIDATES + 1, dtype=torch.float64)[:-1]
    lows, highs = min(full.low, 0.0) * shares, max(full.high, 0.0) * shares
    below = _overshoot(-centers.flip(0), counts.flip(0), -lows)
    above = _overshoot(centers, counts, highs)
    noise = counts.sum() * ((highs[None, :] - lows[:, None]) / levels) ** 2 / 12
    error = below[:, None] + above[None, :] + noise
    error[(highs[None, :] - lows[:, None]) <= 0] = torch.inf
    best = int(error.argmin())
    return Range(lows[best // CANDIDATES].item(), highs[best % CANDIDATES].item())


def _overshoot(centers: Tensor, counts: Tensor, ends: Tensor) -> Tensor:
    """Sum of counts * (center - end)^2 over the centers above each end: (candidates,). `centers` (BINS,)
    ascend."""
    excess = (centers[None, :] - ends[:, None]).clamp(min=0)
    return (excess**2 * counts).sum(1)
