"""Low-rank factorization: linear maps become two thin ones, with ranks that one budget buys where it hurts least.

Methods: `svd` (truncated SVD of the weight), `asvd` (Yuan et al. 2023, arXiv 2312.05821), `svd_llm` (Wang et
al. 2024, arXiv 2403.07378), and `fisher`, which measures errors by the change of the loss (after Chekalina et
al. 2025, arXiv 2505.17974); see `compress.numerics.low_rank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.passes.metric import UNSEEN, Method, spectra_of
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.graph.structure import Weight
    from compress.model import Model
    from compress.numerics.low_rank import Offer, Spectrum


DENSE = "stays dense: factors that save anything would lose more here"


class Factorize(Pass):
    """Replace linear maps by the product of two thin ones."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "calibration"

    use: Literal["factorize"] = "factorize"
    keep: float = Field(default=0.8, gt=0, lt=1)
    """The share of the cost of all linear maps in scope that is left."""
    of: Literal["parameters", "macs", "bytes"] = "parameters"
    """What `keep` is a share of: parameters, multiply-accumulates of the example, or stored bytes."""
    method: Method = "fisher"
    """The metric of the error: the change of the loss; of the outputs; of the outputs, each input channel taken
    alone; of the weights."""
    ranks: Literal["budget", "uniform"] = "budget"
    """`budget`: one budget for all, spent where it lowers the error most (relative errors, but with `fisher`).
    `uniform`: every linear map keeps the same share."""
    multiple: int = Field(default=8, ge=1)
    """Ranks are multiples of this, as kernels like them."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """The exponent of the channels' mean magnitude in `asvd`."""
    head: bool = False
    """Also factorize the output head."""
    update: bool = False
    """Refit the output factor of each linear map to the inputs that the compressed part before it gives."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and integer weights have no factors.",
                "Put `factorize` before `quantize` in the recipe, and start from the float model.",
            )

    def require_local(self) -> None:
        reasons = {
            "`method: fisher` needs gradients through the whole model": self.method == "fisher",
            "`ranks: budget` weighs the linear maps of all blocks against each other": self.ranks == "budget",
            "`update: true` reads what the compressed blocks before give": self.update,
            "`head: true` asks for the output head, which is in no block": self.head,
        }
        if found := [reason for reason, holds in reasons.items() if holds]:
            raise Unsuitable(
                f"`factorize` cannot be applied block by block: {'; '.join(found)}.",
                "Set `method: svd_llm` (or asvd, svd) and `ranks: uniform`, without `update` and `head`; or load the "
                "whole model and run it without streaming.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.layers.linear import matrix
        from compress.passes.plain_maps import thin_maps
        from compress.passes.refit import refit

        self.check(model)
        weights, skips = thin_maps(model, self.scope, self.head, self.multiple)
        found = spectra_of(self.method, self.alpha, model, context, weights, self.use)
        skips += [Skip(one.path, UNSEEN) for one in weights if one.path not in found]
        weights = [one for one in weights if one.path in found]
        spectra = list(found.values())
        offers = [self._offer(model, weight, one) for weight, one in zip(weights, spectra, strict=True)]
        ranks = self._allocated(offers)
        changes, factored = [], []
        for weight, spectrum, offer, rank in zip(weights, spectra, offers, ranks, strict=True):
            if rank is None:
                skips.append(Skip(weight.path, DENSE))
                continue
            layer = model.module.get_submodule(weight.path)
            changes.append(_change(weight.path, layer, offer, rank))
            factored += [(weight, matrix(layer))] if self.update else []
            _replace(model.module, layer, *spectrum.factors(rank))
        if self.update:
            refit(model.module, context, factored, "factorize: update")
        chosen = {one.path: rank for one, rank in zip(weights, ranks, strict=True) if rank is not None}
        return Result(model.module, tuple(changes), tuple(skips), {"ranks": chosen})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.passes.slicing import factor_as

        factor_as(module, record["ranks"])
        return module

    def _offer(self, model: Model, weight: Weight, spectrum: Spectrum) -> Offer:
        from compress.layers.linear import matrix

        dense = matrix(model.module.get_submodule(weight.path))
        cost = {
            "parameters": dense.numel(),
            "macs": weight.macs,
            "bytes": dense.numel() * dense.element_size(),
        }[self.of]
        # Only the loss is one unit for all weights.
        return spectrum.offer(float(cost), relative=self.method != "fisher")

    def _allocated(self, offers: Sequence[Offer]) -> list[int | None]:
        from compress.numerics.low_rank import allocate, uniform_ranks

        if self.ranks == "uniform":
            return uniform_ranks(offers, self.keep, self.multiple)
        try:
            return allocate(offers, self.keep * sum(one.dense for one in offers), self.multiple)
        except ValueError as error:
            raise Unsuitable(
                f"`keep: {self.keep}` of the {self.of} cannot be reached: with ranks of {self.multiple}, {error}.",
                "Keep more, or lower `multiple`.",
            ) from error


def _change(path: str, layer: nn.Module, offer: Offer, rank: int) -> Change:
    out, width = offer.shape
    kept = offer.cost(rank) / offer.dense
    lost = float(offer.errors[rank] / offer.errors[0].clamp(min=1e-300))
    return Change(
        path,
        "factorized",
        f"{type(layer).__name__} {out}x{width}",
        f"rank {rank}, {100 * kept:.0f} % of the cost, {100 * lost:.2g} % of the squared error of leaving it out",
    )


def _replace(module: nn.Module, layer: nn.Module, expand: Tensor, reduce: Tensor) -> None:
    """Put factors (out, rank) and (rank, in) in the place of `layer`, in its type and on its device."""
    from compress.layers.linear import matrix
    from compress.layers.low_rank import LowRankLinear
    from compress.layers.quantized import swap

    weight = matrix(layer)
    bias = getattr(layer, "bias", None)
    factors = LowRankLinear(expand.to(weight), reduce.to(weight), bias)
    swap(module, {layer: factors.train(layer.training)})
