"""Truncated SVDs in a metric, and what ranks a budget buys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.numerics.low_rank import (
    Offer,
    Spectrum,
    allocate,
    decompose,
    refitted,
    root,
    uniform_ranks,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count: int, features: int) -> Tensor:
    """Rows whose channels depend on each other, with very different sizes."""
    return normal(count, features) @ normal(features, features, seed=1) * torch.logspace(0, 2, features)


WEIGHT = normal(12, 20, seed=2)
X = correlated(500, 20)
G = correlated(400, 12)


def approximation(spectrum: Spectrum, rank: int) -> Tensor:
    expand, reduce = spectrum.factors(rank)
    assert (expand.shape, reduce.shape) == ((12, rank), (rank, 20))
    return expand @ reduce


def test_full_rank_is_the_weight():
    for metric in ((None, None), (root(X.T @ X), None), (root(X.T @ X), root(G.T @ G))):
        torch.testing.assert_close(approximation(decompose(WEIGHT, *metric), 12), WEIGHT, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_it_is_the_singular_value_decomposition_in_the_metric(shape):
    """Wide and tall weights go by Gram matrices of different sides."""
    weight = normal(*shape, seed=4)
    inputs, outputs = root(moment(shape[1])), root(moment(shape[0], seed=7))
    spectrum = decompose(weight, inputs, outputs)
    scaled = outputs.T @ weight @ inputs
    u, s, v = torch.linalg.svd(scaled, full_matrices=False)
    torch.testing.assert_close(spectrum.values, s, rtol=1e-9, atol=1e-9 * float(s[0]))
    for rank in (1, 5, 12):
        expand, reduce = spectrum.factors(rank)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(
            outputs.T @ expand @ reduce @ inputs, best, rtol=0, atol=1e-8 * float(s[0])
        )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_factors_share_the_singular_values_of_their_product(shape):
    expand, reduce = decompose(normal(*shape, seed=4), root(moment(shape[1]))).factors(5)
    values = torch.linalg.svdvals(expand @ reduce)[:5].sqrt()
    torch.testing.assert_close(torch.linalg.svdvals(expand), values)
    torch.testing.assert_close(torch.linalg.svdvals(reduce), values)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_weight_of_low_rank_has_all_factors(shape):
    """Of a rank above the weight's own: the rest is rounding, and harms nothing."""
    planted = normal(shape[0], 3) @ normal(3, shape[1], seed=5)
    for weight in (planted, torch.zeros(shape)):
        expand, reduce = decompose(weight, root(moment(shape[1]))).factors(8)
        torch.testing.assert_close(expand @ reduce, weight.double(), rtol=0, atol=1e-7)


def moment(features: int, seed: int = 6) -> Tensor:
    rows = normal(400, features, seed=seed) * torch.logspace(0, 1, features)
    return rows.T @ rows


def test_the_error_on_the_inputs_is_what_the_dropped_values_say():
    spectrum = decompose(WEIGHT, root(X.T @ X))
    for rank in (1, 5, 11):
        lost = (X @ (WEIGHT - approximation(spectrum, rank)).T).square().sum()
        # The damping of the metric is the difference.
        torch.testing.assert_close(lost, spectrum.errors()[rank], rtol=1e-3, atol=0)


def test_whitened_is_best_on_its_inputs():
    def lost(spectrum: Spectrum) -> float:
        return float((X @ (WEIGHT - approximation(spectrum, 6)).T).square().sum())

    whitened = lost(decompose(WEIGHT, root(X.T @ X)))
    scaled = lost(decompose(WEIGHT, X.abs().mean(0).sqrt().diag()))
    plain = lost(decompose(WEIGHT))
    assert whitened < 0.9 * scaled
    assert whitened < 0.9 * plain


def test_two_sided_is_best_under_both_moments():
    def lost(spectrum: Spectrum) -> float:
        difference = WEIGHT - approximation(spectrum, 6)
        return float((G @ difference @ X.T).square().sum())

    both, inputs = decompose(WEIGHT, root(X.T @ X), root(G.T @ G)), decompose(WEIGHT, root(X.T @ X))
    assert lost(both) < 0.5 * lost(inputs)
    torch.testing.assert_close(lost(both), float(both.errors()[6]), rtol=1e-3, atol=0)


def test_an_even_metric_changes_nothing():
    even = 7.0 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(
        approximation(decompose(WEIGHT, root(even)), 5), approximation(decompose(WEIGHT), 5)
    )


def test_a_planted_rank_is_found():
    planted = normal(12, 3) @ normal(3, 20, seed=5)
    spectrum = decompose(planted, root(X.T @ X))
    torch.testing.assert_close(approximation(spectrum, 3), planted)
    assert spectrum.errors()[3] < 1e-12 * spectrum.errors()[0]


def test_zero_moments_have_no_root():
    with pytest.raises(ValueError, match="the second moment is zero"):
        root(torch.zeros(3, 3))


def test_a_singular_moment_has_a_root():
    once = normal(1, 20)
    found = root(once.T @ once)
    torch.testing.assert_close(found @ found.T, once.T @ once, rtol=0, atol=1e-5)


# The update.


def lost(expand: Tensor, reduce: Tensor) -> float:
    return float((X @ (WEIGHT - expand @ reduce).T).square().sum())


def test_a_refit_is_least_squares():
    expand, reduce = decompose(WEIGHT).factors(5)
    expected = torch.linalg.lstsq(X @ reduce.T, X @ WEIGHT.T).solution.T
    # The ridge is the difference.
    torch.testing.assert_close(refitted(WEIGHT, expand, reduce, X.T @ X), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_a_refit_never_loses_more(rank):
    for metric in ((None, None), (X.abs().mean(0).diag(), None), (None, root(G.T @ G))):
        expand, reduce = decompose(WEIGHT, *metric).factors(rank)
        assert lost(refitted(WEIGHT, expand, reduce, X.T @ X), reduce) < lost(expand, reduce)
    expand, reduce = decompose(WEIGHT, root(X.T @ X)).factors(rank)
    assert lost(refitted(WEIGHT, expand, reduce, X.T @ X), reduce) <= lost(expand, reduce) * (1 + 1e-9)


def test_a_refit_of_full_rank_is_the_weight():
    expand, reduce = decompose(WEIGHT, root(X.T @ X)).factors(12)
    torch.testing.assert_close(refitted(WEIGHT, expand, reduce, X.T @ X) @ reduce, WEIGHT, rtol=0, atol=1e-7)


def test_a_refit_leaves_what_the_inputs_do_not_show():
    expand, reduce = decompose(WEIGHT).factors(5)
    assert torch.equal(refitted(WEIGHT, expand, reduce, torch.zeros(20, 20)), expand)
    once = X[:1]  # one direction of five
    found = refitted(WEIGHT, expand, reduce, once.T @ once)
    torch.testing.assert_close(once @ (found @ reduce).T, once @ WEIGHT.T, rtol=1e-3, atol=1e-3)
    assert int(torch.linalg.matrix_rank(found - expand, rtol=1e-9)) == 1


# Ranks.


def offer(values: list[float], shape: tuple[int, int] = (8, 8), dense: float = 64.0) -> Offer:
    squares = torch.tensor(values, dtype=torch.float64)
    errors = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    return Offer(shape, errors, dense)


def test_ranks_save_something():
    assert offer([1.0] * 8).ranks(1) == [1, 2, 3]  # 4 * 16 = 64 is the dense cost
    assert offer([1.0] * 8).ranks(2) == [2]
    assert offer([1.0] * 8).ranks(4) == []


def test_uniform_ranks_keep_a_share_of_each():
    offers = [offer([1.0] * 8), offer([1.0] * 8, (8, 24), 192.0)]
    assert uniform_ranks(offers, 0.5, 1) == [2, 3]
    assert uniform_ranks(offers, 0.2, 1) == [None, 1]


def test_the_budget_goes_where_it_hurts():
    flat, steep = offer([1.0] * 8), offer([9.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert allocate([flat, steep], 80.0, 1) == [None, 1]


def test_the_budget_is_kept_and_used():
    generator = torch.Generator().manual_seed(0)
    offers = [
        Offer((64, 64), decompose(torch.randn(64, 64, generator=generator) * scale).errors(), 4096.0)
        for scale in (0.1, 1.0, 3.0, 0.5)
    ]
    for share in (0.9, 0.6, 0.31):
        ranks = allocate(offers, share * 4 * 4096, 4)
        spent = sum(one.cost(rank) for one, rank in zip(offers, ranks, strict=True))
        assert share * 4 * 4096 - 4 * 128 < spent <= share * 4 * 4096  # four ranks cost 512
        assert all(rank is None or rank % 4 == 0 for rank in ranks)


def test_a_budget_below_the_smallest_ranks():
    with pytest.raises(ValueError, match="the smallest ranks cost more than the budget"):
        allocate([offer([1.0] * 8)], 15.0, 1)
