"""Which entries become zero, and what the others become."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.numerics.sparsity import (
    Choice,
    by_row,
    inverse_root,
    lost_share,
    of_groups,
    overall,
    pruned,
    sparsegpt,
    wanda_scores,
    without_lowest,
)

OUT, IN = 24, 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


WEIGHT = normal(OUT, IN, seed=1)
X = normal(600, IN) @ normal(IN, IN, seed=2) * torch.logspace(0, 1, IN)
"""Inputs that depend on each other, of different sizes."""
MOMENT = second_moment(X)
CHOICES = {"by row": by_row(0.5), "overall": overall(0.5), "2:4": of_groups(2, 4), "4:8": of_groups(4, 8)}


def lost(weight: Tensor) -> float:
    return float((X @ (weight - WEIGHT).T).square().sum() / (X @ WEIGHT.T).square().sum())


def test_of_equals_the_first_go() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert without_lowest(scores, 2).tolist() == [[False, False, True, True]] * 2
    assert without_lowest(scores, 0).all()


def test_a_share_of_each_row_and_of_all() -> None:
    scores = torch.arange(20.0).view(2, 10)
    assert (~by_row(0.3).keep(scores)).sum(1).tolist() == [3, 3]
    assert (~overall(0.3).keep(scores)).sum(1).tolist() == [6, 0]


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_so_many_of_each_group_stay(kept: int) -> None:
    mask = of_groups(kept, 4).keep(WEIGHT.abs())
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == kept).all()
    largest = WEIGHT.abs().unflatten(1, (-1, 4)).amax(-1)
    assert torch.equal((mask * WEIGHT.abs()).unflatten(1, (-1, 4)).amax(-1), largest)


@pytest.mark.parametrize("block", [8, 12, 128])
@pytest.mark.parametrize("name", CHOICES)
def test_sparsegpt_prunes_as_many_as_it_is_told(name: str, block: int) -> None:
    zeros = sparsegpt(WEIGHT, MOMENT, CHOICES[name], block=block if name != "4:8" else 16) == 0
    if name == "by row" and block != 12:  # which 32 is no multiple of, and half of each part is rounded
        assert (zeros.sum(1) == IN // 2).all()
    if name == "overall":
        assert zeros.sum() == OUT * IN // 2
    if ":" in name:
        kept, size = map(int, name.split(":"))
        assert (zeros.unflatten(1, (-1, size)).sum(-1) == size - kept).all()


def test_sparsegpt_with_nothing_to_prune_is_the_identity() -> None:
    everything = Choice(lambda scores: torch.ones_like(scores, dtype=torch.bool))
    for weight in (WEIGHT, WEIGHT.float()):
        assert torch.equal(sparsegpt(weight, MOMENT, everything), weight)


def test_blocks_change_nothing_for_a_pattern() -> None:
    """What follows a block is updated at its end, and that is the same as at once."""
    one, other = (sparsegpt(WEIGHT, MOMENT, CHOICES["2:4"], block=block) for block in (4, 128))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CHOICES)
def test_the_better_the_score_the_smaller_the_error(name: str) -> None:
    choice = CHOICES[name]
    magnitude = lost(pruned(WEIGHT, WEIGHT.abs(), choice))
    wanda = lost(pruned(WEIGHT, wanda_scores(WEIGHT, MOMENT), choice))
    assert magnitude > 1.05 * wanda
    assert wanda > 1.2 * lost(sparsegpt(WEIGHT, MOMENT, choice))


def test_what_is_left_makes_up_for_a_pruned_input_as_least_squares_would() -> None:
    """Where the first input goes, the others become what least squares makes of them."""
    first = Choice(lambda scores: torch.arange(scores.shape[1]).expand_as(scores) > 0)
    found = sparsegpt(WEIGHT, MOMENT, first, damping=1e-12)
    rest = torch.linalg.lstsq(X[:, 1:], X @ WEIGHT.T).solution.T
    assert not found[:, 0].any()
    torch.testing.assert_close(found[:, 1:], rest, rtol=1e-6, atol=1e-8)


def test_wanda_is_the_magnitude_where_inputs_have_one_norm() -> None:
    moment = MOMENT / MOMENT.diagonal().sqrt().outer(MOMENT.diagonal().sqrt())
    for choice in CHOICES.values():
        by_wanda = pruned(WEIGHT, wanda_scores(WEIGHT, moment), choice)
        assert torch.equal(by_wanda, pruned(WEIGHT, WEIGHT.abs(), choice))


def test_without_correlation_sparsegpt_is_wanda() -> None:
    moment = MOMENT.diagonal().diag()
    # The damping adds to small inputs more than to large ones.
    found = sparsegpt(WEIGHT, moment, CHOICES["2:4"], damping=1e-12)
    expected = pruned(WEIGHT, wanda_scores(WEIGHT, moment), CHOICES["2:4"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CHOICES)
def test_inputs_that_are_always_zero_lose_their_weights_first_and_change_no_other(name: str) -> None:
    dead = torch.zeros(IN, dtype=torch.bool)
    dead[::8] = True
    moment = MOMENT * ~dead[:, None] * ~dead
    found = sparsegpt(WEIGHT, moment, CHOICES[name])
    assert found.isfinite().all()
    assert not found[:, dead].any()
    everything = Choice(lambda scores: torch.ones_like(scores, dtype=torch.bool))
    assert torch.equal(sparsegpt(WEIGHT, moment, everything), WEIGHT)
    assert not pruned(WEIGHT, wanda_scores(WEIGHT, moment), CHOICES[name])[:, dead].any()


def test_the_root_of_the_inverse() -> None:
    root = inverse_root(MOMENT, 0.01)
    damped = MOMENT + 0.01 * MOMENT.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(damped), rtol=1e-8, atol=1e-12)
    assert torch.equal(root, root.triu())


def test_few_rows_are_damped_until_they_have_an_inverse() -> None:
    few = second_moment(X[:3]) - 1e-9 * torch.eye(IN)  # as rounding leaves it
    root = inverse_root(few, 1e-14)
    assert root.isfinite().all()
    assert sparsegpt(WEIGHT, few, CHOICES["2:4"], damping=1e-14).isfinite().all()
    with pytest.raises(ValueError, match="the second moment is zero"):
        inverse_root(torch.zeros(3, 3), 0.01)


def test_the_type_stays_and_the_result_repeats() -> None:
    half = WEIGHT.half()
    found = sparsegpt(half, MOMENT, CHOICES["2:4"])
    assert found.dtype == torch.float16
    assert torch.equal(found, sparsegpt(half, MOMENT, CHOICES["2:4"]))
    assert torch.equal(half, WEIGHT.half())


def test_the_lost_share_is_that_of_the_outputs() -> None:
    after = pruned(WEIGHT, WEIGHT.abs(), CHOICES["2:4"])
    assert lost_share(WEIGHT, after, MOMENT) == pytest.approx(lost(after))
    assert lost_share(WEIGHT, torch.zeros_like(WEIGHT), MOMENT) == pytest.approx(1)
