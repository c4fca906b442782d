"""Cutting factors whose features stand in the order of their worth: to ranks that one budget buys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compress.errors import Unsuitable
from compress.passes.base import Context
from compress.passes.metric import UNSEEN, Map, measured
from compress.report import Change, Skip
from compress.scope import Scope

if TYPE_CHECKING:
    from torch import nn

    from compress.layers.low_rank import LowRankLinear
    from compress.model import Model
    from compress.numerics.low_rank import Offer


class Cut(NamedTuple):
    """What was cut, what was not and why, and the rank of each layer, by path; None: one matrix again."""

    changes: list[Change]
    skips: list[Skip]
    ranks: dict[str, int | None]


@dataclass(frozen=True)
class Budget:
    """`keep`: a share of the parameters that the maps have as one matrix each. Ranks are multiples of `multiple`."""

    keep: float
    multiple: int


def factored(module: nn.Module, scope: Scope) -> dict[str, LowRankLinear]:
    """The factored layers in `scope` inside `module`, by path."""
    from compress.layers.low_rank import LowRankLinear

    found = {path: part for path, part in module.named_modules() if isinstance(part, LowRankLinear)}
    return {path: layer for path, layer in found.items() if path in scope}


def offers_of(
    model: Model, context: Context, layers: Mapping[str, LowRankLinear], what: str
) -> dict[str, Offer]:
    """What each layer of `model` loses at each rank that it has: the change of the loss, to second order. Layers that
    the calibration data does not reach are left out."""
    from compress.numerics.low_rank import Offer
    from compress.numerics.nested import cut_errors

    weights = {weight.path: weight for weight in model.graph.weights}
    maps = {path: Map(weights[f"{path}.reduce"], weights[f"{path}.expand"]) for path in layers}
    metric = measured("fisher", 0.5, model, context, list(maps.values()), what)
    offers = {}
    for path, layer in layers.items():
        if metric.reaches(maps[path]):
            expand, reduce = layer.expand.weight.cpu(), layer.reduce.weight.cpu()
            shape = len(expand), reduce.shape[1]
            errors = cut_errors(expand, reduce, *metric.of(maps[path]))
            offers[path] = Offer(shape, errors, float(shape[0] * shape[1]))
    return offers


def ranks_for(offers: Mapping[str, Offer], budget: Budget) -> dict[str, int | None]:
    """The ranks that `budget` buys where they lower the error most; None: one matrix. Raises `Unsuitable` where even
    the smallest ranks cost more."""
    from compress.numerics.low_rank import allocate

    total = sum(one.dense for one in offers.values())
    try:
        found = allocate(list(offers.values()), budget.keep * total, budget.multiple)
    except ValueError as error:
        raise Unsuitable(
            f"`keep: {budget.keep}` cannot be reached: with ranks of {budget.multiple}, {error}.",
            "Keep more, or lower `multiple`.",
        ) from error
    return dict(zip(offers, found, strict=True))


def cut(
    model: Model, context: Context, layers: Mapping[str, LowRankLinear], budget: Budget, what: str
) -> Cut:
    """Cut `layers` of `model` to `budget`, in place. A layer that no rank makes smaller becomes one matrix."""
    offers = offers_of(model, context, layers, what)
    ranks = ranks_for(offers, budget)
    skips = [Skip(path, UNSEEN) for path in layers if path not in offers]
    skips += [Skip(path, "keeps its rank") for path, rank in ranks.items() if rank == layers[path].rank]
    ranks = {path: rank for path, rank in ranks.items() if rank != layers[path].rank}
    changes = [_change(path, layers[path], offers[path], rank) for path, rank in ranks.items()]
    slice_layers(model.module, ranks)
    return Cut(changes, skips, ranks)


def slice_layers(module: nn.Module, ranks: Mapping[str, int | None]) -> None:
    """Give the factored layers at the paths `ranks` their first features alone; None: make one matrix of both."""
    from compress.layers.quantized import swap

    layers = {path: module.get_submodule(path) for path in ranks}
    swap(module, {layers[path]: _sliced(layers[path], rank) for path, rank in ranks.items()})


def factor_as(module: nn.Module, ranks: Mapping[str, int | None]) -> None:
    """Put factors of the given ranks, with any values, in the place of the linear maps at the paths `ranks`; None: one
    matrix, as `slice_layers` makes it."""
    from compress.layers.linear import matrix
    from compress.layers.low_rank import LowRankLinear
    from compress.layers.quantized import swap

    layers = {path: module.get_submodule(path) for path in ranks}
    new = {}
    for path, rank in ranks.items():
        weight, bias = matrix(layers[path]), getattr(layers[path], "bias", None)
        out, width = weight.shape
        made = LowRankLinear(weight.new_empty(out, rank or 1), weight.new_empty(rank or 1, width), bias)
        new[path] = made.dense() if rank is None else made
    swap(module, {layers[path]: one.train(layers[path].training) for path, one in new.items()})


def _sliced(layer: nn.Module, rank: int | None) -> nn.Module:
    from compress.layers.low_rank import LowRankLinear

    assert isinstance(layer, LowRankLinear)
    return (layer.dense() if rank is None else layer.cut(rank)).train(layer.training)


def _change(path: str, layer: LowRankLinear, offer: Offer, rank: int | None) -> Change:
    before = f"{offer.shape[0]}x{offer.shape[1]} of rank {layer.rank}"
    if rank is None:
        return Change(path, "multiplied back", before, "one matrix, which is smaller")
    lost = float(offer.errors[rank] / offer.errors[0].clamp(min=1e-300))
    share = 100 * offer.cost(rank) / offer.dense
    return Change(
        path,
        "sliced",
        before,
        f"rank {rank}, {share:.0f} % of one matrix, {100 * lost:.2g} % of the squared error of leaving it out",
    )
