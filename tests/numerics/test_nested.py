"""Nested factors: their order, the errors of their cuts, and the step that shrinks their tails."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.low_rank import decompose, root
from compress.numerics.nested import cut_errors, nested, tail_scales


def roots(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    inputs, gradients = (torch.randn(40, size, dtype=torch.float64) for size in (width, out))
    return root(inputs.T @ inputs), root(gradients.T @ gradients)


def test_all_components_together_are_the_weight():
    torch.manual_seed(0)
    weight = torch.randn(9, 6, dtype=torch.float64)
    expand, reduce = nested(decompose(weight, *roots(9, 6)))
    torch.testing.assert_close(expand @ reduce, weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(expand.norm(dim=0), reduce.norm(dim=1))


@pytest.mark.parametrize("metric", [False, True])
def test_the_first_components_are_the_best_of_their_rank(metric):
    torch.manual_seed(0)
    weight = torch.randn(9, 6, dtype=torch.float64)
    inputs, outputs = roots(9, 6) if metric else (None, None)
    spectrum = decompose(weight, inputs, outputs)
    expand, reduce = nested(spectrum)
    torch.testing.assert_close(cut_errors(expand, reduce, inputs, outputs), spectrum.errors())
    for rank in range(1, 7):
        best = torch.matmul(*spectrum.factors(rank))
        torch.testing.assert_close(expand[:, :rank] @ reduce[:rank], best, rtol=1e-8, atol=1e-8)


def test_the_error_of_a_cut_is_that_of_what_is_cut_off():
    torch.manual_seed(0)
    expand, reduce = torch.randn(9, 5), torch.randn(5, 6)
    inputs, outputs = roots(9, 6)
    found = cut_errors(expand, reduce, inputs, outputs)
    for rank in range(6):
        gone = expand[:, rank:].double() @ reduce[rank:].double()
        assert float(found[rank]) == pytest.approx(float((outputs.T @ gone @ inputs).square().sum()))


def test_the_step_that_shrinks_tails_is_the_proximal_one():
    """Against a search: it makes half the squared distance plus the penalty as small as nothing near it does."""
    torch.manual_seed(0)
    columns, amount = torch.randn(4, 5, dtype=torch.float64), 0.3

    def objective(found: torch.Tensor) -> torch.Tensor:
        tails = sum(found[:, number:].norm() for number in range(5))
        return 0.5 * (found - columns).square().sum() + amount * tails

    stepped = columns * tail_scales(columns.norm(dim=0), amount)
    value = objective(stepped)
    for _ in range(200):
        assert objective(stepped + 0.05 * torch.randn_like(stepped)) > value
    # At zero the objective has an edge; each smaller step towards the start must not gain either.
    for share in (1e-3, 1e-2, 0.1):
        assert objective(stepped + share * (columns - stepped)) >= value


def test_the_last_columns_go_first_and_a_large_step_takes_all():
    lengths = torch.ones(6)
    scales = tail_scales(lengths, 0.4)
    assert (scales[:-1] > scales[1:]).all()
    assert scales[-1] < scales[0]
    assert not tail_scales(lengths, 10.0).any()
    assert torch.equal(tail_scales(lengths, 0.0), lengths)
    assert not tail_scales(torch.zeros(3), 0.5).any()
