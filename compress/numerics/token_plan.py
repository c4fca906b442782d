"""Fewer tokens as one matrix: Y = W X, with W (tokens left, tokens) non-negative and rows that sum to one.

Pruning, merging, sampling and clustering are special forms of W. A `TokenPlan` sends each token whole to one output; a
`SoftPlan` spreads it over several. A token's size is how many of the first tokens it stands for; padding has size zero.
Both ways to compute, by one matrix product and by gathering rows, use static shapes and no scatter: they export.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6
"""A mass below it counts as none: a token of padding alone is divided by this, not by zero."""


@dataclass(frozen=True)
class TokenPlan:
    """How N tokens become `left`.

    place   (batch, N) the output to which each token goes; `left` if it is lost
    stays   (batch, N) which tokens are the first of their output; True for `kept` tokens of each row, whose places
            are the numbers from 0 to `kept` - 1. Outputs from number `kept` on hold moved tokens alone
    """

    place: Tensor
    stays: Tensor
    left: int
    kept: int

    def shares(self, dtype: torch.dtype) -> Tensor:
        """How much of each token goes to each output, (batch, left, N): ones and zeros."""
        return one_hot(self.place, self.left, dtype)

    def merge(self, x: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The means of the tokens `x` (batch, N, channels) over each output, weighted by `mass` (batch, N).

        Also gives the mass of each output, (batch, left). By one product with the whole matrix. Without `mass` each
        token weighs one.
        """
        mass = x.new_ones(x.shape[:2]) if mass is None else mass
        shares, sums = self.shares(x.dtype), self.add(mass)
        own = sums.gather(1, self.place.clamp(max=self.left - 1)).clamp(min=FLOOR)
        return (shares * (mass / own)[:, None, :]) @ x, sums

    def gather(self, x: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `merge` gives, by gathering rows; the product runs over moved tokens alone."""
        weights = (x.new_ones(x.shape[:2]) if mass is None else mass)[..., None]
        order = self._order()
        kept, moved = order[:, : self.kept], order[:, self.kept :]
        shares = one_hot(self.place.gather(1, moved), self.left, x.dtype)
        stays, goes = self._padded(take(weights, kept)), take(weights, moved)
        sums = stays + shares @ goes
        whole = sums.clamp(min=FLOOR)
        spread = shares * goes.transpose(1, 2) / whole
        return self._padded(take(x, kept)) * (stays / whole) + spread @ take(x, moved), sums[..., 0]

    def add(self, mass: Tensor) -> Tensor:
        """The sums of `mass` (batch, N) over each output, (batch, left)."""
        return (self.shares(mass.dtype) @ mass[..., None])[..., 0]

    def founders(self) -> Tensor:
        """The token that each of the first `kept` outputs is made of, (batch, kept)."""
        return self._order()[:, : self.kept]

    def _order(self) -> Tensor:
        """The tokens that stay, by the number of their output, and behind them the others."""
        return torch.where(self.stays, self.place, self.place.shape[1] + self.place).argsort(1)

    def _padded(self, values: Tensor) -> Tensor:
        """`values` (batch, kept, channels) with rows of zeros behind, (batch, left, channels)."""
        missing = self.left - self.kept
        return torch.nn.functional.pad(values, (0, 0, 0, missing)) if missing else values


@dataclass(frozen=True)
class SoftPlan:
    """How the tokens behind the first `protected`, which stay, become M that share them.

    weights  (batch, M, N) how much each of the N tokens counts in each output
    back     (batch, N, M) the outputs that a token is given back from; rows sum to one. None if nobody wants it
    """

    weights: Tensor
    back: Tensor | None
    protected: int

    def merge(self, x: Tensor) -> Tensor:
        """The weighted means of the tokens `x` (batch, protected + N, channels): (batch, protected + M, channels)."""
        shares = self.weights / self.weights.sum(-1, keepdim=True).clamp(min=FLOOR)
        return torch.cat([x[:, : self.protected], shares @ x[:, self.protected :]], 1)

    @property
    def owner(self) -> Tensor:
        """The output that each token is given back from most, (batch, protected + N)."""
        assert self.back is not None, "the way back was not asked for"
        batch = self.back.shape[0]
        special = torch.arange(self.protected, device=self.back.device).expand(batch, -1)
        return torch.cat([special, self.protected + self.back.argmax(2)], 1)

    def spread(self, x: Tensor) -> Tensor:
        """For each token the mean over its outputs: (batch, protected + N, channels).

        `x` (batch, protected + M, channels) is of the outputs.
        """
        assert self.back is not None, "the way back was not asked for"
        return torch.cat([x[:, : self.protected], self.back.to(x.dtype) @ x[:, self.protected :]], 1)

    def restore(self, x: Tensor, tokens: Tensor, merged: Tensor) -> Tensor:
        """All of `tokens` (batch, protected + N, channels), changed as their outputs were, from `merged` to `x`."""
        changed = tokens + self.spread(x - merged)
        return torch.cat([x[:, : self.protected], changed[:, self.protected :]], 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (batch, M) of `x` (batch, N, channels): (batch, M, channels)."""
    batch, count, channels = x.shape
    starts = torch.arange(batch, device=x.device)[:, None] * count
    rows = x.reshape(batch * count, channels).index_select(0, (index + starts).reshape(-1))
    return rows.reshape(batch, index.shape[1], channels)


def one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Columns (batch, count, N) with a one at `index` (batch, N), or of zeros where that is `count`."""
    outputs = torch.arange(count, dtype=torch.int32, device=index.device)
    return (index.int()[:, None, :] == outputs[:, None]).to(dtype)


def ranks(values: Tensor) -> Tensor:
    """The place of each of `values` (batch, N) in ascending order, the first of equal ones first.

    By comparing all pairs: no sort, and equal values have one order on every runtime.
    """
    return precedes(values).float().sum(2).long()  # runtimes add floats faster than booleans


def precedes(values: Tensor) -> Tensor:
    """(batch, N, N): whether the second of two of `values` (batch, N) comes before the first in ascending order."""
    own, other = values[:, :, None], values[:, None, :]
    number = torch.arange(values.shape[1], device=values.device)
    return (other < own) | ((other == own) & (number < number[:, None]))
