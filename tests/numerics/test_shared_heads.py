"""The head that stands for several: exact where they are equal, best in the least squares, and fit for rotations."""

from __future__ import annotations

import pytest
import torch

from compress.numerics.low_rank import root
from compress.numerics.shared_heads import Layout, cosines, joint, likeness

HALVES = ((0, 3), (1, 4), (2, 5))


def moment(size: int) -> torch.Tensor:
    rows = torch.randn(4 * size, size).double()
    return rows.T @ rows / len(rows)


def energies(*shape: int) -> torch.Tensor:
    return torch.eye(shape[-1]).double().expand(*shape, shape[-1]) * (
        1 + torch.rand(*shape[:-1], 1, 1).double()
    )


@pytest.mark.parametrize("pairs", [(), HALVES, ((0, 1), (2, 3))])
def test_a_head_is_put_together_as_it_was(pairs):
    torch.manual_seed(0)
    maps, layout = torch.randn(4, 6, 9).double(), Layout(6, pairs)
    blocks = layout.split(maps)
    assert [one.shape[0] for one in blocks] == [len(pairs), 1]
    assert torch.equal(layout.join(blocks), maps)


def test_blocks_of_pairs_commute_with_rotations():
    torch.manual_seed(0)
    layout = Layout(6, HALVES)
    x = torch.randn(1, 6, 1).double()
    angles = torch.rand(3).double()

    def rotate(head: torch.Tensor) -> torch.Tensor:
        first, second = head[:, :3], head[:, 3:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], 1)

    lifts = torch.randn(3, 1, 1, 1, dtype=torch.complex128)

    def lift(head: torch.Tensor) -> torch.Tensor:
        turned, rest = layout.split(head)
        return layout.join([lifts @ turned, rest])

    torch.testing.assert_close(lift(rotate(x)), rotate(lift(x)))


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_equal_heads_are_made_exactly(kind):
    torch.manual_seed(0)
    head = torch.randn(2, 1, 3, 8, dtype=kind)
    maps = head.expand(2, 4, 3, 8)
    shared, lifts = joint(maps, energies(2, 4, 3).to(kind), root(moment(8)))
    torch.testing.assert_close(lifts @ shared[:, None], maps, rtol=1e-9, atol=1e-9)


def test_heads_that_maps_make_of_one_are_made_exactly():
    torch.manual_seed(0)
    maps = torch.randn(1, 4, 3, 3).double() @ torch.randn(1, 1, 3, 8).double()
    shared, lifts = joint(maps, energies(1, 4, 3), root(moment(8)))
    torch.testing.assert_close(lifts @ shared[:, None], maps, rtol=1e-9, atol=1e-9)
    squares = (lifts.mH @ lifts).mean(1)
    torch.testing.assert_close(squares, torch.eye(3).double()[None], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
def test_no_small_change_is_better(kind):
    torch.manual_seed(0)
    maps, weights, second = torch.randn(1, 3, 2, 6, dtype=kind), energies(1, 3, 2), moment(6)
    weights = weights.to(kind)

    def error(shared: torch.Tensor, lifts: torch.Tensor) -> float:
        missing = maps - lifts @ shared[:, None]
        return float((weights @ missing @ second.to(kind) @ missing.mH).diagonal(dim1=-2, dim2=-1).real.sum())

    shared, lifts = joint(maps, weights, root(second))
    best = error(shared, lifts)
    mean = maps.mean(1)
    assert best < error(mean, torch.eye(2, dtype=kind).expand(1, 3, 2, 2))
    for _ in range(20):
        moved = shared + 1e-2 * torch.randn_like(shared), lifts + 1e-2 * torch.randn_like(lifts)
        assert error(*moved) > best


def test_a_head_without_features_or_energy():
    shared, lifts = joint(
        torch.zeros(1, 2, 0, 4).double(), torch.zeros(1, 2, 0, 0).double(), torch.eye(4).double()
    )
    assert shared.shape == (1, 0, 4)
    torch.manual_seed(0)
    maps = torch.randn(1, 2, 3, 4).double()
    shared, lifts = joint(maps, torch.zeros(1, 2, 3, 3).double(), torch.eye(4).double())
    assert shared.isfinite().all()
    assert lifts.isfinite().all()


def test_likeness_sees_through_maps_of_a_block_and_the_cosine_does_not():
    torch.manual_seed(0)
    second = root(moment(8))
    one, other = torch.randn(2, 4, 8).double()
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    maps = torch.stack([one, turn @ one, other])
    layout = Layout(4)
    found = likeness(layout.split(maps), second)
    torch.testing.assert_close(found.diagonal(), torch.ones(3).double())
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] < 0.9
    assert abs(float(cosines(maps, second)[0, 1])) < 0.9
    assert cosines(torch.stack([one, 2 * one]), second)[0, 1] == pytest.approx(1)


def test_pairs_are_alike_after_a_turn_of_each_alone():
    torch.manual_seed(0)
    layout, head = Layout(4, ((0, 2), (1, 3))), torch.randn(1, 4, 8).double()
    turned, rest = layout.split(head)
    phases = torch.randn(2, 1, 1, 1, dtype=torch.complex128).sgn()
    maps = torch.cat([head, layout.join([phases * turned, rest])])
    found = likeness(layout.split(maps), torch.eye(8).double())
    assert found[0, 1] == pytest.approx(1)
