"""Distillation: train a compressed model to answer as the model that it came from.

Losses: `logits` (Hinton et al. 2015, arXiv 1503.02531), `hidden` (the states between blocks, relative to their
energy), and `minilm` (relations between tokens in the last attention: Wang et al. 2020, arXiv 2002.10957, and
2021, arXiv 2012.15828); see `compress.numerics.relations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.data import spread
from compress.errors import Unproved, Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.report import Change, Effect, Skip
from compress.training import Training, train, training_batches, training_only

if TYPE_CHECKING:
    from torch import nn

    from compress.model import Inputs, Model
    from compress.training import Loss

AGREED = 1e-8
"""A loss below this is rounding: there is nothing to learn from the teacher."""
MEASURED = 8
"""So many of the batches, evenly spread, say what the loss was before and is after."""


class Distill(Training, Pass):
    """Train the model to answer as its teacher does: the model that the run began with."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "training"

    use: Literal["distill"] = "distill"
    steps: int = Field(default=400, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The largest learning rate."""
    loss: Literal["auto", "logits", "hidden", "minilm"] = "auto"
    """What is compared: the distributions over classes or words; the states between blocks; the relations between
    tokens in the last attention. `auto`: `logits` where the model has them, else `hidden`."""
    temperature: float = Field(default=1.0, gt=0)
    """Of `logits`: distributions are softened by it."""
    relation_heads: int | None = Field(default=None, ge=1)
    """Of `minilm`: cut queries, keys and values into so many heads and relate each with itself, so that teacher and
    student may have different heads. Without it, their own heads: attentions and value relations."""
    train_embeddings: bool = False
    """Also train embeddings, and a head that is tied to one."""

    def check(self, model: Model) -> None:
        if not self._candidates(model):
            raise Unsuitable(
                "No parameter in the scope of `distill` trains: what is there is integers, frozen, or embeddings.",
                "Widen the scope, or set `train_embeddings: true`.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.teaching import objective, require_teacher

        self.check(model)
        batches = training_batches(context, self.use)
        with require_teacher(context).on(context.device) as teacher:
            kind, loss = objective(self, model, teacher)
            seen = spread(batches, MEASURED)
            before = _mean_loss(model.module, loss, seen)
            if before < AGREED:
                why = "it answers as its teacher does already; put `distill` after the passes that compress"
                return Result(model.module, (), (Skip("the model", why),))
            names = _reached(model.module, self._candidates(model), loss, seen[0])
            with training_only(model.module, names):
                train(model.module, batches, loss, self, context, f"distill: {kind}")
            after = _mean_loss(model.module, loss, seen)
        _require_fall(before, after)
        change = self._change(model.module, names, kind, before, after)
        return Result(model.module, (change,), self._skips(model))

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        del record
        return module

    def _change(self, module: nn.Module, names: list[str], kind: str, before: float, after: float) -> Change:
        count = sum(module.get_parameter(name).numel() for name in names)
        trained = f"{count} parameters in {len(names)} tensors, {self.steps} steps"
        return Change(
            "the model", f"trained on {kind}", f"loss {before:.4g}", f"loss {after:.4g} ({trained})"
        )

    def _candidates(self, model: Model) -> list[str]:
        """The names of the parameters in scope that may train."""
        frozen = set() if self.train_embeddings else _embedded(model)
        return [
            name
            for name, parameter in model.module.named_parameters()
            if name.rpartition(".")[0] in self.scope and parameter.requires_grad and parameter not in frozen
        ]

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


def _embedded(model: Model) -> set[nn.Parameter]:
    """The parameters of embeddings, and so of heads that are tied to one."""
    paths = [weight.path for weight in model.graph.weights if weight.role == "embedding"]
    return {parameter for path in paths for parameter in model.module.get_submodule(path).parameters(False)}


def _mean_loss(module: nn.Module, loss: Loss, batches: Sequence[Inputs]) -> float:
    import torch

    with torch.no_grad():
        return sum(float(loss(module, batch)) for batch in batches) / len(batches)


def _reached(module: nn.Module, names: list[str], loss: Loss, batch: Inputs) -> list[str]:
    """Those of the parameters called `names` that the loss depends on."""
    import torch

    with torch.enable_grad(), training_only(module, names):
        value = loss(module, batch)
        wanted = [module.get_parameter(name) for name in names]
        if not value.requires_grad:
            raise Unsuitable(
                "The loss of `distill` depends on no parameter in its scope.", "Widen the scope."
            )
        found = torch.autograd.grad(value, wanted, allow_unused=True)
    return [name for name, one in zip(names, found, strict=True) if one is not None]


def _require_fall(before: float, after: float) -> None:
    if not after < before:
        raise Unproved(
            f"`distill` did not lower its loss: {before:.4g} before and {after:.4g} after.",
            "Lower the learning rate, take more steps, or give more data.",
        )
