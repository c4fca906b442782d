"""Fold batch norms and layer scales into the linear maps and convolutions beside them, with the function kept.

A batch norm (Ioffe & Szegedy 2015, arXiv 1502.03167) with fixed statistics multiplies and shifts each feature by
constants; so does the layer scale of a residual branch (Touvron et al. 2021, arXiv 2103.17239), with no shift. What
writes the features takes both on, or else all that reads them. In the same way the map of the queries takes on the
number by which an attention multiplies its scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Rescale
    from compress.model import Model
    from compress.passes.folding import Folding


class FoldBatchNorm(Pass):
    """Fold batch norms and layer scales into the weights beside them."""

    effect: ClassVar[Effect] = "exact"
    needs: ClassVar[Needs] = "nothing"

    use: Literal["fold_batch_norm"] = "fold_batch_norm"
    scale: bool = True
    """Also fold the number by which an attention multiplies its scores, 1 / sqrt(head size), into the map of its
    queries, where that is an operation of its own."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its integer weights cannot take on batch norms.",
                "Put `fold_batch_norm` before `quantize` in the recipe, and start from the float model.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        del context  # weights alone decide
        self.check(model)
        changes, skips, record = self._fold_rescales(model)
        if self.scale and any(one.path in self.scope for one in model.graph.score_scales):
            # A new trace: what stood between a map of queries and the scores may be gone now.
            model = replace(model, module=self.restore(model.module, record))
            scaled, left, record["scales"] = self._fold_scales(model)
            changes, skips = changes + scaled, skips + left
        return Result(self.restore(model.module, record), tuple(changes), tuple(skips), record)

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.folding import restore_folds

        restore_folds(module, record)
        return module

    def _fold_rescales(self, model: Model) -> tuple[list[Change], list[Skip], dict[str, Any]]:
        """Write batch norms and layer scales into the weights beside them: changes, skips, and the record of these."""
        from compress.passes.folding import Folding

        folding = Folding(model.graph, model.module, self.scope)
        whys = folding.fold()
        skips = [Skip(name, why) for name, why in whys.items()] + self._idle(model)
        return [_change(folding, one) for one in folding.gone()], skips, folding.record()

    def _idle(self, model: Model) -> list[Skip]:
        """The batch norms in scope that the example does not run."""
        from torch.nn.modules.batchnorm import _BatchNorm

        known = {one.path for one in model.graph.rescales}
        return [
            Skip(path, "it does not run on the example")
            for path, part in model.module.named_modules()
            if isinstance(part, _BatchNorm) and path in self.scope and path not in known
        ]

    def _fold_scales(self, model: Model) -> tuple[list[Change], list[Skip], list[str]]:
        """Write the factors of attentions into their maps: changes, skips, and the attributes to be set to 1."""
        from compress.passes.folding import fold_score_scale

        changes, skips, attributes = [], [], []
        for one in model.graph.score_scales:
            if one.path not in self.scope:
                continue
            if why := fold_score_scale(model.graph, model.module, self.scope, one):
                skips.append(Skip(one.path, why))
            elif one.query is not None:
                before, after = f"scores multiplied by {one.factor:.4g}", f"in {one.query.path}; by 1"
                changes.append(Change(one.path, f"{one.attribute} folded", before, after))
                attributes.append(f"{one.path}.{one.attribute}".strip("."))
        return changes, skips, attributes


def _change(folding: Folding, one: Rescale) -> Change:
    into, features = ", ".join(folding.takers(one.name)), max(one.probe)
    if one.parameter:
        before = f"a factor for each of {features} features"
        return Change(one.path, f"{one.parameter} folded", before, f"in {into}; a single 1 stays")
    kind = type(folding.module.get_submodule(one.path)).__name__
    return Change(one.path, "folded", f"{kind} of {features} features", f"in {into}")
