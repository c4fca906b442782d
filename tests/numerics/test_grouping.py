"""Groups of heads: by order, by likeness, and shares in proportion to norms."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from compress.numerics.grouping import alike, in_order, proportional


def within(similarity: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> float:
    return sum(float(similarity[one, other]) for group in groups for one, other in combinations(group, 2))


def test_contiguous_groups():
    assert in_order([2, 1, 3]) == ((0, 1), (2,), (3, 4, 5))


def test_heads_that_are_equal_come_together():
    kinds = torch.tensor([0, 1, 2, 0, 2, 1, 1, 2, 0])
    similarity = (kinds[:, None] == kinds).double()
    assert alike(similarity, 3) == ((0, 3, 8), (1, 5, 6), (2, 4, 7))


def test_groups_are_of_one_size_and_at_least_as_alike_as_neighbours():
    for seed in range(20):
        torch.manual_seed(seed)
        features = torch.randn(12, 5).double()
        similarity = features @ features.T
        groups = alike(similarity, 4)
        assert sorted(head for group in groups for head in group) == list(range(12))
        assert {len(group) for group in groups} == {3}
        assert within(similarity, groups) >= within(similarity, in_order([3] * 4)) - 1e-9


def test_all_or_one_group():
    similarity = torch.rand(4, 4)
    assert alike(similarity, 1) == ((0, 1, 2, 3),)
    assert alike(similarity, 4) == ((0,), (1,), (2,), (3,))


@pytest.mark.parametrize(
    ("norms", "total", "shares"),
    [
        ([1.0, 1.0, 1.0], 6, (2, 2, 2)),
        ([3.0, 1.0], 8, (6, 2)),
        ([5.0, 0.0, 5.0], 6, (2, 1, 3)),
        ([100.0, 1.0, 1.0, 1.0], 5, (2, 1, 1, 1)),
        ([0.0, 0.0], 4, (2, 2)),
        ([40.0, 45.0, 50.0, 55.0, 60.0, 65.0], 12, (2, 2, 2, 2, 2, 2)),
    ],
)
def test_shares_follow_norms_and_none_is_empty(norms, total, shares):
    assert proportional(norms, total) == shares


def test_shares_always_add_up():
    for seed in range(50):
        torch.manual_seed(seed)
        shares = proportional(torch.rand(5).pow(4).tolist(), 16)
        assert sum(shares) == 16
        assert min(shares) >= 1


def test_too_few_to_share():
    with pytest.raises(ValueError, match="2 cannot be shared by 3 with at least 1 each"):
        proportional([1.0, 1.0, 1.0], 2)
