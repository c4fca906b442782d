"""Token reduction: later blocks of an encoder run on fewer tokens, without training.

Methods: `transform`, ours, after Token Transforming (arXiv 2506.05709); `tome` (Bolya et al. 2023, arXiv 2210.09461);
`prune` (EViT, Liang et al. 2022, arXiv 2202.07800); `sample` (Adaptive Token Sampling, Fayyaz et al. 2022, arXiv
2111.15667); `cluster` (Liang et al. 2022, arXiv 2210.01035). See `compress.numerics.token_choice` and `token_clusters`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compress.errors import Unsuitable
from compress.passes.base import Context, Needs, Pass, Result
from compress.report import Change, Effect, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.layers.tokens import How, Layout
    from compress.model import Model
    from compress.passes.token_schedule import Costs

CLUSTERING = {"iterations", "reach", "nearest", "temperature"}
"""The settings of the method `cluster`."""


class MergeTokens(Pass):
    """Reduce the tokens of a stack of encoder blocks."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "nothing"

    use: Literal["merge_tokens"] = "merge_tokens"
    method: Literal["transform", "tome", "prune", "sample", "cluster"] = "transform"
    """Which tokens go, and where to: merged where that moves the states least; merged where keys are most alike; those
    that the class token looks at least, into one; those on which no quantile of its looks falls; all, into the centres
    of a smaller grid, from which every place is given back."""
    keep: float | None = Field(default=None, gt=0, lt=1)
    """The share of the model's multiply-accumulates that is left; the schedule is computed from it."""
    at: tuple[int, ...] | None = None
    """With `keep`, or with `sample`: the numbers of the blocks, from 1 on, before which tokens are reduced. By default
    what changes the answers on the calibration data least of several choices of up to three; one with `cluster`."""
    remove: int | None = Field(default=None, ge=1)
    """In place of `keep`: so many tokens go before each block but the first."""
    left: tuple[int, ...] | None = None
    """In place of `keep`: how many tokens each block runs on, the first block included."""
    multiple: int = Field(default=1, ge=1)
    """With `keep`: counts are multiples of this, as kernels of half precision like them (8)."""
    proportional: bool | None = None
    """Whether attention looks at a token as at all those that it stands for. By default with `transform` and `tome`."""
    by: Literal["gather", "matrix"] | None = None
    """How it is computed: gathered rows, or one product with the whole matrix; by default the latter on a GPU."""
    fuse: bool = True
    """Of `prune`: what goes becomes one token, its mean weighted by attention."""
    samples: int | None = Field(default=None, ge=1)
    """Of `sample`: how many quantiles are drawn; by default as many as there are tokens before the first block."""
    mask: bool = False
    """Of `sample`: all tokens stay, and those that were not drawn are hidden. Exact, and no faster."""
    iterations: int = Field(default=5, ge=0)
    """Of `cluster`: how often tokens and centres are assigned to each other."""
    reach: int = Field(default=5, ge=1)
    """Of `cluster`: tokens go to centres within half of so many rows and columns of the smaller grid."""
    nearest: int = Field(default=20, ge=1)
    """Of `cluster`: from so many centres a place is given back."""
    temperature: float | None = Field(default=None, gt=0)
    """Of `cluster`: what squared distances are multiplied by; by default fitted to the calibration data."""

    @model_validator(mode="after")
    def _one_schedule(self) -> MergeTokens:
        given = [name for name in ("keep", "remove", "left") if getattr(self, name) is not None]
        if len(given) != 1 and not (self.method == "sample" and not given):
            what = " and ".join(f"`{name}`" for name in given) if given else "none of them"
            raise ValueError(f"give exactly one of `keep`, `remove`, `left`; here is {what}.")
        if self.at is not None and self.keep is None and self.method != "sample":
            raise ValueError("`at` goes with `keep`.")
        if self.mask and given:
            raise ValueError(f"`mask: true` keeps all tokens; take `{given[0]}` out.")
        if self.method == "cluster" and (self.keep is None or (self.at and len(self.at) != 1)):
            raise ValueError("`method: cluster` takes `keep`, and one block in `at`.")
        return self

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> MergeTokens:
        owners = {"prune": {"fuse"}, "sample": {"samples", "mask"}, "cluster": CLUSTERING}
        for method, names in owners.items():
            fields = type(self).model_fields
            strangers = sorted(name for name in names if getattr(self, name) != fields[name].default)
            if method != self.method and strangers:
                raise ValueError(f"`{strangers[0]}` goes with `method: {method}`.")
        return self

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized
        from compress.layers.tokens import is_reduced

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and its ranges were measured with all tokens.",
                "Put `merge_tokens` before `quantize` in the recipe.",
            )
        if not model.graph.attentions:
            raise Unsuitable(
                "The model has no attention: each of its outputs is made for one place of a grid, so no place can go.",
                "Leave `merge_tokens` out for this model.",
            )
        if is_reduced(model.module):
            raise Unsuitable(
                "The model's tokens are reduced already.", "Use one `merge_tokens` for all blocks."
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.layers.tokens import install
        from compress.passes.blocks import attends, chosen_stack
        from compress.passes.token_layout import layouts, site_of
        from compress.passes.token_tuning import best

        self.check(model)
        stack = chosen_stack(model, self.scope, "`merge_tokens`", attends(model))
        site = site_of(model, stack, self)
        how = self.how()
        layout = best(model.module, layouts(site, self, how, context), how, context)
        changes = _changes(layout, site.costs)
        if changes:
            install(model.module, layout, how)
        return Result(model.module, changes, _skips(layout), _record(layout) if changes else {})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.tokens import Layout, install
        from compress.numerics.token_clusters import Clusters

        if record:
            values = _tuples(record)
            clusters = Clusters(**values.pop("clusters")) if record["clusters"] else None
            layout = Layout(**{**values, "clusters": clusters})
            install(module, layout, self.how())
        return module

    def how(self) -> How:
        """How the reducers work."""
        from compress.layers.tokens import How

        merges = self.method in {"transform", "tome"}
        proportional = merges if self.proportional is None else self.proportional
        return How(self.method, self.fuse, proportional, self.samples, self.by)


def _changes(layout: Layout, costs: Costs) -> tuple[Change, ...]:
    steps = zip(layout.blocks, (layout.count, *layout.left), layout.left, layout.reduces, strict=False)
    share = f"{100 * costs.share(layout.left):.1f} % of the model's multiply-accumulates are left in all"
    changes = [
        Change(
            block, "tokens", f"{before} tokens", f"{after} tokens" if after < before else "those drawn seen"
        )
        for block, before, after, reduces in steps
        if reduces
    ]
    return (*changes[:-1], replace(changes[-1], after=f"{changes[-1].after}; {share}")) if changes else ()


def _record(layout: Layout) -> dict[str, Any]:
    """`layout` in JSON values."""
    return _lists(asdict(layout))


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(one) if isinstance(one, tuple) else _lists(one) if isinstance(one, dict) else one
        for key, one in values.items()
    }


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(one) if isinstance(one, list) else _tuples(one) if isinstance(one, dict) else one
        for key, one in values.items()
    }


def _skips(layout: Layout) -> tuple[Skip, ...]:
    """The blocks behind which all positions are given back, because something reads them."""
    return tuple(
        Skip(block, "what it gives is read at every position, so all positions are given back behind it")
        for block, restored in zip(layout.blocks, layout.restored, strict=True)
        if restored
    )
