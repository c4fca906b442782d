"""Sparse codes and the dictionaries that they are written in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.numerics.sparse_coding import (
    affordable,
    fitted,
    learn_dictionary,
    pursue,
    refitted_atoms,
    stored_bytes,
)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def planted(rows: int = 256, width: int = 32, atoms: int = 24, count: int = 4) -> Tensor:
    """Rows that are sums of `count` of few atoms: a union of subspaces."""
    generator = seeded()
    dictionary = torch.randn(atoms, width, generator=generator, dtype=torch.float64)
    codes = torch.zeros(rows, atoms, dtype=torch.float64)
    for row in codes:
        picked = torch.randperm(atoms, generator=generator)[:count]
        row[picked] = torch.randn(count, generator=generator, dtype=torch.float64)
    return codes @ dictionary


def test_a_row_of_few_atoms_is_found_again():
    atoms = torch.linalg.qr(torch.randn(12, 12, generator=seeded(), dtype=torch.float64))[0]
    codes = torch.zeros(5, 12, dtype=torch.float64)
    codes[torch.arange(5), torch.arange(5)], codes[:, 7] = 2.0, -1.0
    torch.testing.assert_close(pursue(codes @ atoms, atoms, 2), codes, rtol=1e-5, atol=1e-5)


def test_as_many_atoms_as_features_give_the_rows_back():
    rows = torch.randn(40, 8, generator=seeded(), dtype=torch.float64)
    made = learn_dictionary(rows, 8, 8, seeded(), rounds=1)
    torch.testing.assert_close(made.codes @ made.atoms, rows, rtol=1e-3, atol=1e-3)


def test_more_non_zeros_never_lose_more():
    rows = torch.randn(300, 16, generator=seeded(), dtype=torch.float64)
    atoms = torch.randn(20, 16, generator=seeded(), dtype=torch.float64)
    errors = []
    for count in range(1, 12):
        codes = pursue(rows, atoms, count)
        assert int((codes != 0).sum(1).max()) <= count
        errors.append(float((rows - codes @ atoms).square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_codes_are_the_least_squares_on_their_support():
    rows = torch.randn(6, 10, generator=seeded(), dtype=torch.float64)
    atoms = torch.randn(14, 10, generator=seeded(), dtype=torch.float64)
    codes = pursue(rows, atoms, 3)
    for row, code in zip(rows, codes, strict=True):
        picked = code.nonzero()[:, 0]
        wanted = torch.linalg.lstsq(atoms[picked].T, row[:, None]).solution[:, 0]
        torch.testing.assert_close(code[picked], wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(fitted(rows @ atoms.T, atoms @ atoms.T, codes != 0), codes)


def test_a_union_of_subspaces_costs_less_than_one_subspace():
    """At equal bytes, with 4 bytes a number and 1 an index, against truncated SVD."""
    rows = planted()
    made = learn_dictionary(rows, 24, 4, seeded())
    stored = 4 * 24 * 32 + (4 + 1) * 4 * 256
    rank = stored // (4 * (256 + 32))
    values = torch.linalg.svdvals(rows)
    assert made.error < 0.5 * float(values[rank:].square().sum())


def test_rounds_pay_and_repeat():
    rows = planted()
    one, many, again = (learn_dictionary(rows, 24, 4, seeded(), rounds) for rounds in (1, 8, 8))
    assert many.error < 0.7 * one.error
    assert torch.equal(many.codes, again.codes)
    assert float((rows - many.codes @ many.atoms).square().sum()) == pytest.approx(many.error)


def test_a_budget_buys_as_many_non_zeros_as_fit():
    assert stored_bytes(1536, 384, 192, 138, 4) == 4 * (1536 * 138 + 192 * 384) + 1536 * 24
    half = 0.5 * 4 * 1536 * 384
    assert affordable(1536, 384, 192, half, 4) == 138
    assert stored_bytes(1536, 384, 192, 138, 4) <= half < stored_bytes(1536, 384, 192, 139, 4)
    assert affordable(1536, 384, 16, half, 4) == 16  # never more than there are atoms
    assert affordable(384, 384, 192, 0.5 * 4 * 384 * 384, 4) == 0  # the dictionary takes it all
    assert (
        affordable(384, 384, 128, 0.5 * 2 * 384 * 384, 2) == 56
    )  # the bits count twice as much beside half the floats


def test_the_refitted_dictionary_is_the_best_in_the_metric_of_the_rows():
    generator = seeded()
    rows = torch.randn(30, 9, generator=generator, dtype=torch.float64)
    atoms = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    codes = pursue(rows, atoms, 3)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    refitted = refitted_atoms(rows, codes, atoms, root @ root.T)
    wanted = torch.linalg.lstsq(root.T @ codes, root.T @ rows).solution
    torch.testing.assert_close(refitted, wanted, rtol=1e-4, atol=1e-4)


def test_an_atom_that_no_code_uses_stays():
    rows, atoms = torch.eye(4, 5, dtype=torch.float64), torch.eye(3, 5, dtype=torch.float64)
    codes = torch.tensor([[1.0, 0, 0]] * 4, dtype=torch.float64)
    assert torch.equal(refitted_atoms(rows, codes, atoms, torch.eye(4, dtype=torch.float64))[1:], atoms[1:])
