"""Low-rank factors of weights, and the ranks that one budget buys for many of them.

A weight W (out, in) becomes two factors by a truncated SVD in a metric: the error of a rank is measured as
trace(G D C Dᵀ), D being the difference, C (in, in) a second moment of the inputs and G (out, out) one of the
gradients at the outputs. With C alone this is SVD-LLM (Wang et al. 2024, arXiv 2403.07378), with a diagonal
C ASVD (Yuan et al. 2023, arXiv 2312.05821). With both it is the second-order change of the loss under a
Kronecker-factored Fisher matrix (Martens and Grosse 2015, arXiv 1503.05671; for low rank Chekalina et al.
2025, arXiv 2505.17974), and errors of different weights may be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Added to the diagonal of a second moment, as a share of its mean, so that it has a root."""


@dataclass(frozen=True)
class Spectrum:
    """W = expand reduce, in float64: expand (out, k), reduce (k, in), and the singular values (k,) in the metric,
    descending. The first columns and rows are the best approximation of that rank.
    """

    expand: Tensor
    values: Tensor
    reduce: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Factors (out, rank) and (rank, in) of the best approximation of that rank.

        Both have the singular values of their product's root: in the metric's own scale one of them can be
        thousands of times larger than the other, and no learning rate would suit both.
        """
        outer, triangle = torch.linalg.qr(self.expand[:, :rank])
        inner = triangle @ self.reduce[:rank]
        squares, turn = torch.linalg.eigh(inner @ inner.T)
        # A square that rounding made zero or less is raised: the product does not depend on it.
        floor = float(squares[-1].clamp(min=1e-300)) * torch.finfo(squares.dtype).eps
        root = squares.clamp(min=floor).pow(0.25)
        return outer @ (turn * root), (turn / root).T @ inner

    def errors(self) -> Tensor:
        """The squared error in the metric of each rank from 0 to k, (k + 1,)."""
        squares = self.values.square().flip(0).cumsum(0).flip(0)
        return torch.cat([squares, squares.new_zeros(1)])

    def offer(self, cost: float, relative: bool) -> Offer:
        """What the weight, which costs `cost`, loses at each rank; as a share of its own square if `relative`, where
        the metric's unit is not the same for all weights.
        """
        errors = self.errors()
        errors = errors / errors[0].clamp(min=1e-300) if relative else errors
        return Offer((len(self.expand), self.reduce.shape[1]), errors, cost)


def root(moment: Tensor, damping: float = ROUNDING) -> Tensor:
    """A lower triangular L with L Lᵀ = `moment` (n, n), to whose diagonal the share `damping` of its mean is added, and
    ten times as much as often as needed. Float64. Raises `ValueError` if it is zero."""
    moment = moment.double()
    damping = damping * float(moment.diagonal().mean())
    if not damping > 0:
        raise ValueError("the second moment is zero")
    while True:
        # Rounding leaves a moment of few rows with eigenvalues a little below zero.
        damped = moment.clone()
        damped.diagonal().add_(damping)
        triangle, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return triangle
        damping *= 10


def decompose(weight: Tensor, inputs: Tensor | None = None, outputs: Tensor | None = None) -> Spectrum:
    """The SVD of `weight` (out, in) in the metric with the roots `inputs` (in, in) and `outputs` (out, out), lower
    triangular; the identity where None.

    From the eigenvectors of the smaller Gram matrix, in float64, which is faster than an SVD: singular
    values below 1e-8 of the largest are rounding, and the product of all factors is the weight for any of them.
    """
    weight = weight.detach().double()
    seen = weight if outputs is None else outputs.T @ weight
    scaled = seen if inputs is None else seen @ inputs
    if len(weight) <= weight.shape[1]:
        values, left = _principal(scaled @ scaled.T)
        expand, reduce = left, left.T @ seen
    else:
        values, right = _principal(scaled.T @ scaled)
        expand, reduce = scaled @ right, right.T
        if inputs is not None:
            reduce = torch.linalg.solve_triangular(inputs, reduce, upper=False, left=False)
    if outputs is not None:
        expand = torch.linalg.solve_triangular(outputs.T, expand, upper=True)
    return Spectrum(expand, values, reduce)


def _principal(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The roots of the eigenvalues of `gram` (n, n), descending, and the eigenvectors as columns."""
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def refitted(weight: Tensor, expand: Tensor, reduce: Tensor, moment: Tensor) -> Tensor:
    """The factor (out, rank) that goes best with `reduce` (rank, in): its product has the least squared error
    against `weight` (out, in) over inputs with the second moment `moment` (in, in), which may be summed over them.

    SVD-LLM's update. The ridge pulls to `expand` (out, rank), not to zero: the error is never above that of `expand`,
    which also stays where the inputs say nothing. Float64.
    """
    weight, expand, reduce, moment = (one.detach().double() for one in (weight, expand, reduce, moment))
    features = reduce @ moment @ reduce.T
    if not features.any():
        return expand
    missing = (weight - expand @ reduce) @ moment @ reduce.T
    return expand + torch.cholesky_solve(missing.T, root(features)).T


@dataclass(frozen=True)
class Offer:
    """What a weight of `shape` (out, in) loses at each rank, `errors` (k + 1,), and costs: `dense` as it is."""

    shape: tuple[int, int]
    errors: Tensor
    dense: float

    def cost(self, rank: int | None) -> float:
        """The cost of factors of `rank`, in the unit of `dense`; None: of the weight as it is."""
        out, width = self.shape
        return self.dense if rank is None else self.dense * rank * (out + width) / (out * width)

    def error(self, rank: int | None) -> float:
        """What factors of `rank` lose; None: nothing."""
        return 0.0 if rank is None else float(self.errors[rank])

    def ranks(self, multiple: int) -> list[int]:
        """Multiples of `multiple` that cost less than the dense weight."""
        return [rank for rank in range(multiple, len(self.errors), multiple) if self.cost(rank) < self.dense]


def uniform_ranks(offers: Sequence[Offer], keep: float, multiple: int) -> list[int | None]:
    """For every weight the largest of its ranks that costs at most `keep` of its dense cost; None: dense."""
    found = [[rank for rank in one.ranks(multiple) if one.cost(rank) <= keep * one.dense] for one in offers]
    return [max(ranks, default=None) for ranks in found]


def allocate(offers: Sequence[Offer], budget: float, multiple: int) -> list[int | None]:
    """Ranks, or None for dense, that cost at most `budget` in all and make the sum of errors small.

    First every weight takes the rank with the least `error + price * cost`, at the lowest price that keeps the
    budget; what is left is spent on the upgrades that lower the error most for their cost. Raises `ValueError` if
    even the smallest ranks cost more.
    """
    choices = [_Choices(one, multiple) for one in offers]
    low, high = 0.0, 1.0
    while _total(offers, ranks := [one.best(high) for one in choices]) > budget:
        if high > 1e60:
            raise ValueError("the smallest ranks cost more than the budget")
        low, high = high, 16 * high
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 16
        found = [one.best(middle) for one in choices]
        if _total(offers, found) > budget:
            low = middle
        else:
            high, ranks = middle, found
    return _filled(offers, choices, ranks, budget)


class _Choices:
    """The ranks that one weight may take, dense among them, with their costs and errors."""

    def __init__(self, offer: Offer, multiple: int) -> None:
        self.ranks: list[int | None] = [*offer.ranks(multiple), None]
        self.costs = torch.tensor([offer.cost(rank) for rank in self.ranks], dtype=torch.float64)
        self.errors = torch.tensor([offer.error(rank) for rank in self.ranks], dtype=torch.float64)

    def best(self, price: float) -> int | None:
        return self.ranks[int((self.errors + price * self.costs).argmin())]

    def upgrade(self, rank: int | None, left: float) -> tuple[float, int | None]:
        """The best gain in error per cost over `rank` for at most `left`, and the rank that gives it."""
        here = self.ranks.index(rank)
        more = self.costs - self.costs[here]
        gains = torch.where(
            (more > 0) & (more <= left), (self.errors[here] - self.errors) / more.clamp(min=1e-300), 0.0
        )
        best = int(gains.argmax())
        return float(gains[best]), self.ranks[best]


def _filled(
    offers: Sequence[Offer], choices: Sequence[_Choices], ranks: list[int | None], budget: float
) -> list[int | None]:
    while True:
        left = budget - _total(offers, ranks)
        upgrades = [one.upgrade(rank, left) for one, rank in zip(choices, ranks, strict=True)]
        place = max(range(len(upgrades)), key=lambda number: upgrades[number][0], default=0)
        if not upgrades or upgrades[place][0] <= 0:
            return ranks
        ranks = [*ranks[:place], upgrades[place][1], *ranks[place + 1 :]]


def _total(offers: Sequence[Offer], ranks: Sequence[int | None]) -> float:
    return sum(one.cost(rank) for one, rank in zip(offers, ranks, strict=True))
