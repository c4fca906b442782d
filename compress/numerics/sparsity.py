"""Which entries of a weight can be zero, and what the others become.

Scores: the magnitude; Wanda's, the magnitude times the norm of the input (Sun et al. 2023, arXiv 2306.11695); and
SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774), which prunes column by column and lets the columns that
follow make up for the error, as the second moment of the inputs says. Weights are (out, in).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Which entries stay: `keep` gives booleans for scores (out, columns), and is asked for `columns` at a time, or for
    a whole block of them where that is None.
    """

    keep: Callable[[Tensor], Tensor]
    columns: int | None = None


def without_lowest(scores: Tensor, count: int) -> Tensor:
    """Booleans in the shape of `scores` (..., n): False at the `count` lowest of each row; of equals, at the first."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], False)


def by_row(sparsity: float) -> Choice:
    """All but the share `sparsity` of each row, rounded to whole entries."""
    return Choice(lambda scores: without_lowest(scores, round(sparsity * scores.shape[1])))


def overall(sparsity: float) -> Choice:
    """All but the share `sparsity` of all entries, wherever they are."""

    def keep(scores: Tensor) -> Tensor:
        return without_lowest(scores.flatten(), round(sparsity * scores.numel())).view_as(scores)

    return Choice(keep)


def of_groups(kept: int, size: int) -> Choice:
    """`kept` of every `size` consecutive inputs of each row, whose number is a multiple of `size`."""

    def keep(scores: Tensor) -> Tensor:
        return without_lowest(scores.unflatten(1, (-1, size)), size - kept).flatten(1)

    return Choice(keep, size)


def wanda_scores(weight: Tensor, moment: Tensor) -> Tensor:
    """|w| times the root mean square of the input, (out, in), float64; `moment` is the mean of x xᵀ (in, in)."""
    return weight.double().abs() * moment.diagonal().to(weight.device).clamp(min=0).sqrt()


def pruned(weight: Tensor, scores: Tensor, choice: Choice) -> Tensor:
    """`weight` with zeros where the scores are lowest; the other entries stay as they are."""
    return torch.where(choice.keep(scores), weight, 0.0)


def sparsegpt(
    weight: Tensor, moment: Tensor, choice: Choice, damping: float = 0.01, block: int = 128
) -> Tensor:
    """`weight` pruned from the first input to the last, each error made up for by the inputs that follow.

    An entry's score is the error that its removal leaves after that: w² / U_jj² with Uᵀ U the inverse of the second
    moment `moment` (in, in), which `damping` times its mean diagonal is added to. Inputs that are always zero lose
    their weights first. `block` inputs are swept before the rest is touched; a `choice` without columns compares within
    them. Float64 inside.
    """
    swept = weight.detach().double().clone()
    width = swept.shape[1]
    moment = moment.to(swept)
    inverse = inverse_root(moment, damping)
    # An input that is always zero can do without its weight at no loss, and takes no part in another's.
    scale = torch.where(moment.diagonal() > 0, inverse.diagonal(), torch.inf)
    for start in range(0, width, block):
        columns = slice(start, min(start + block, width))
        errors = _sweep(swept[:, columns], inverse[columns, columns], scale[columns], choice)
        swept[:, columns.stop :] -= errors @ inverse[columns, columns.stop :]
    return swept.to(weight.dtype)


def inverse_root(moment: Tensor, damping: float) -> Tensor:
    """The upper triangular U with Uᵀ U = (`moment` + damping)⁻¹, (n, n) in the type of `moment`.

    The damping is a share of the mean diagonal of inputs that are not always zero, ten times as much as often as
    needed. Raises `ValueError` if all are.
    """
    diagonal = moment.diagonal()
    alive = diagonal > 0
    if not alive.any():
        raise ValueError("the second moment is zero")
    mean = diagonal[alive].mean()
    while True:
        ridge = torch.where(alive, damping * mean, mean)
        # With rows and columns in reverse, the lower triangle of Cholesky is an upper one: moment = R Rᵀ.
        triangle, failed = torch.linalg.cholesky_ex((moment + ridge.diag()).flip(0, 1))
        if not failed:
            identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            return torch.linalg.solve_triangular(triangle.flip(0, 1), identity, upper=True)
        damping *= 10


def lost_share(before: Tensor, after: Tensor, moment: Tensor) -> float:
    """The squared error of the outputs, as a share of their squares, over inputs with the second moment `moment`."""
    before, moment = before.double(), moment.to(before.device).double()
    difference = before - after.double()
    lost, whole = ((one @ moment * one).sum() for one in (difference, before))
    return float(lost / whole.clamp(min=1e-300))


def _sweep(part: Tensor, inverse: Tensor, scale: Tensor, choice: Choice) -> Tensor:
    """Prune `part` (out, columns) in place; gives the errors (out, columns) in units of `scale` (columns,)."""
    errors, width = torch.zeros_like(part), part.shape[1]
    step = choice.columns or width
    kept = torch.ones_like(part, dtype=torch.bool)
    for place in range(width):
        if place % step == 0:
            ahead = slice(place, place + step)
            kept[:, ahead] = choice.keep((part[:, ahead] / scale[ahead]).square())
        gone = torch.where(kept[:, place], 0.0, part[:, place])
        errors[:, place] = gone / scale[place]
        part[:, place] -= gone
        part[:, place + 1 :] -= errors[:, place, None] * inverse[place, place + 1 :]
    return errors
