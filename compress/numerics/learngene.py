"""A straight line through the tensors of a stack: block l of L is `base + (l / L) slope`, l = 0 .. L-1.

TLEG (Xia et al. 2024, arXiv 2312.05614) trains such a line, the learngene; here it is also fitted to tensors that
there are, by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Line:
    """Two tensors of one shape, from which those of any number of blocks are made."""

    base: Tensor
    slope: Tensor

    def at(self, place: int, count: int) -> Tensor:
        """The tensor of block number `place` of `count`."""
        return on_line(self.base, self.slope, place / count)


@dataclass(frozen=True)
class Fit:
    """A line through tensors, in their type, and how well it fits.

    `r2` is the share of their variance over the blocks that the line explains, 1 where they do not vary. `error` is
    the squared error as a share of their energy, the sum of their squares.
    """

    line: Line
    r2: float
    error: float


def on_line(base: Tensor, slope: Tensor, fraction: float) -> Tensor:
    """`base + fraction * slope`, in one operation."""
    return torch.add(base, slope, alpha=fraction)


def fit_line(tensors: Sequence[Tensor]) -> Fit:
    """The line with the least squared distance from `tensors`, those of blocks 0, 1, ... and all of one shape.

    In closed form, in float64, one tensor after the other, so that the stack is not copied. A single tensor is its
    own base, with no slope.
    """
    count = len(tensors)
    centered = [place / count - (count - 1) / (2 * count) for place in range(count)]
    mean = _weighted_sum(tensors, [1 / count] * count)
    slope = _weighted_sum(tensors, centered) / max(sum(one * one for one in centered), 1e-300)
    base = mean + centered[0] * slope
    residual = variance = energy = 0.0
    for tensor, place in zip(tensors, centered, strict=True):
        exact = tensor.detach().double()
        energy += float(exact.square().sum())
        variance += float((exact - mean).square().sum())
        residual += float((exact - mean - place * slope).square().sum())
    line = Line(base.to(tensors[0].dtype), slope.to(tensors[0].dtype))
    return Fit(line, 1 - residual / variance if variance else 1.0, residual / energy if energy else 0.0)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64, requires_grad=False)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.detach().double(), alpha=weight)
    return total
