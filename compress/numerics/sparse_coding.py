"""Sparse coding: rows as sums of a few atoms of a small dictionary each, and the dictionary that suits them.

The start of DSFormer (Chand et al. 2023, arXiv 2312.13211): a matrix W (rows, width) becomes S D with a small dense
dictionary D (atoms, width) and codes S (rows, atoms) that have the same count of non-zeros in each row. Codes come from
orthogonal matching pursuit, dictionaries from least squares, in turn. With the errors of a layer's outputs in mind W is
multiplied by a root of the second moment of its inputs before (after CoSpaDi, arXiv 2509.22075), and D by its inverse
after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from compress.numerics.bit_masks import packed_width

CHUNK = 128
"""Rows at a time: what matching pursuit remembers of them stays in the caches."""
ROUNDS = 8


class Coded(NamedTuple):
    """Codes (rows, atoms), a dictionary (atoms, width) of unit rows, and the squared error of their product."""

    codes: Tensor
    atoms: Tensor
    error: float


def pursue(rows: Tensor, atoms: Tensor, count: int) -> Tensor:
    """Orthogonal matching pursuit: codes (rows, atoms) of `rows` (rows, width) in `atoms` (atoms, width), with at most
    `count` non-zeros a row. Ties go to the first atom; a row that is matched before stops.
    """
    gram = atoms @ atoms.T
    return torch.cat([_pursued(part @ atoms.T, gram, count) for part in rows.split(CHUNK)])


def _pursued(matches: Tensor, gram: Tensor, count: int) -> Tensor:
    """`matches` (rows, atoms) are products of rows and atoms, `gram` (atoms, atoms) those of atoms.

    Atoms are made orthogonal as they are picked (Gram and Schmidt), seen by their products with all atoms: the residual
    is never formed.
    """
    rows, size = matches.shape
    count = min(count, size)
    number = torch.arange(rows)
    lengths = gram.diagonal().clamp(min=1e-12).sqrt()
    free = torch.ones(rows, size, dtype=torch.bool)
    basis = matches.new_zeros(rows, count, size)
    left = matches.clone()
    for place in range(count):
        best = torch.where(free, left.abs() / lengths, -1.0).argmax(1)
        free[number, best] = False
        before = basis[:, :place]
        shares = before[number, :, best]
        fresh = gram[best] - torch.einsum("nk,nkr->nr", shares, before)
        energy = fresh[number, best]
        fresh = torch.where(
            (energy > 1e-6 * gram[best, best])[:, None], fresh / energy.clamp(min=1e-12).sqrt()[:, None], 0.0
        )
        basis[:, place] = fresh
        gain = left[number, best] / energy.clamp(min=1e-12).sqrt()
        left = left - gain[:, None] * fresh
    return fitted(matches, gram, ~free)


def fitted(matches: Tensor, gram: Tensor, support: Tensor) -> Tensor:
    """The least squares codes (rows, atoms) on `support` (rows, atoms), which has as many atoms in each row."""
    rows, size = support.shape
    picked = support.nonzero()[:, 1].view(rows, -1)
    systems = gram[picked[:, :, None], picked[:, None, :]]
    # Enough for rounding: atoms that depend on each other leave no equation to solve.
    ridge = (
        10
        * torch.finfo(gram.dtype).eps
        * gram.diagonal().mean()
        * torch.eye(picked.shape[1], dtype=gram.dtype)
    )
    wanted = matches.gather(1, picked)[:, :, None]
    solved = torch.cholesky_solve(wanted, torch.linalg.cholesky(systems + ridge))[:, :, 0]
    return matches.new_zeros(rows, size).scatter(1, picked, solved)


def stored_bytes(rows: int, side: int, size: int, count: int, item: int) -> int:
    """What codes (rows, size) of `count` non-zeros and a dictionary (size, side) take: numbers of `item` bytes, and
    a bit for each place of a code."""
    return item * (rows * count + size * side) + rows * packed_width(size)


def affordable(rows: int, side: int, size: int, budget: float, item: int) -> int:
    """The most non-zeros a row that `stored_bytes` of at most `budget` buy beside a dictionary of `size`; 0: none."""
    left = budget - stored_bytes(rows, side, size, 0, item)
    return max(0, min(size, int(left // (item * rows))))


def learn_dictionary(
    rows: Tensor, size: int, count: int, generator: Generator, rounds: int = ROUNDS
) -> Coded:
    """A dictionary of `size` atoms in which `rows` (rows, width) have good codes of `count` non-zeros.

    It begins with random rows. An atom that no row uses becomes the row with the worst code. The best of all rounds.
    """
    atoms = _unit(rows[_seeds(len(rows), size, generator)])
    best: Coded | None = None
    for _ in range(rounds):
        codes = pursue(rows, atoms, count)
        made = codes @ atoms
        error = float((rows - made).square().sum())
        if best is None or error < best.error:
            best = Coded(codes, atoms, error)
        atoms = _unit(_refitted(rows, codes, atoms, made))
    assert best is not None
    return best


def refitted_atoms(rows: Tensor, codes: Tensor, atoms: Tensor, moment: Tensor) -> Tensor:
    """The dictionary (atoms, width) that goes best with `codes`, where errors E of `rows` (rows, width) count as
    trace(Eᵀ `moment` E), `moment` being (rows, rows). Atoms that no code uses stay as they are."""
    seen = moment @ codes
    system = codes.T @ seen
    system.diagonal().add_(1e-8 * float(system.diagonal().mean().clamp(min=1e-30)))
    return atoms + torch.linalg.solve(system, seen.T @ (rows - codes @ atoms))


def _refitted(rows: Tensor, codes: Tensor, atoms: Tensor, made: Tensor) -> Tensor:
    """The least squares dictionary for `codes`; unused atoms become the rows that are represented worst."""
    products = codes.T @ codes
    ridge = 1e-8 * products.diagonal().mean().clamp(min=1e-30) * torch.eye(len(products), dtype=rows.dtype)
    found = torch.linalg.solve(products + ridge, codes.T @ rows + ridge @ atoms)
    dead = (codes != 0).sum(0) == 0
    worst = (rows - made).square().sum(1).argsort(descending=True)
    if dead.any():
        found[dead] = rows[worst[: int(dead.sum())]]
    return found


def _unit(atoms: Tensor) -> Tensor:
    return atoms / atoms.norm(dim=1, keepdim=True).clamp(min=1e-12)


def _seeds(rows: int, size: int, generator: Generator) -> Tensor:
    """`size` row numbers, all before any comes twice."""
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-size // rows))])
    return order[:size]
