"""Plans of token reduction: one matrix, computed in two ways."""

import pytest
import torch

from compress.numerics.token_choice import prune_plan, sample_plan, tome_plan, transform_plan
from compress.numerics.token_plan import precedes, ranks

BATCH, COUNT, CHANNELS, LEFT, PROTECTED = 3, 21, 8, 13, 2


def states(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, COUNT, CHANNELS, generator=generator)
    size = torch.randint(1, 5, (BATCH, COUNT), generator=generator).float()
    return hidden, size


def scores():
    return torch.rand(BATCH, COUNT, generator=torch.Generator().manual_seed(2))


def plans(device="cpu"):
    hidden, size = (one.to(device) for one in states())
    keys = torch.randn(BATCH, 2, COUNT, 4, generator=torch.Generator().manual_seed(1)).to(device)
    looks = scores().to(device)
    return {
        "transform": transform_plan(hidden, size, LEFT, PROTECTED),
        "tome": tome_plan(keys, size, LEFT, PROTECTED),
        "prune": prune_plan(looks, LEFT, PROTECTED, False),
        "prune, fused": prune_plan(looks, LEFT, PROTECTED, True),
        "sample": sample_plan(looks, LEFT, PROTECTED, COUNT)[0],
    }


def moved(plan):
    """(batch, tokens): which do not stay."""
    return torch.ones_like(plan.place, dtype=torch.bool).scatter(1, plan.founders(), False)


LOSING = ("prune", "sample")


@pytest.mark.parametrize("name", plans())
def test_a_plan_is_one_matrix_and_both_ways_give_the_same(name):
    plan, (hidden, size) = plans()[name], states()
    matrix = plan.shares(torch.float32)
    assert matrix.shape == (BATCH, LEFT, COUNT)
    columns = matrix.sum(1)
    lost = COUNT - LEFT if name in LOSING else 0
    assert torch.equal(columns.sum(1), torch.full((BATCH,), float(COUNT - lost)))
    merged, mass = plan.merge(hidden, size)
    torch.testing.assert_close(plan.gather(hidden, size), (merged, mass))
    torch.testing.assert_close(plan.gather(hidden), plan.merge(hidden, torch.ones_like(size)))
    torch.testing.assert_close(mass, (matrix @ size[..., None])[..., 0])
    torch.testing.assert_close(merged * mass[..., None], matrix @ (hidden * size[..., None]))
    ones = torch.ones(BATCH, COUNT, 1)
    torch.testing.assert_close(plan.merge(ones, size)[0], torch.ones(BATCH, LEFT, 1))
    torch.testing.assert_close(merged[:, :PROTECTED], hidden[:, :PROTECTED])


@pytest.mark.parametrize("name", plans())
def test_founders_are_part_of_their_output(name):
    plan = plans()[name]
    outputs = plan.place.gather(1, plan.founders())
    kept = LEFT - 1 if name == "prune, fused" else LEFT
    assert torch.equal(outputs, torch.arange(kept).expand(BATCH, -1))
    assert torch.equal(plan.founders()[:, :PROTECTED], torch.arange(PROTECTED).expand(BATCH, -1))


@pytest.mark.parametrize("name", ["transform", "tome", "prune, fused"])
def test_merging_keeps_the_sum_of_sizes(name):
    plan, (_, size) = plans()[name], states()
    torch.testing.assert_close(plan.merge(torch.zeros(BATCH, COUNT, 1), size)[1].sum(1), size.sum(1))


def test_transform_merges_equal_tokens_first():
    hidden, size = states()
    hidden[:, PROTECTED + 4] = hidden[:, PROTECTED + 1]
    plan = transform_plan(hidden, size, COUNT - 1, PROTECTED)
    gone = torch.arange(COUNT).expand(BATCH, -1)[moved(plan)]
    assert torch.equal(gone, torch.full((BATCH,), PROTECTED + 4))
    assert torch.equal(plan.place[:, PROTECTED + 4], plan.place[:, PROTECTED + 1])


def test_transform_without_sizes_is_transform_with_ones():
    hidden, _ = states()
    plans = [transform_plan(hidden, size, LEFT, PROTECTED) for size in (None, torch.ones(BATCH, COUNT))]
    assert torch.equal(plans[0].place, plans[1].place)


def test_transform_spares_large_tokens():
    """Of two pairs as far apart, the smaller one merges: the squared error grows with the sizes."""
    hidden = torch.tensor([[[0.0, 1, 2, 9], [0, 1, 2, 8], [5, 1, 2, 3], [4, 1, 2, 3]]])
    hidden = torch.nn.functional.layer_norm(hidden, (4,))
    hidden[:, 3] = hidden[:, 2] + (hidden[:, 1] - hidden[:, 0]).roll(1, -1)
    size = torch.tensor([[9.0, 9, 1, 1]])
    assert moved(transform_plan(hidden, size, 3, 0)).tolist() == [[False, False, True, False]]


def test_padding_goes_first_and_takes_nothing_in():
    hidden, size = states()
    size[:, -6:] = 0
    plan = transform_plan(hidden, size, LEFT, PROTECTED)
    took = plan.shares(torch.float32)[:, :, : COUNT - 6].sum(2) > 0
    assert bool((plan.merge(torch.zeros(BATCH, COUNT, 1), size)[1] > 0)[took].all())
    assert torch.equal(plan.merge(torch.zeros(BATCH, COUNT, 1), size)[1] > 0, took)
    assert bool(moved(plan)[:, -6:].any(1).all())


def test_a_plan_does_not_depend_on_the_batch():
    hidden, size = states()
    whole, one = (
        transform_plan(hidden, size, LEFT, PROTECTED),
        transform_plan(hidden[1:2], size[1:2], LEFT, PROTECTED),
    )
    assert torch.equal(whole.place[1:2], one.place)


def test_prune_keeps_what_is_looked_at_most():
    plan = prune_plan(scores(), LEFT, PROTECTED, True)
    wanted = scores()[:, PROTECTED:].topk(LEFT - PROTECTED - 1, 1).indices + PROTECTED
    assert torch.equal(plan.founders()[:, PROTECTED:], wanted)


def test_ranks_are_the_places_in_a_stable_sort():
    values = torch.randint(0, 4, (5, 30), generator=torch.Generator().manual_seed(0)).float()
    order = values.sort(dim=1, stable=True).indices
    assert torch.equal(ranks(values).gather(1, order), torch.arange(30).expand(5, -1))
    assert torch.equal(precedes(values).diagonal(dim1=1, dim2=2), torch.zeros(5, 30, dtype=torch.bool))


def test_sampling_draws_by_the_inverse_of_the_distribution():
    """Against a plain search of each quantile in the cumulated shares of the sorted scores."""
    values, samples = scores(), 9
    _, drawn = sample_plan(values, LEFT, PROTECTED, samples)
    for row, found in zip(values[:, PROTECTED:].double(), drawn[:, PROTECTED:], strict=True):
        ordered, order = row.sort()
        cumulated = (ordered / ordered.sum()).cumsum(0)
        quantiles = (2 * torch.arange(1, samples + 1).double() - 1) / (2 * samples)
        assert set(order[torch.searchsorted(cumulated, quantiles)].tolist()) == set(
            found.nonzero()[:, 0].tolist()
        )
        assert 1 <= int(found.sum()) <= samples


def test_sampling_keeps_all_equal_scores_and_few_of_peaked_ones():
    even = torch.ones(BATCH, COUNT)
    assert bool(sample_plan(even, COUNT, PROTECTED, COUNT - PROTECTED)[1].all())
    peaked = torch.full((BATCH, COUNT), 1e-4)
    peaked[:, 7] = 1
    drawn = sample_plan(peaked, COUNT, PROTECTED, COUNT - PROTECTED)[1]
    assert drawn[:, PROTECTED:].sum(1).tolist() == [1, 1, 1]
    assert bool(drawn[:, 7].all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", plans())
def test_a_gpu_scatters_and_sorts_to_the_same_plans(name):
    here, there = plans()[name], plans("cuda")[name]
    hidden, size = states()
    for part in ("place", "rank"):
        assert torch.equal(getattr(here, part), getattr(there, part).cpu())
    assert torch.equal(here.shares(torch.float32), there.shares(torch.float32).cpu())
    for wanted, given in zip(here.merge(hidden, size), there.merge(hidden.cuda(), size.cuda()), strict=True):
        torch.testing.assert_close(wanted, given.cpu())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_orders_equal_values_as_they_come():
    values = torch.randint(0, 4, (5, 50), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(ranks(values), ranks(values.cuda()).cpu())
