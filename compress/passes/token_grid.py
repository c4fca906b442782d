"""Tokens that lie on a grid, for the method `cluster`: the grid, the centres for a budget, and the temperature."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.errors import Unsuitable
from compress.numerics.token_clusters import Clusters, cluster_plan
from compress.outputs import forward
from compress.passes.token_schedule import Costs, unreachable

if TYPE_CHECKING:
    from torch import Tensor

    from compress.model import Model

STEPS = 25
"""So many temperatures are tried, by powers of the square root of two."""


def grid_of(
    model: Model,
    count: int,
    what: str = "The method `cluster`",
    remedy: str = "Choose another `method`.",
) -> tuple[int, int]:
    """The rows and columns of the `count` tokens that are made from a picture: the shape of a convolution's output.

    Raises `Unsuitable`, in the words of `what` needs it, with its `remedy`, if there is no such convolution.
    """
    from torch import nn

    found: list[tuple[int, int]] = []

    def see(_: nn.Module, __: object, output: Tensor) -> None:
        if output.dim() == 4 and output.shape[2] * output.shape[3] == count:
            found.append((output.shape[2], output.shape[3]))

    with ExitStack() as hooks:
        for part in model.module.modules():
            if isinstance(part, nn.Conv2d):
                hooks.callback(part.register_forward_hook(see).remove)
        forward(model.module, model.example)
    if not found:
        raise Unsuitable(
            f"{what} works on tokens that lie on a grid, and no convolution gives one of {count} places.",
            remedy,
        )
    return found[0]


def centres_for(costs: Costs, keep: float, place: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The largest smaller grid of the same proportions on which the blocks from `place` on cost at most `keep`."""
    rows, columns = grid
    special = costs.count - rows * columns
    share = 1.0
    for fewer in range(rows - 1, 0, -1):
        centres = fewer, max(1, round(fewer * columns / rows))
        share = costs.share(clustered(costs, place, special + centres[0] * centres[1]))
        if share <= keep:
            return centres
    raise unreachable(keep, (place,), share)


def clustered(costs: Costs, place: int, left: int) -> tuple[int, ...]:
    """The schedule with `left` tokens from the block `place` on."""
    return tuple(costs.count if number < place else left for number in range(len(costs.linear)))


def fitted(clusters: Clusters, features: Sequence[Tensor], protected: int) -> Clusters:
    """`clusters` with the temperature that gives back `features`, of (batch, tokens, channels) each, most exactly.

    What is given back is compared with what was clustered. The scale of squared distances differs from model to model
    by orders of magnitude, so the published constants serve only the models that they were set for.
    """
    scale = sum(float(one.float().var(1).sum(-1).mean()) for one in features) / len(features)
    tried = [replace(clusters, temperature=2 ** (step / 2) / scale) for step in range(STEPS)]

    def error(one: Clusters) -> float:
        return sum(_error(values, one, protected) for values in features)

    return min(tried, key=error)


def _error(features: Tensor, clusters: Clusters, protected: int) -> float:
    plan = cluster_plan(features, clusters, protected)
    return float((plan.spread(plan.merge(features)) - features).square().sum())
