"""Generalised ordered dropout: which ranks the layers of a model have in each step of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

from compress.layers.linear import matrix
from compress.layers.low_rank import LowRankLinear, OrderedLowRank
from compress.layers.quantized import swap
from compress.numerics.low_rank import Offer, Spectrum, allocate
from compress.numerics.nested import nested, tail_scales
from compress.passes.taught import Lesson

LEVELS = 16
"""So many budgets are drawn, each once a sweep."""


def factor_out(module: nn.Module, spectra: Mapping[str, Spectrum]) -> dict[str, OrderedLowRank]:
    """Put the whole factors of `spectra` in the place of the linear maps at their paths, in place."""
    layers = {path: module.get_submodule(path) for path in spectra}
    new = {}
    for path, layer in layers.items():
        expand, reduce = (one.to(matrix(layer)) for one in nested(spectra[path]))
        new[path] = OrderedLowRank(expand, reduce, getattr(layer, "bias", None)).train(layer.training)
    swap(module, {layers[path]: one for path, one in new.items()})
    return new


def renamed(names: Sequence[str], factored: Mapping[str, OrderedLowRank]) -> list[str]:
    """The parameters called `names` before there were factors, as they are called now."""
    found = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        if path not in factored:
            found.append(name)
        elif leaf == "weight":
            found += [f"{path}.expand.weight", f"{path}.reduce.weight"]
        else:
            found.append(f"{path}.expand.{leaf}")
    return found


class RankDropout:
    """The ranks of each step. All follow from its number and `seed`: processes agree, and a run can go on anywhere.

    `layers` by path, and what each loses by a cut to each rank, `offers`. The dropout `model` draws a budget for all
    layers, from `least` of the parameters of the dense maps up; `layer` a rank for one, and the others stay whole.
    """

    def __init__(
        self,
        layers: Mapping[str, OrderedLowRank],
        offers: Mapping[str, Offer],
        dropout: Literal["model", "layer"],
        least: float,
        multiple: int,
        seed: int,
    ) -> None:
        self.layers = layers
        self.seed = seed
        shares = _shares(offers, least, multiple)
        levels = [_ranks(offers, share, multiple) for share in shares]
        pairs = [
            {path: rank}
            for path, layer in layers.items()
            for rank in range(multiple, layer.rank + 1, multiple)
        ]
        self.draws: Sequence[Mapping[str, int | None]] = levels if dropout == "model" else pairs
        self.judged = {shares[number]: levels[number] for number in (0, LEVELS // 2, LEVELS - 1)}
        """Ranks of the smallest, a middle and the largest budget, by share: the training is judged on them."""

    def losses(self, lesson: Lesson, module: nn.Module) -> list[float]:
        """The loss of `module` at each of the sizes that it is judged on."""
        found = []
        for ranks in self.judged.values():
            with self.at(ranks):
                found.append(lesson.mean_loss(module))
        return found

    def draw(self, step: int) -> None:
        """Give the layers their ranks of this step: each draw comes once, then each again in another order."""
        sweep, number = divmod(step, len(self.draws))
        generator = torch.Generator().manual_seed(1000 * self.seed + sweep)
        order = torch.randperm(len(self.draws), generator=generator)
        self.set(self.draws[int(order[number])])

    def set(self, ranks: Mapping[str, int | None]) -> None:
        """Give the layers at the paths `ranks` these; all others are whole."""
        for path, layer in self.layers.items():
            rank = ranks.get(path)
            layer.active = layer.rank if rank is None else rank

    @contextmanager
    def at(self, ranks: Mapping[str, int | None]) -> Iterator[None]:
        """Inside the block the layers have these ranks, and after it all are whole."""
        self.set(ranks)
        try:
            yield
        finally:
            self.set({})

    def shrink(self, amount: float) -> None:
        """Pull the last features of all layers to zero, by a proximal step of the hierarchical group lasso."""
        for layer in self.layers.values():
            expand, reduce = layer.expand.weight.data, layer.reduce.weight.data
            expand.mul_(tail_scales(expand.norm(dim=0), amount))
            reduce.mul_(tail_scales(reduce.norm(dim=1), amount)[:, None])


def settle(
    module: nn.Module, layers: Mapping[str, OrderedLowRank], multiple: int
) -> dict[str, LowRankLinear]:
    """Put plain factors in the place of `layers`, in place and by path, without last features that are zero."""
    new = {path: layer.cut(_left(layer, multiple)).train(layer.training) for path, layer in layers.items()}
    swap(module, {layers[path]: one for path, one in new.items()})
    return new


def _left(layer: OrderedLowRank, multiple: int) -> int:
    """The rank of `layer` without its last features that are zero, as a multiple of `multiple`; at least that."""
    alive = (layer.expand.weight.detach().abs().sum(0) * layer.reduce.weight.detach().abs().sum(1)).nonzero()
    count = int(alive.max()) + 1 if len(alive) else 1
    return min(-(-count // multiple) * multiple, layer.rank)


def _shares(offers: Mapping[str, Offer], least: float, multiple: int) -> list[float]:
    """Budgets from `least`, or what the smallest ranks cost, evenly up to the dense maps."""
    total = sum(one.dense for one in offers.values())
    smallest = sum(one.cost(multiple) for one in offers.values()) / total
    least = min(max(least, smallest * 1.01), 1.0)
    return [least + (1 - least) * number / (LEVELS - 1) for number in range(LEVELS)]


def _ranks(offers: Mapping[str, Offer], share: float, multiple: int) -> dict[str, int | None]:
    total = sum(one.dense for one in offers.values())
    return dict(zip(offers, allocate(list(offers.values()), share * total, multiple), strict=True))
