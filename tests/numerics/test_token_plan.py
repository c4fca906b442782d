"""Plans of token reduction: one matrix, computed in two ways."""

import pytest
import torch

from compress.numerics.token_choice import prune_plan, tome_plan, transform_plan
from compress.numerics.token_plan import TokenPlan, merge_by_matrix

BATCH, COUNT, CHANNELS, LEFT, PROTECTED = 3, 21, 8, 13, 2


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, COUNT, CHANNELS, generator=generator)
    size = torch.randint(1, 5, (BATCH, COUNT), generator=generator).float()
    return hidden, size


def plans():
    hidden, size = states()
    keys = torch.randn(BATCH, 2, COUNT, 4, generator=torch.Generator().manual_seed(1))
    scores = torch.rand(BATCH, COUNT, generator=torch.Generator().manual_seed(2))
    return {
        "transform": transform_plan(hidden, size, LEFT, PROTECTED),
        "tome": tome_plan(keys, size, LEFT, PROTECTED),
        "prune": prune_plan(scores, LEFT, PROTECTED, False, hidden.dtype),
        "prune, fused": prune_plan(scores, LEFT, PROTECTED, True, hidden.dtype),
    }


@pytest.mark.parametrize("name", plans())
def test_a_plan_is_one_matrix_and_both_ways_give_the_same(name):
    plan, (hidden, size) = plans()[name], states()
    matrix = plan.matrix(COUNT)
    assert matrix.shape == (BATCH, LEFT, COUNT)
    columns = matrix.sum(1)
    lost = COUNT - LEFT if name == "prune" else 0
    assert torch.equal(columns.sum(1), torch.full((BATCH,), float(COUNT - lost)))
    torch.testing.assert_close(plan.merge(hidden, size), merge_by_matrix(plan, hidden, size))
    torch.testing.assert_close(plan.add(size), (matrix @ size[..., None])[..., 0])
    ones = torch.ones(BATCH, COUNT, 1)
    torch.testing.assert_close(plan.merge(ones, size), torch.ones(BATCH, LEFT, 1))
    torch.testing.assert_close(plan.merge(hidden, size)[:, :PROTECTED], hidden[:, :PROTECTED])


@pytest.mark.parametrize("name", plans())
def test_owners_say_where_each_token_went(name):
    plan = plans()[name]
    owner, alive = plan.owners()
    shares = plan.matrix(COUNT).gather(1, owner[:, None, :])[:, 0]
    assert torch.equal(shares, alive.float())


@pytest.mark.parametrize("name", ["transform", "tome", "prune, fused"])
def test_merging_keeps_the_sum_of_sizes(name):
    plan, (_, size) = plans()[name], states()
    torch.testing.assert_close(plan.add(size).sum(1), size.sum(1))


def test_transform_merges_equal_tokens_first():
    hidden, size = states()
    hidden[:, PROTECTED + 4] = hidden[:, PROTECTED + 1]
    plan = transform_plan(hidden, size, COUNT - 1, PROTECTED)
    assert torch.equal(plan.moved, torch.full((BATCH, 1), PROTECTED + 4))
    owner, _ = plan.owners()
    assert torch.equal(owner[:, PROTECTED + 4], owner[:, PROTECTED + 1])


def test_transform_spares_large_tokens():
    """Of two pairs as far apart, the smaller one merges: the squared error grows with the sizes."""
    hidden = torch.tensor([[[0.0, 1, 2, 9], [0, 1, 2, 8], [5, 1, 2, 3], [4, 1, 2, 3]]])
    hidden = torch.nn.functional.layer_norm(hidden, (4,))
    hidden[:, 3] = hidden[:, 2] + (hidden[:, 1] - hidden[:, 0]).roll(1, -1)
    size = torch.tensor([[9.0, 9, 1, 1]])
    assert transform_plan(hidden, size, 3, 0).moved.tolist() == [[2]]


def test_padding_goes_first_and_takes_nothing_in():
    hidden, size = states()
    size[:, -6:] = 0
    for plan in (transform_plan(hidden, size, LEFT, PROTECTED), plans()["transform"]):
        assert plan.moved.shape == (BATCH, COUNT - LEFT)
    plan = transform_plan(hidden, size, LEFT, PROTECTED)
    took = plan.matrix(COUNT)[:, :, : COUNT - 6].sum(2) > 0
    assert bool((plan.add(size) > 0)[took].all())
    assert torch.equal(plan.add(size) > 0, took)
    assert bool((plan.moved >= COUNT - 6).any(1).all())


def test_a_plan_does_not_depend_on_the_batch():
    hidden, size = states()
    whole, one = (
        transform_plan(hidden, size, LEFT, PROTECTED),
        transform_plan(hidden[1:2], size[1:2], LEFT, PROTECTED),
    )
    assert torch.equal(whole.matrix(COUNT)[1:2], one.matrix(COUNT))


def test_a_matrix_of_shares_may_spread_a_token():
    plan = TokenPlan(torch.tensor([[0, 1]]), torch.tensor([[2]]), torch.tensor([[[0.25], [0.75]]]))
    merged = plan.merge(torch.tensor([[[0.0], [1.0], [2.0]]]), torch.ones(1, 3))
    torch.testing.assert_close(merged, torch.tensor([[[0.5 / 1.25], [2.5 / 1.75]]]))
