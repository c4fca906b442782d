"""Training for ranks: factors learn so that their first features alone do what they can, for every number of them.

Maestro (Horvath et al. 2024, arXiv 2308.14929): generalised ordered dropout with a hierarchical group lasso and
progressive shrinking. Here the factors begin as those of a trained model, in the order of the change of its loss; and
by default a step draws a budget for the whole model instead of a rank for one layer. See `compress.numerics.nested`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.metric import UNSEEN, spectra_of
from compress.passes.taught import Taught, calibrated, lessons, require_fall, trainable
from compress.report import Change, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.layers.low_rank import LowRankLinear, OrderedLowRank
    from compress.model import Model
    from compress.numerics.low_rank import Spectrum
    from compress.passes.taught import Lesson


class TrainRanks(Taught):
    """Train linear maps as factors of which any first part can be kept, and keep what a budget buys."""

    use: Literal["train_ranks"] = "train_ranks"
    steps: int = Field(default=1000, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The largest learning rate."""
    keep: float | None = Field(default=0.5, gt=0, lt=1)
    """The share of the parameters of the factored maps that is left in the end. None: all factors stay, larger than the
    maps that they came from, for `slice_ranks` to cut."""
    dropout: Literal["model", "layer"] = "model"
    """What a step leaves out: of all layers what is beyond a budget that it draws, or of one layer what is beyond a
    rank (Maestro)."""
    least: float = Field(default=0.2, gt=0, lt=1)
    """The smallest budget that is drawn, as a share like `keep`."""
    lasso: float = Field(default=0.0, ge=0)
    """The hierarchical group lasso: how strongly the last features are pulled to zero. Those that reach it are gone."""
    method: Literal["fisher", "svd_llm", "svd"] = "fisher"
    """The metric of the factors that training begins with, see `factorize`."""
    multiple: int = Field(default=8, ge=1)
    """Ranks are multiples of this, as kernels like them."""
    head: bool = False
    """Also the output head."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and integer weights have no factors.",
                "Put `train_ranks` before `quantize` in the recipe, and start from the float model.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.plain_maps import thin_maps
        from compress.passes.rank_dropout import factor_out, settle
        from compress.passes.slicing import Budget, cut

        self.check(model)
        weights, skips = thin_maps(model, self.scope, self.head, self.multiple)
        with lessons(self, model, context) as lesson:
            context = calibrated(context, lesson)
            spectra = spectra_of(self.method, 0.5, model, context, weights, self.use)
            skips += [Skip(one.path, UNSEEN) for one in weights if one.path not in spectra]
            if not spectra:
                return Result(model.module, (), tuple(skips))
            names = trainable(model, self.scope)
            layers = factor_out(model.module, spectra)
            changes = [self._teach(lesson, model.module, names, layers, spectra)]
        whole = settle(model.module, layers, self.multiple)
        if self.keep is None:
            changes += [_left(path, layer) for path, layer in whole.items()]
            return Result(model.module, tuple(changes), tuple(skips), _record(model.module, whole))
        budget = Budget(self.keep, self.multiple)
        # A new value, whose graph is that of the factors.
        made = cut(replace(model), context, whole, budget, "train_ranks: second moments")
        skips += made.skips
        return Result(model.module, (*changes, *made.changes), tuple(skips), _record(model.module, whole))

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.slicing import factor_as

        factor_as(module, record["ranks"])
        return module

    def _teach(
        self,
        lesson: Lesson,
        module: nn.Module,
        names: Sequence[str],
        layers: Mapping[str, OrderedLowRank],
        spectra: Mapping[str, Spectrum],
    ) -> Change:
        from compress.passes.rank_dropout import RankDropout, renamed

        offers = {
            path: one.offer(float(len(one.expand) * one.reduce.shape[1]), self.method != "fisher")
            for path, one in spectra.items()
        }
        dropout = RankDropout(layers, offers, self.dropout, self.least, self.multiple, lesson.context.seed)
        before = dropout.losses(lesson, module)

        def prepare(step: int) -> None:
            if step and self.lasso:
                dropout.shrink(self.learning_rate * self.lasso)
            dropout.draw(step)

        names = lesson.reached(module, renamed(names, layers))
        lesson.learn(module, names, prepare)
        after = dropout.losses(lesson, module)
        require_fall(self.use, fmean(before), fmean(after))
        sizes = ", ".join(f"{100 * share:.0f} %" for share in dropout.judged)
        return Change(
            "the model",
            f"trained on {lesson.kind}, ranks left out",
            f"loss at {sizes} of the parameters: {_listed(before)}",
            f"{_listed(after)} ({len(names)} tensors, {self.steps} steps)",
        )


def _left(path: str, layer: LowRankLinear) -> Change:
    out, width = len(layer.expand.weight), layer.reduce.weight.shape[1]
    return Change(path, "factorized", f"{out}x{width}", f"rank {layer.rank}, for `slice_ranks` to cut")


def _record(module: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    from compress.layers.low_rank import LowRankLinear

    layers = {path: module.get_submodule(path) for path in paths}
    return {
        "ranks": {path: one.rank if isinstance(one, LowRankLinear) else None for path, one in layers.items()}
    }


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{one:.4g}" for one in losses)
