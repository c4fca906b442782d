"""SmoothQuant: move the outliers of activations into the weights that read them, with the function kept.

Xiao et al. 2023, arXiv 2211.10438. Besides norms and the linear maps that read them, a scale also moves from
the value projection to the output projection (attention mixes positions, not channels), and from the up to
the down projection of an MLP that is gated, or whose activation is a ReLU.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.passes.calibration import Watch, required, watch
from compress.passes.pairs import Pair, find_pairs
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model import Model


class Smooth(Pass):
    """Even out the input channels of linear maps before they are quantized."""

    effect: ClassVar[Effect] = "exact"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["smooth"] = "smooth"
    alpha: float = Field(default=0.5, ge=0, le=1)
    """How much of the outliers moves to the weights: 0 evens out the weights alone, 1 the activations alone."""
    multiply: bool = False
    """Where a scale cannot be folded into what writes a tensor (a norm that the residual reads too, a GELU in
    between), let the readers multiply their input by it: exact as well, for one cheap operation a tensor."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights cannot be scaled.",
                "Put `smooth` before `quantize` in the recipe, and start from the float model.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        self.check(model)
        required(context, "smooth")
        pairs, skips = find_pairs(model.graph, model.module, self.scope, self.multiply)
        largest = _largest_inputs(model.module, context, pairs) if pairs else {}
        outcomes = [_move(model.module, pair, largest, self.alpha) for pair in pairs]
        changes = tuple(outcome for outcome in outcomes if isinstance(outcome, Change))
        skips += [outcome for outcome in outcomes if isinstance(outcome, Skip)]
        moved = {change.target for change in changes}
        scaled = [path for pair in pairs if pair.multiply and pair.source in moved for path in pair.readers]
        return Result(model.module, changes, tuple(skips), {"scaled": scaled})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        for path in record["scaled"]:
            _multiply(module, path, None)
        return module


def _largest_inputs(module: nn.Module, context: Context, pairs: list[Pair]) -> dict[str, Tensor]:
    """The largest absolute value of each input channel, (inputs,) on the CPU, of every reader that runs."""
    largest: dict[str, Tensor] = {}

    def see(path: str, index: int, values: Tensor) -> None:
        del index  # a linear map has one input
        seen = values.abs().flatten(0, -2).amax(0).float().cpu()
        largest[path] = seen.maximum(largest[path]) if path in largest else seen

    watches = {path: Watch(partial(see, path)) for pair in pairs for path in pair.readers}
    watch(module, context, watches, "smooth: channel maxima")
    return largest


def _move(module: nn.Module, pair: Pair, largest: dict[str, Tensor], alpha: float) -> Change | Skip:
    """Scale one pair in place."""
    import torch

    from compress.layers.linear import matrix
    from compress.numerics.smoothing import head_columns, largest_by_feature, smoothing_scales

    if not all(path in largest for path in pair.readers):
        return Skip(pair.source, "its readers run no input in the calibration data")
    weights = [matrix(module.get_submodule(path)) for path in pair.readers]
    inputs = largest[pair.readers[0]]
    features = len(inputs) // pair.repeats
    origin = head_columns(features, pair.kv_heads, pair.repeats)
    steepest = reduce(torch.maximum, (weight.abs().amax(0).float().cpu() for weight in weights))
    activation = largest_by_feature(inputs, origin, features)
    scales = smoothing_scales(activation, largest_by_feature(steepest, origin, features), alpha)
    there = scales.to(weights[0].device)
    if pair.multiply:
        for path in pair.readers:
            _multiply(module, path, there)
        return Change(pair.source, "smoothed, multiplied", _spread(activation), _spread(activation / scales))
    if why := _divide(module.get_submodule(pair.source), pair, there):
        return Skip(pair.source, why)
    for weight in weights:
        weight.copy_(weight.double() * there[origin])
    return Change(pair.source, "smoothed", _spread(activation), _spread(activation / scales))


def _multiply(module: nn.Module, path: str, scales: Tensor | None) -> None:
    """Let the linear map at `path` divide its input by `scales` (inputs,), 1 if None, and multiply its weight by it."""
    import torch

    from compress.layers.linear import ScaledLinear, Scaling, matrix
    from compress.layers.quantized import swap
    from compress.layers.sparse import is_sparse

    layer = module.get_submodule(path)
    weight = matrix(layer)
    by = weight.new_ones(weight.shape[1], dtype=torch.float64) if scales is None else scales
    scaling = Scaling((1 / by).to(weight.dtype))
    scaled = ScaledLinear((weight.double() * by).to(weight.dtype), layer.bias, scaling, is_sparse(layer))
    swap(module, {layer: scaled.train(layer.training)})


def _divide(source: nn.Module, pair: Pair, scales: Tensor) -> str:
    """Divide what `source` writes by `scales` (features,), in place; or say why that cannot be done."""
    from compress.layers.linear import matrix
    from compress.numerics.norm_form import divided

    if pair.kind == "norm":
        folded = divided(source, scales)
        for name, value in (folded or {}).items():
            source.get_parameter(name).data.copy_(value)
        return (
            "" if folded else f"{len(scales)} features read it, and no weight of its own scales each of them"
        )
    rows = [row for start, stop in pair.rows for row in range(start, stop)]
    if len(rows) != len(scales):
        return f"{len(rows)} features are written and {len(scales)} are read"
    weight = matrix(source)
    weight[rows] = (weight[rows].double() / scales[:, None]).to(weight.dtype)
    if source.bias is not None:
        source.bias.data[rows] = (source.bias[rows].double() / scales).to(weight.dtype)
    return ""


def _spread(largest: Tensor) -> str:
    """How far the largest channel stands out."""
    return f"largest channel {(largest.max() / largest.median().clamp(min=1e-12)).item():.3g} x the median"
