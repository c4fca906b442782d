"""The metric in which the error of a linear map is measured: by its inputs, its gradients, both or neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from compress.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from compress.graph.structure import Weight
    from compress.model import Model
    from compress.numerics.low_rank import Spectrum
    from compress.passes.base import Context
    from compress.passes.moments import Moments

Method = Literal["fisher", "svd_llm", "asvd", "svd"]
DAMPING = 0.01
"""Added to the diagonal of each second moment, as a share of its mean. Calibration data never shows all that a model
will read: a direction that it does not show would cost nothing, and be given up first."""
UNSEEN = "reads or moves nothing in the calibration data"


class Map(NamedTuple):
    """A linear map by the weight that reads its input and the weight that writes its output: one, if it is dense."""

    reads: Weight
    writes: Weight


class Metric(NamedTuple):
    """Lower triangular roots, float64: of the inputs' second moment (in, in), of the gradients' (out, out); or None."""

    inputs: Tensor | None
    outputs: Tensor | None


@dataclass
class Metrics:
    """The metrics that second moments give. A root is computed when it is asked for: for large layers it is as large
    as all the rest."""

    method: Method
    alpha: float
    sums: Moments
    _input: tuple[str, Tensor | None] = ("", None)

    def reaches(self, one: Map) -> bool:
        """Whether the data says anything of a map: a metric of zeros has no SVD."""
        if self.method == "svd":
            return True
        needed = [self.sums.inputs.get(one.reads.reads)]
        needed += [self.sums.gradients.get(one.writes.path)] if self.method == "fisher" else []
        return all(found is not None and bool(found.any()) for found in needed)

    def of(self, one: Map) -> Metric:
        """The metric of a map that the data reaches. Neighbours that read the same tensor share its root."""
        from compress.numerics.low_rank import root

        if self._input[0] != one.reads.reads:
            self._input = (one.reads.reads, self._input_root(one.reads.reads))
        outputs = root(self.sums.gradients[one.writes.path], DAMPING) if self.method == "fisher" else None
        return Metric(self._input[1], outputs)

    def _input_root(self, reads: str) -> Tensor | None:
        from compress.numerics.low_rank import root

        if self.method == "svd":
            return None
        if self.method == "asvd":
            magnitudes = self.sums.magnitudes(reads)
            return magnitudes.clamp(min=1e-6 * float(magnitudes.mean())).pow(self.alpha).diag()
        return root(self.sums.mean(reads), DAMPING)


def measured(
    method: Method, alpha: float, model: Model, context: Context, maps: Sequence[Map], what: str
) -> Metrics:
    """The metrics of `maps` over the calibration data; `alpha` is the exponent of `asvd`."""
    from compress.passes.moments import Moments, fisher_moments, input_moments

    weights = list(dict.fromkeys(weight for one in maps for weight in one))
    if not weights or method == "svd":
        return Metrics(method, alpha, Moments())
    sums = (fisher_moments if method == "fisher" else input_moments)(model, context, weights, what)
    return Metrics(method, alpha, sums)


def spectra_of(
    method: Method, alpha: float, model: Model, context: Context, weights: Sequence[Weight], use: str
) -> dict[str, Spectrum]:
    """The components of those dense `weights` that the calibration data reaches, by path and in order, for the pass
    `use`."""
    from compress.layers.linear import matrix
    from compress.numerics.low_rank import decompose

    maps = [Map(weight, weight) for weight in weights]
    metric = measured(method, alpha, model, context, maps, f"{use}: second moments")
    seen = [one for one in maps if metric.reaches(one)]
    return {
        one.reads.path: decompose(matrix(model.module.get_submodule(one.reads.path)).cpu(), *metric.of(one))
        for one in track(context.observer, f"{use}: singular values", seen)
    }
