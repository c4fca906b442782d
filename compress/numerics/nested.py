"""Nested factors: products of which the leading columns are an approximation for every rank.

Generalised ordered dropout (Horvath et al. 2024, Maestro, arXiv 2308.14929) trains factors U (out, rank) and
V (rank, in) so that the first k columns of U and rows of V do alone what they can. Its hierarchical group lasso
pulls the tails of both to zero: sum over k of ||U[:, k:]|| + ||V[k:]||, here as a proximal step, which reaches zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.low_rank import Spectrum


def nested(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """All components of `spectrum` in the order of its metric, as factors (out, k) and (k, in), float64.

    Each column of the one is as long as its row of the other.
    """
    outer, inner = (
        one.clamp(min=1e-300) for one in (spectrum.expand.norm(dim=0), spectrum.reduce.norm(dim=1))
    )
    scale = (inner / outer).sqrt()
    return spectrum.expand * scale, spectrum.reduce / scale[:, None]


def cut_errors(expand: Tensor, reduce: Tensor, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    """The squared error of keeping the first k components of `expand` (out, rank) and `reduce` (rank, in), for every k
    from 0 to rank, (rank + 1,), in the metric with the roots `inputs` (in, in) and `outputs` (out, out); float64.
    """
    left, right = expand.detach().double(), reduce.detach().double()
    left = left if outputs is None else outputs.T @ left
    right = right if inputs is None else right @ inputs
    # The error is the sum over all pairs of components that are cut off.
    pairs = (left.T @ left) * (right @ right.T)
    tails = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.cat([tails, tails.new_zeros(1)]).clamp(min=0)


def tail_scales(lengths: Tensor, amount: float) -> Tensor:
    """The factor by which each column shrinks, (k,), in the proximal step of the hierarchical group lasso times
    `amount`; `lengths` (k,) are those of the columns.

    The groups are nested, so that the step of all is that of each in turn, from the smallest (Jenatton et al. 2011,
    "Proximal Methods for Hierarchical Sparse Coding").
    """
    scales, tail = [], 0.0
    for length in reversed(lengths.double().tolist()):
        group = (length**2 + tail) ** 0.5
        scale = max(0.0, 1 - amount / group) if group else 0.0
        scales.append(scale)
        tail = (scale * group) ** 2
    return torch.tensor(scales[::-1], dtype=torch.float64).cumprod(0).to(lengths)
