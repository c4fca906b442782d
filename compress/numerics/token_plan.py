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

    Outputs are, in this order: the `protected` first tokens; those of the `free` tokens that stay, `single` with the
    protected; the `takers`, to which others move; and, if `left` is more than these, what moved tokens alone make.

    place   (batch, N) the output to which each token goes; `left` if it is lost
    rank    (batch, free) from 0: in this order the free tokens stay, and behind the last that stays they move
    free    (free,) tokens that may stay or move, the same in each row
    takers  (takers,) tokens that stay, the same in each row, to which others move; None if there are none
    """

    place: Tensor
    rank: Tensor
    free: Tensor
    left: int
    single: int
    protected: int
    takers: Tensor | None = None

    def shares(self, dtype: torch.dtype) -> Tensor:
        """How much of each token goes to each output, (batch, left, N): ones and zeros."""
        return one_hot(self.place, self.left, dtype)

    def merge(self, x: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The means of the tokens `x` (batch, N, channels) over each output, weighted by `mass` (batch, N).

        Also gives the mass of each output, (batch, left). By one product with the whole matrix. Without `mass` each
        token weighs one. The states of an output of mass zero mean nothing, and the two ways may differ there.
        """
        held = self.shares(x.dtype)
        if mass is not None:
            held = held * mass[:, None, :]
        sums = held.sum(2)
        return (held / sums.clamp(min=FLOOR)[..., None]) @ x, sums

    def gather(self, x: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `merge` gives, by gathering rows; the product runs over moved tokens, and outputs that take some in."""
        weights = x.new_ones(x.shape[:2]) if mass is None else mass
        alone, moved = self._sorted()
        merged, sums = [take(x, alone)], [weights.gather(1, alone)]
        if self.single < self.left:
            states, masses = self._taken_in(x, weights, moved)
            merged.append(states)
            sums.append(masses)
        return torch.cat(merged, 1), torch.cat(sums, 1)

    def add(self, mass: Tensor) -> Tensor:
        """The sums of `mass` (batch, N) over each output, (batch, left)."""
        return (self.shares(mass.dtype) @ mass[..., None])[..., 0]

    def founders(self) -> Tensor:
        """The tokens that stay, in the order of the outputs that they are the first of, (batch, tokens that stay)."""
        alone, _ = self._sorted()
        if self.takers is None:
            return alone
        return torch.cat([alone, self.takers.expand(alone.shape[0], -1)], 1)

    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The tokens of the `single` outputs, and those that move."""
        free = self.free[self.rank.argsort(1)]
        stay = self.single - self.protected
        return torch.cat([leading(free, self.protected), free[:, :stay]], 1), free[:, stay:]

    def _taken_in(self, x: Tensor, mass: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
        """Means and masses of the outputs behind the `single` ones: of `takers`, if any, and the tokens `moved`."""
        count = self.left - self.single
        shares = one_hot(self.place.gather(1, moved) - self.single, count, x.dtype)
        goes = shares * mass.gather(1, moved)[:, None, :]
        sums = goes.sum(2)
        if self.takers is None:
            return (goes / sums.clamp(min=FLOOR)[..., None]) @ take(x, moved), sums
        stays = mass.index_select(1, self.takers)
        sums = sums + stays
        whole = sums.clamp(min=FLOOR)[..., None]
        own = x.index_select(1, self.takers) * (stays[..., None] / whole)
        return own + (goes / whole) @ take(x, moved), sums


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
        special = leading(self.back, self.protected)
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


def leading(values: Tensor, count: int) -> Tensor:
    """The numbers from 0 to `count` - 1 for each row of `values`, (batch, count)."""
    return torch.arange(count, device=values.device).expand(values.shape[0], -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` (batch, M) of `x` (batch, N, channels): (batch, M, channels)."""
    batch, count, channels = x.shape
    starts = torch.arange(batch, device=x.device)[:, None] * count
    rows = x.reshape(batch * count, channels).index_select(0, (index + starts).reshape(-1))
    return rows.reshape(batch, index.shape[1], channels)


def one_hot(index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Columns (batch, count, N) with a one at `index` (batch, N), or of zeros where that is `count`."""
    if index.is_cuda:  # a scatter does not export, and takes half the time of comparing
        batch, tokens = index.shape
        ones = torch.zeros(batch, count + 1, tokens, dtype=dtype, device=index.device)
        return ones.scatter_(1, index[:, None, :], 1)[:, :count]
    outputs = torch.arange(count, dtype=torch.int32, device=index.device)
    return (index.int()[:, None, :] == outputs[:, None]).to(dtype)


def ranks(values: Tensor) -> Tensor:
    """The place of each of `values` (batch, N) in ascending order, the first of equal ones first.

    By comparing all pairs, except on a GPU: no sort, and equal values have one order on every runtime.
    """
    if values.is_cuda:
        order = values.sort(dim=1, stable=True).indices
        return torch.empty_like(order).scatter_(1, order, leading(order, order.shape[1]))
    return precedes(values).float().sum(2).long()  # runtimes add floats faster than booleans


def precedes(values: Tensor) -> Tensor:
    """(batch, N, N): whether the second of two of `values` (batch, N) comes before the first in ascending order."""
    own, other = values[:, :, None], values[:, None, :]
    number = torch.arange(values.shape[1], device=values.device)
    return (other < own) | ((other == own) & (number < number[:, None]))
