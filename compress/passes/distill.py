"""Distillation: train a compressed model to answer as the model that it came from.

Losses: `logits` (Hinton et al. 2015, arXiv 1503.02531), `hidden` (the states between blocks, relative to their
energy), and `minilm` (relations between tokens in the last attention: Wang et al. 2020, arXiv 2002.10957, and
2021, arXiv 2012.15828); see `compress.numerics.relations`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.calming import Calmed, train_calm
from compress.passes.taught import AGREED, agrees_already, lessons, require_fall, trainable, trained
from compress.report import Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.model import Model


class Distill(Calmed):
    """Train the model to answer as its teacher does: the model that the run began with."""

    use: Literal["distill"] = "distill"
    steps: int = Field(default=400, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The largest learning rate."""
    penalty: float = Field(default=0, ge=0)
    """What outliers count, in units of the loss; the model may then answer as its teacher already."""
    train_embeddings: bool = False
    """Also train embeddings, and a head that is tied to one."""

    def check(self, model: Model) -> None:
        if not self._candidates(model):
            raise Unsuitable(
                "No parameter in the scope of `distill` trains: what is there is integers, frozen, or embeddings.",
                "Widen the scope, or set `train_embeddings: true`.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        self.check(model)
        if self.penalty:
            calmed = train_calm(self, model, context, self._candidates(model))
            return Result(model.module, (calmed,), self._skips(model))
        with lessons(self, model, context) as lesson:
            before = lesson.mean_loss(model.module)
            if before < AGREED:
                return Result(model.module, (), (agrees_already(self.use),))
            names = lesson.reached(model.module, self._candidates(model))
            lesson.learn(model.module, names)
            after = lesson.mean_loss(model.module)
        require_fall(self.use, before, after)
        change = trained(self, model.module, names, lesson.kind, before, after)
        return Result(model.module, (change,), self._skips(model))

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        del record
        return module

    def _candidates(self, model: Model) -> list[str]:
        """The names of the parameters in scope that may train."""
        return trainable(model, self.scope, self.train_embeddings)

    def _skips(self, model: Model) -> tuple[Skip, ...]:
        from compress.layers.quantized import QuantizedWeight

        skips = [
            Skip(
                path, "its integer weight does not train" + ("" if layer.bias is None else "; its bias does")
            )
            for path, layer in model.module.named_modules()
            if isinstance(layer, QuantizedWeight) and path in self.scope
        ]
        if not self.train_embeddings:
            why = "an embedding; set `train_embeddings: true` to train it"
            skips += [
                Skip(weight.path, why)
                for weight in model.graph.weights
                if weight.role == "embedding" and weight.path in self.scope
            ]
        return tuple(skips)
