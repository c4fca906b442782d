"""Linear maps as dictionaries and sparse codes: the form that trains, and the form that is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.layers.coded import (
    CodedLinear,
    LatentCodes,
    PackedCodes,
    empty_coded,
    latent_linear,
    unpacked_copy,
)

ROWS, SIDE = 24, 10
FORMS = [(6, 3, False), (6, 3, True), (10, 4, False), (10, 4, True), (6, 6, False)]
"""Atoms, non-zeros a row, and whether the map is turned; two products pay for 6 atoms and not for 10."""


def trained(atoms: int, count: int, turned: bool, bias: bool = True) -> CodedLinear:
    torch.manual_seed(0)
    out = SIDE if turned else ROWS
    codes = torch.randn(ROWS, atoms, dtype=torch.float64)
    dictionary = torch.randn(atoms, SIDE, dtype=torch.float64)
    return latent_linear(codes, count, dictionary, torch.randn(out).double() if bias else None, turned)


def given(layer: CodedLinear) -> Tensor:
    return torch.randn(2, 5, layer.weight.shape[1], dtype=layer.weight.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("atoms", "count", "turned"), FORMS)
def test_what_is_stored_is_what_trained(atoms: int, count: int, turned: bool, bias: bool) -> None:
    layer = trained(atoms, count, turned, bias)
    packed = layer.packed()
    assert layer.apart == packed.apart == (atoms < 7)
    torch.testing.assert_close(packed.weight, layer.weight, rtol=1e-12, atol=1e-12)
    x = given(layer)
    wanted = nn.functional.linear(x, layer.weight, layer.bias)
    for one in (layer, packed, unpacked_copy(nn.Sequential(packed))):
        torch.testing.assert_close(one(x), wanted, rtol=1e-12, atol=1e-12)
    assert (packed.bias is None) == (not bias)


@pytest.mark.parametrize(("atoms", "count", "turned"), FORMS)
def test_every_row_has_its_count_of_non_zeros_and_atoms_have_unit_length(
    atoms: int, count: int, turned: bool
) -> None:
    packed = trained(atoms, count, turned).packed()
    assert isinstance(packed.codes, PackedCodes)
    assert ((packed.codes.matrix() != 0).sum(1) == count).all()
    weight = packed.dictionary.weight
    assert isinstance(weight, Tensor)
    lengths = weight.norm(dim=0 if turned else 1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))
    stored = sum(one.nbytes for one in packed.state_dict().values()) - packed.bias.nbytes  # type: ignore[union-attr]
    assert stored == 8 * (ROWS * count + atoms * SIDE) + ROWS * -(-atoms // 8)


def test_gradients_pass_straight_through_until_places_freeze() -> None:
    layer = trained(6, 3, False)
    codes = layer.codes
    assert isinstance(codes, LatentCodes)
    support, x = codes.support(), given(layer)
    layer(x).square().sum().backward()
    assert codes.latent.grad is not None
    assert (codes.latent.grad[~support] != 0).all()
    # As though the codes were dense: the gradient of S is that of the outputs times the features.
    outputs = layer(x).detach()
    features = layer.dictionary(x).detach()
    wanted = 2 * torch.einsum("bto,bta->oa", outputs, features)
    torch.testing.assert_close(codes.latent.grad, wanted)
    codes.latent.grad = None
    codes.freeze()
    layer(x).square().sum().backward()
    assert codes.latent.grad is not None
    assert not codes.latent.grad[~support].any()
    assert codes.latent.grad[support].all()


def test_a_code_that_grows_takes_the_place_of_another_unless_frozen() -> None:
    layer = trained(6, 2, False)
    codes = layer.codes
    assert isinstance(codes, LatentCodes)
    outside = (~codes.support()).nonzero()[0]
    before = codes.support()
    codes.latent.data[tuple(outside)] = 100.0
    assert codes.support()[tuple(outside)]
    assert (codes.support().sum(1) == 2).all()
    codes.latent.data[tuple(outside)] = 0.0
    assert torch.equal(codes.support(), before)
    codes.freeze()
    codes.latent.data[tuple(outside)] = 100.0
    assert torch.equal(codes.support(), before)
    assert layer.packed().weight.abs().max() < 100


@pytest.mark.parametrize("turned", [False, True])
def test_as_many_atoms_and_non_zeros_as_features_are_the_map_itself(turned: bool) -> None:
    weight = torch.randn(ROWS, SIDE, dtype=torch.float64)
    layer = latent_linear(weight, SIDE, torch.eye(SIDE, dtype=torch.float64), None, turned)
    torch.testing.assert_close(layer.packed().weight, weight.T if turned else weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_it_runs_in_half_precision(dtype: torch.dtype, turned: bool) -> None:
    layer = trained(6, 3, turned).packed().to(dtype)
    assert isinstance(layer.codes, PackedCodes)
    assert layer.codes.values.dtype == dtype
    assert layer.codes.places.dtype == torch.uint8
    x = given(layer)
    wanted = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())  # type: ignore[union-attr]
    torch.testing.assert_close(layer(x).float(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("atoms", "count", "turned"), FORMS)
def test_an_empty_one_takes_the_state_of_another(atoms: int, count: int, turned: bool) -> None:
    layer = trained(atoms, count, turned).packed()
    empty = empty_coded(torch.empty(layer.weight.shape).double(), layer.bias, atoms, count)
    empty.load_state_dict(layer.state_dict())
    x = given(layer)
    assert torch.equal(empty(x), layer(x))


def test_the_stored_form_trains_too() -> None:
    layer = trained(6, 3, True).packed()
    layer(given(layer)).square().sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in layer.parameters())
