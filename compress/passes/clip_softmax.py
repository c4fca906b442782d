"""Clipped softmax: let attention look at nothing exactly, so that it need not make outliers to come near it.

Bondarenko et al. 2023, "Quantizable Transformers", arXiv 2306.12929. The paper trains with it from the start; here the
clip rises from none while a trained model learns, which is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.calming import Calmed, train_calm
from compress.report import Change

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from compress.model import Model


class ClipSoftmax(Calmed):
    """Clip the small probabilities of attention to zero, for fewer outliers; attention is no longer fused."""

    use: Literal["clip_softmax"] = "clip_softmax"
    alpha: float = Field(default=1.0, gt=0)
    """What is taken off each probability, in those of a row that looks at all its keys alike."""
    rise: float = Field(default=0.5, gt=0, le=1)
    """The share of the steps in which `alpha` rises from 0."""

    def check(self, model: Model) -> None:
        from compress.layers.clip import clips_of
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights do not train.",
                "Put `clip_softmax` before `quantize` in the recipe.",
            )
        if clips_of(model.module):
            raise Unsuitable(
                "The model's softmax is clipped already.", "Use one `clip_softmax` for all attentions."
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.routing import routed_in

        self.check(model)
        paths, skips = routed_in(model, self.scope)
        if not paths:
            return Result(model.module, (), tuple(skips))
        record = {"paths": paths}
        module = self.restore(model.module, record)
        trained = train_calm(self, model, context, before_step=self._plan(module))
        changes = [
            Change(path, "softmax clipped", "probabilities above 0", f"zero below {self.alpha:g} / keys")
            for path in paths
        ]
        return Result(module, (*changes, trained), tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.attention import use_attention
        from compress.layers.clip import SoftmaxClip

        for path in record["paths"]:
            module.get_submodule(path).softmax_clip = SoftmaxClip(self.alpha).eval()
        if record["paths"]:
            use_attention(module)
        return module

    def _plan(self, module: nn.Module) -> Callable[[int], None]:
        """Sets every clip to nothing, and gives what raises it before each step."""
        from compress.layers.clip import clips_of

        clips, rising = clips_of(module), max(1, round(self.rise * self.steps))

        def rise_to(step: int) -> None:
            for clip in clips:
                clip.share = min(1.0, step / rising)

        rise_to(0)
        return lambda step: rise_to(step + 1)
