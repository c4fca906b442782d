"""Static INT8: integer weights, and inputs rounded over ranges that calibration data gives.

Weights are symmetric with a scale per output channel; ranges are calibrated once, and each target lowers them
to its own scheme. After Jacob et al. 2018, arXiv 1712.05877. Embeddings, norms and softmax stay in float.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.passes.calibration import required
from compress.passes.observed import Input, Narrow, observed
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Weight
    from compress.model import Model
    from compress.numerics.ranges import Range

FEWEST_CHANNELS = 16
"""Integer kernels sum over blocks of input channels; below one block (depthwise, RGB) float is as fast."""


class Quantize(Pass):
    """Quantize linear maps, convolutions and, if asked, attention products to INT8."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["quantize"] = "quantize"
    weights: Literal["int8"] = "int8"
    activations: Literal["int8"] = "int8"
    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    """All values seen; all but the tails; or the range with the least squared rounding and clipping error."""
    percentile: float = Field(default=99.99, ge=90, le=100)
    """The share of values, in per cent, inside a range of `ranges: percentile`."""
    attention: bool = False
    """Also compute q k^T and p v on integers."""
    head: bool = False
    """Also quantize the output head."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already.",
                "Give `quantize` once, with all that it should cover in its scope.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        self.check(model)
        required(context, "quantize")
        weights, skips = self._choose(model)
        attentions, unrouted = self._route(model)
        ranges = self._ranges(model, context, weights, attentions)
        layers = {weight.path: ranges[_input(weight)] for weight in weights if _input(weight) in ranges}
        products = {
            path: [ranges[one] for one in _operands(path)]
            for path in attentions
            if _operands(path)[0] in ranges
        }
        changes = [
            _layer_change(model.module.get_submodule(path), path, range) for path, range in layers.items()
        ]
        changes += [_products_change(path, operands) for path, operands in products.items()]
        missed = [
            path
            for path in (*(weight.path for weight in weights), *attentions)
            if path not in layers | products
        ]
        skips += unrouted + [Skip(path, "runs no input in the calibration data") for path in missed]
        record = {
            "layers": {path: list(range) for path, range in layers.items()},
            "attentions": {path: [list(range) for range in operands] for path, operands in products.items()},
        }
        return Result(self.restore(model.module, record), tuple(changes), tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.attention import use_attention
        from compress.layers.products import Products
        from compress.layers.quantized import Activation, quantized, swap
        from compress.numerics.ranges import Range

        layers = {module.get_submodule(path): range for path, range in record["layers"].items()}
        swap(module, {layer: quantized(layer, Activation(*range)) for layer, range in layers.items()})
        for path, ranges in record["attentions"].items():
            caller = module.get_submodule(path)
            caller.products = Products()
            caller.products.quantize(*(Range(*range) for range in ranges))
        if record["attentions"]:
            use_attention(module)
        return module

    def _choose(self, model: Model) -> tuple[list[Weight], list[Skip]]:
        """The weighted modules to quantize, and those in scope that stay in float."""
        from compress.passes.plain_maps import sparse_codes

        chosen, skips = [], sparse_codes(model, self.scope)
        for weight in model.graph.weights:
            if weight.path in self.scope:
                why = self._reason_to_skip(model, weight)
                skips += [Skip(weight.path, why)] if why else []
                chosen += [] if why else [weight]
        return chosen, skips

    def _reason_to_skip(self, model: Model, weight: Weight) -> str:
        from compress.layers.quantized import quantizable

        layer = model.module.get_submodule(weight.path)
        if weight.role == "embedding":
            return "an embedding; look-ups stay in float"
        if weight.role == "head" and not self.head:
            return "the output head; set `head: true` to quantize it"
        if not quantizable(layer):
            return f"{type(layer).__name__} has no quantized form"
        if sharers := model.graph.sharers(f"{weight.path}.weight"):
            return f"its weight is tied with {', '.join(sharers)}"
        channels = layer.in_channels // layer.groups if weight.kind == "conv" else FEWEST_CHANNELS
        if channels < FEWEST_CHANNELS:
            return f"{channels} input channels per group; below {FEWEST_CHANNELS}, int8 is not faster"
        return ""

    def _narrow(self) -> Narrow | None:
        from compress.numerics.ranges import mse_range, percentile_range

        if self.ranges == "minmax":
            return None
        return mse_range if self.ranges == "mse" else partial(percentile_range, percentile=self.percentile)

    def _ranges(
        self, model: Model, context: Context, weights: list[Weight], attentions: list[str]
    ) -> dict[Input, Range]:
        from compress.layers.products import watched_products

        inputs = [_input(weight) for weight in weights] + [
            one for path in attentions for one in _operands(path)
        ]
        with watched_products(model.module, attentions):
            return observed(model.module, context, inputs, self._narrow()) if inputs else {}

    def _route(self, model: Model) -> tuple[list[str], list[Skip]]:
        """The modules whose attention to quantize, and the attentions in scope that cannot be."""
        from compress.passes.routing import routed_in

        return routed_in(model, self.scope) if self.attention else ([], [])


def _input(weight: Weight) -> Input:
    return Input(weight.path, 0, weight.reads, 1 if weight.kind == "linear" else None)


def _operands(path: str) -> list[Input]:
    """Query, key and value of the attention at `path`, each (batch, heads, sequence, size), with a range of
    its own."""
    return [Input(f"{path}.products", index, f"{path} {index}", 2) for index in range(3)]


def _layer_change(layer: nn.Module, path: str, range: Range) -> Change:
    shape = "x".join(map(str, layer.weight.shape))
    before = f"{str(layer.weight.dtype).removeprefix('torch.')} {type(layer).__name__} {shape}"
    return Change(
        path, "quantized", before, f"int8 weights, 8-bit input in [{range.low:.4g}, {range.high:.4g}]"
    )


def _products_change(path: str, operands: list[Range]) -> Change:
    names = ("query", "key", "value")
    spans = ", ".join(
        f"{name} in [{one.low:.4g}, {one.high:.4g}]" for name, one in zip(names, operands, strict=True)
    )
    return Change(path, "attention quantized", "float products", f"8-bit products, {spans}")
