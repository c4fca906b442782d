"""Fewer tokens as one matrix: Y = W X, with W (tokens left, tokens) non-negative and rows that sum to one.

Pruning, merging and spreading are special forms of W, so one value, `TokenPlan`, serves them all. It is kept in
factors: which tokens stay, which are spread, and over which of the outputs. A token's size is how many of the first
tokens it stands for; padding has size zero. Both ways to compute, by a gather and by one matrix product, use static
shapes and no scatter, so that they export.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6
"""A mass below it counts as none: a token of padding alone is divided by this, not by zero."""


@dataclass(frozen=True)
class TokenPlan:
    """How N tokens become M.

    kept     (batch, K) the tokens that stay, in the order of the outputs; K <= M
    moved    (batch, R) all others
    shares   (batch, M, R) how much of each moved token goes to each output; columns sum to one, or to zero for a
             token that is lost

    Outputs from number K on hold moved tokens alone.
    """

    kept: Tensor
    moved: Tensor
    shares: Tensor

    def merge(self, x: Tensor, mass: Tensor) -> Tensor:
        """The means of the tokens `x` (batch, N, channels) that each output stands for, weighted by `mass` (batch, N).

        By gathering rows; the product runs over moved tokens alone.
        """
        stays, goes = take(mass[..., None], self.kept), take(mass[..., None], self.moved)
        sums = self._padded(take(x, self.kept) * stays) + self.shares @ (take(x, self.moved) * goes)
        return sums / (self._padded(stays) + self.shares @ goes).clamp(min=FLOOR)

    def add(self, mass: Tensor) -> Tensor:
        """The sums of `mass` (batch, N) over what each output stands for, (batch, M)."""
        columns = mass[..., None]
        return (self._padded(take(columns, self.kept)) + self.shares @ take(columns, self.moved))[..., 0]

    def matrix(self, count: int) -> Tensor:
        """The shares of all `count` tokens, (batch, M, count), without weights: columns sum to one, or zero if lost."""
        stays = self._padded(one_hot(self.kept, count, self.shares.dtype))
        return stays + self.shares @ one_hot(self.moved, count, self.shares.dtype)

    def owners(self) -> tuple[Tensor, Tensor]:
        """For each token the output that has most of it, (batch, N), and whether any has some."""
        outputs = torch.arange(self.kept.shape[1], device=self.kept.device).expand(self.kept.shape[0], -1)
        place = torch.cat([self.kept, self.moved], 1).argsort(1)
        owner = torch.cat([outputs, self.shares.argmax(1)], 1).gather(1, place)
        alive = torch.cat([outputs >= 0, self.shares.sum(1) > 0.5], 1).gather(1, place)
        return owner, alive

    def _padded(self, values: Tensor) -> Tensor:
        """`values` (batch, K, channels) with rows of zeros behind, (batch, M, channels)."""
        missing = self.shares.shape[1] - self.kept.shape[1]
        return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values


def merge_by_matrix(plan: TokenPlan, x: Tensor, mass: Tensor) -> Tensor:
    """What `TokenPlan.merge` gives, by one product with the whole matrix (batch, M, N)."""
    weights = plan.matrix(x.shape[1]) * mass[:, None, :]
    return weights @ x / weights.sum(-1, keepdim=True).clamp(min=FLOOR)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (batch, M) of `x` (batch, N, channels): (batch, M, channels)."""
    batch, count, channels = x.shape
    starts = torch.arange(batch, device=x.device)[:, None] * count
    rows = x.reshape(batch * count, channels).index_select(0, (index + starts).reshape(-1))
    return rows.reshape(batch, index.shape[1], channels)


def one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Rows (batch, M, count) with a one at `index` (batch, M)."""
    return (index[..., None] == torch.arange(count, device=index.device)).to(dtype)


def hard_plan(kept: Tensor, moved: Tensor, destination: Tensor, dtype: torch.dtype) -> TokenPlan:
    """Each moved token goes whole to one of the kept: `destination` (batch, R) are numbers of outputs."""
    outputs = torch.arange(kept.shape[1], device=kept.device)
    return TokenPlan(kept, moved, (destination[:, None, :] == outputs[:, None]).to(dtype))
