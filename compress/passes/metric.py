"""The metric in which the error of a linear map is measured: by its inputs, its gradients, both or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from compress.graph.structure import Weight
    from compress.model import Model
    from compress.passes.base import Context
    from compress.passes.moments import Moments

Method = Literal["fisher", "svd_llm", "asvd", "svd"]
UNSEEN = "reads or moves nothing in the calibration data"


class Map(NamedTuple):
    """A linear map by the weight that reads its input and the weight that writes its output: one, if it is dense."""

    reads: Weight
    writes: Weight


class Metric(NamedTuple):
    """Lower triangular roots, float64: of the inputs' second moment (in, in), of the gradients' (out, out); or None."""

    inputs: Tensor | None
    outputs: Tensor | None


def metrics(
    method: Method, alpha: float, model: Model, context: Context, maps: Sequence[Map], what: str
) -> list[Metric | None]:
    """The metric of each map over the calibration data; None for one that the data does not reach, which has none."""
    from compress.passes.moments import fisher_moments, input_moments

    if not maps or method == "svd":
        return [Metric(None, None)] * len(maps)
    weights = list(dict.fromkeys(weight for one in maps for weight in one))
    sums = (fisher_moments if method == "fisher" else input_moments)(model, context, weights, what)
    return [_metric(method, alpha, one, sums) for one in maps]


def _metric(method: Method, alpha: float, one: Map, sums: Moments) -> Metric | None:
    from compress.numerics.low_rank import root

    reads, gradients = sums.inputs.get(one.reads.reads), sums.gradients.get(one.writes.path)
    if reads is None or not reads.any():
        return None
    if method == "asvd":
        magnitudes = sums.magnitudes(one.reads.reads)
        return Metric(magnitudes.clamp(min=1e-6 * float(magnitudes.mean())).pow(alpha).diag(), None)
    inputs = root(sums.mean(one.reads.reads))
    if method == "svd_llm":
        return Metric(inputs, None)
    return None if gradients is None or not gradients.any() else Metric(inputs, root(gradients))
