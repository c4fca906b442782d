"""What linear maps and convolutions read from the calibration data, as second moments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from compress.graph.structure import Weight
from compress.model import Model
from compress.passes.base import Context
from compress.passes.calibration import Watch, watch
from compress.passes.moments import Moments

if TYPE_CHECKING:
    from torch import Tensor


def moments_of_rows(model: Model, context: Context, weights: Sequence[Weight], what: str) -> Moments:
    """The second moments of the rows that `weights` multiply (see `compress.layers.unfolded`), by `moment_key`; padding
    left out. One run over the data.
    """
    from compress.layers.unfolded import rows

    moments = Moments()

    def see(weight: Weight, _: int, values: Tensor) -> None:
        moments.see(moment_key(weight), rows(model.module.get_submodule(weight.path), values))

    first = {moment_key(one): one for one in reversed(weights)}
    watches = {
        one.path: Watch(partial(see, one), 1 if one.kind == "linear" else None) for one in first.values()
    }
    watch(model.module, context, watches, what)
    return moments


def moment_key(weight: Weight) -> str:
    """What the moment of `weight` is kept under: linear maps that read the same tensor share one, and convolutions may
    cut it into other patches.
    """
    return weight.reads if weight.kind == "linear" else weight.path
