"""Tokens on a grid as clusters of a smaller grid, and back."""

from dataclasses import replace

import pytest
import torch

from compress.numerics.token_clusters import Clusters, cluster_plan, neighbourhood, pooling

MORE = Clusters((8, 6), (4, 3), iterations=5, reach=5, nearest=4, temperature=0.5)


def features(channels=16):
    return torch.randn(2, 1 + 48, channels, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("grid", "centres"), [((8, 6), (4, 3)), ((40, 40), (28, 28)), ((7, 5), (3, 4))])
def test_pooling_is_that_of_torch(grid, centres):
    values = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(1))
    wanted = torch.nn.functional.adaptive_avg_pool2d(values, centres).flatten(2)
    torch.testing.assert_close(values.flatten(2) @ pooling(grid, centres).T, wanted)


def test_no_iteration_on_the_same_grid_is_the_identity():
    same = replace(MORE, centres=(8, 6), iterations=0, nearest=1)
    plan = cluster_plan(features(), same, 1)
    torch.testing.assert_close(plan.spread(plan.merge(features())), features())


def test_rows_sum_to_one_so_constants_stay_and_special_tokens_pass():
    plan = cluster_plan(features(), MORE, 1)
    flat = torch.full((2, 49, 3), 0.7)
    torch.testing.assert_close(plan.merge(flat), torch.full((2, 13, 3), 0.7))
    torch.testing.assert_close(plan.spread(plan.merge(flat)), flat)
    assert torch.equal(plan.merge(features())[:, :1], features()[:, :1])
    assert int((plan.back > 0).sum(2).max()) == MORE.nearest


def test_as_many_neighbours_as_centres_is_the_whole_softmax():
    values = features()
    centres = cluster_plan(values, replace(MORE, nearest=12), 1)
    more = cluster_plan(values, replace(MORE, nearest=999), 1)
    assert torch.equal(centres.back, more.back)


def test_a_place_far_away_leaves_a_centre_as_it_is():
    one = replace(MORE, iterations=1, reach=1)
    values, other = features(), features()
    other[:, -1] += 5
    before, after = cluster_plan(values, one, 1), cluster_plan(other, one, 1)
    assert torch.equal(before.merge(values)[:, 1:-1], after.merge(other)[:, 1:-1])
    assert not torch.equal(before.merge(values)[:, -1], after.merge(other)[:, -1])


def test_a_token_reaches_the_centres_around_its_own_cell():
    near = neighbourhood((8, 6), (4, 3), 3)
    assert near.shape == (12, 48)
    assert near[:, 0].reshape(4, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_equal_tokens_of_a_cell_are_given_back_exactly():
    cells = torch.randn(2, 16, 4, 3, generator=torch.Generator().manual_seed(3))
    values = cells.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    sharp = replace(MORE, temperature=1e3)
    plan = cluster_plan(values, sharp, 0)
    torch.testing.assert_close(plan.spread(plan.merge(values)), values)


def test_places_change_as_the_clusters_nearest_to_them_do():
    values = features()
    plan = cluster_plan(values, MORE, 1)
    merged = plan.merge(values)
    torch.testing.assert_close(
        plan.restore(merged, values, merged), values
    )  # nothing has changed: exact, not smoothed
    moved = torch.randn(merged.shape, generator=torch.Generator().manual_seed(2))
    given = plan.restore(merged + moved, values, merged)
    torch.testing.assert_close(given - values, plan.spread(moved))
    assert torch.equal(given[:, :1], (merged + moved)[:, :1])
