"""Slicing: factors whose features stand in the order of their worth lose the last ones, with no training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.report import Effect

if TYPE_CHECKING:
    from torch import nn

    from compress.model import Model


class SliceRanks(Pass):
    """Cut the factors that `train_ranks` has trained to the ranks that a budget buys."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["slice_ranks"] = "slice_ranks"
    keep: float = Field(default=0.5, gt=0, lt=1)
    """The share of the parameters of the factored maps that is left, of what they have as one matrix each."""
    multiple: int = Field(default=8, ge=1)
    """Ranks are multiples of this, as kernels like them."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized
        from compress.passes.slicing import factored

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and integer factors cannot be sliced.",
                "Put `slice_ranks` before `quantize` in the recipe.",
            )
        if not factored(model.module, self.scope):
            raise Unsuitable(
                "No factored layer is in the scope of `slice_ranks`.",
                "Put `train_ranks` with `keep: null` before it, or widen the scope.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.slicing import Budget, cut, factored

        self.check(model)
        layers = factored(model.module, self.scope)
        made = cut(model, context, layers, Budget(self.keep, self.multiple), "slice_ranks: second moments")
        return Result(model.module, tuple(made.changes), tuple(made.skips), {"ranks": made.ranks})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.slicing import slice_layers

        slice_layers(module, record["ranks"])
        return module
