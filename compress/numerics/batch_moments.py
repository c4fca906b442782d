"""Means and variances of features over the positions of a batch, and over several batches together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """How many positions there are, as a scalar, and mean and variance (features,) over them."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def rows(values: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """`values` (..., features) as (positions, features), and the weight of each position, (positions, 1) or None.

    `tokens` says for the first dimensions of `values` where it counts; at the others all of a position's rows do.
    Sums over many positions are wrong in half precision, so what is returned is float32 at least.
    """
    flat = values.reshape(-1, values.shape[-1])
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    if tokens is None:
        return flat, None
    weights = tokens.reshape(*tokens.shape, *[1] * (values.dim() - tokens.dim()))
    return flat, weights.expand(*values.shape[:-1], 1).reshape(-1, 1).to(flat.dtype)


def average(flat: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean (features,) of `flat` (positions, features), each position counted with its weight."""
    return flat.mean(0) if weights is None else (flat * weights).sum(0) / weights.sum()


def moments(values: Tensor, tokens: Tensor | None = None) -> Moments:
    """Those of `values` (..., features) over all positions, or those where `tokens` says so (see `rows`)."""
    flat, weights = rows(values, tokens)
    count = flat.new_tensor(len(flat)) if weights is None else weights.sum()
    mean = average(flat, weights)
    return Moments(count, mean, average((flat - mean).square(), weights))


def covariance(values: Tensor, others: Tensor, tokens: Tensor | None = None) -> Tensor:
    """That of each feature of `values` with the same one of `others`, (features,), over the positions that count."""
    (flat, weights), (other, _) = rows(values, tokens), rows(others, tokens)
    return average((flat - average(flat, weights)) * (other - average(other, weights)), weights)


def pooled(parts: list[Moments]) -> Moments:
    """The moments of all batches together, from those of each: exact, in the type of the parts.

    Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    counts, means, variances = (torch.stack(values) for values in zip(*parts, strict=True))
    share = (counts / counts.sum())[:, None]
    mean = (share * means).sum(0)
    return Moments(counts.sum(), mean, (share * (variances + (means - mean).square())).sum(0))
