"""SVD-LLM's sequential update: output factors refitted to what the factors before them give.

Wang et al. 2024, arXiv 2403.07378, section 3.3. Factors are found on the inputs that the original model gives, and
then read those of a compressed one. In the order in which the model runs them, each output factor is fitted once more
so that the product maps the inputs that it really has as the dense weight would. Sums run over all batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from compress.graph.structure import Weight
from compress.passes.base import Context
from compress.passes.calibration import Enough, Watch, required, watch
from compress.passes.moments import Moments
from compress.progress import SILENT, track

if TYPE_CHECKING:
    from torch import Tensor, nn


def refit(module: nn.Module, context: Context, dense: Iterable[tuple[Weight, Tensor]], what: str) -> None:
    """Refit the output factors in the places of `dense`, in place: weights that factors have replaced, in the order in
    which `module` runs them, each with the matrix (out, in) that it was.

    Weights that read the same tensor share one run over the calibration data, which ends at the first of them. One
    that the data does not reach keeps its factors. Raises `DataError` if there is no data.
    """
    required(context, what)
    groups: dict[str, list[tuple[Weight, Tensor]]] = {}
    for weight, matrix in dense:
        groups.setdefault(weight.reads, []).append((weight, matrix))
    for group in track(context.observer, what, list(groups.values())):
        moment = _moment(module, replace(context, observer=SILENT), group[0][0], what)
        if moment is not None:
            for weight, matrix in group:
                _fit(module.get_submodule(weight.path), matrix, moment)


def _moment(module: nn.Module, context: Context, weight: Weight, what: str) -> Tensor | None:
    """The sum of x xᵀ over all that `weight` reads, (in, in), padding left out; None if nothing reaches it."""
    moments, once = Moments(), "|" not in weight.reads

    def see(_: int, values: Tensor) -> None:
        moments.see(weight.reads, values)
        if once:
            raise Enough

    watch(module, context, {weight.path: Watch(see)}, what)
    return moments.inputs.get(weight.reads)


def _fit(layer: nn.Module, dense: Tensor, moment: Tensor) -> None:
    from compress.layers.low_rank import LowRankLinear
    from compress.numerics.low_rank import refitted

    assert isinstance(layer, LowRankLinear)
    expand, reduce = layer.expand.weight.detach(), layer.reduce.weight.detach()
    expand.copy_(refitted(dense.cpu(), expand.cpu(), reduce.cpu(), moment))
