"""Tokens on a grid as clusters of a smaller grid, and back: for dense prediction.

Written from Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning (Liang et al. 2022,
arXiv 2210.01035), but for the way back: a token keeps the state that it had, and changes as its clusters did. The paper
gives it their state, which smooths what tells neighbours apart. Each row of weights sums to one; the published code
normalizes by the square root of the sum of squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.token_plan import SoftPlan

FAR = -6e4
"""The logit of a centre that is too far away; float16 holds it."""


@dataclass(frozen=True)
class Clusters:
    """`centres` (rows, columns) stand for the tokens on `grid` (rows, columns).

    iterations   how often tokens and centres are assigned to each other
    reach        a token goes to centres within `reach` // 2 rows and columns of its own cell
    nearest      from so many centres a token is given back
    temperature  what squared distances are multiplied by before the softmax
    """

    grid: tuple[int, int]
    centres: tuple[int, int]
    iterations: int
    reach: int
    nearest: int
    temperature: float

    @property
    def count(self) -> int:
        """The number of centres."""
        return self.centres[0] * self.centres[1]


def cluster_plan(features: Tensor, clusters: Clusters, protected: int, gives_back: bool = True) -> SoftPlan:
    """How the tokens behind the first `protected` of `features` (batch, tokens, channels) become clusters.

    Distances are computed in float32. `gives_back`: whether the way back is wanted, too.
    """
    tokens = features[:, protected:].float()
    near = neighbourhood(clusters.grid, clusters.centres, clusters.reach).to(tokens)
    centres = pooling(clusters.grid, clusters.centres).to(tokens) @ tokens
    shares = torch.zeros_like(near)
    for _ in range(clusters.iterations):
        logits = -clusters.temperature * _squares(tokens, centres) + (1 - near) * FAR
        shares = logits.softmax(1)
        centres = (shares / shares.sum(-1, keepdim=True)) @ tokens
    if not clusters.iterations:
        shares = pooling(clusters.grid, clusters.centres).to(tokens).expand(tokens.shape[0], -1, -1)
    shares = shares.to(features.dtype)
    if not gives_back:
        return SoftPlan(shares, None, protected)
    back = _nearest(-clusters.temperature * _squares(tokens, centres), clusters.nearest)
    return SoftPlan(shares, back.to(features.dtype), protected)


def pooling(grid: tuple[int, int], centres: tuple[int, int]) -> Tensor:
    """Adaptive average pooling as a matrix (centres, tokens), whose rows sum to one."""
    rows, columns = (_spans(count, fewer) for count, fewer in zip(grid, centres, strict=True))
    return torch.kron(rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True))


def neighbourhood(grid: tuple[int, int], centres: tuple[int, int], reach: int) -> Tensor:
    """(centres, tokens): one where the token's own cell is within `reach` // 2 rows and columns, else zero."""
    rows, columns = (_close(count, fewer, reach) for count, fewer in zip(grid, centres, strict=True))
    return torch.kron(rows, columns)


def _spans(count: int, fewer: int) -> Tensor:
    """(fewer, count): one where a place belongs to a window of adaptive pooling."""
    number, place = torch.arange(fewer)[:, None], torch.arange(count)
    starts, ends = number * count // fewer, -((number + 1) * count // -fewer)
    return ((place >= starts) & (place < ends)).float()


def _close(count: int, fewer: int, reach: int) -> Tensor:
    number, cell = torch.arange(fewer)[:, None], torch.arange(count) * fewer // count
    return ((number - cell).abs() <= reach // 2).float()


def _squares(tokens: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (batch, centres, tokens)."""
    products = centres @ tokens.transpose(1, 2)
    squares = centres.square().sum(-1)[:, :, None] + tokens.square().sum(-1)[:, None, :]
    return (squares - 2 * products).clamp(min=0)


def _nearest(logits: Tensor, count: int) -> Tensor:
    """Weights (batch, tokens, centres) of the `count` centres with the highest of `logits` (batch, centres, tokens)."""
    logits = logits.transpose(1, 2)
    least = logits.topk(min(count, logits.shape[2]), dim=2).values[..., -1:]
    return (logits + (logits < least).to(logits.dtype) * FAR).softmax(2)
