"""Sparse factorization: linear maps become a small dictionary and sparse codes, which train together.

DSFormer and its straight-through factorizer (Chand et al. 2023, arXiv 2312.13211; no official code). See
`compress.layers.coded` and `compress.numerics.sparse_coding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.metric import UNSEEN, Map, Metric, measured
from compress.passes.taught import Taught, calibrated, lessons, trainable
from compress.report import Change, Skip

if TYPE_CHECKING:
    from torch import Size, Tensor, nn

    from compress.graph.structure import Weight
    from compress.layers.coded import CodedLinear
    from compress.model import Model
    from compress.passes.coding import Form, Start
    from compress.passes.taught import Lesson


class FactorizeSparse(Taught):
    """Write linear maps as sparse codes in a small dictionary, and train both."""

    use: Literal["factorize_sparse"] = "factorize_sparse"
    steps: int = Field(default=400, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=5e-6, gt=0)
    """The largest learning rate."""
    keep: float = Field(default=0.5, gt=0, lt=1)
    """The share of the stored bytes of the maps that is left: codes, their places, and dictionary."""
    shares: Literal["budget", "uniform"] = "budget"
    """`budget`: one budget for all maps, spent where it lowers the error most. `uniform`: every map keeps the same
    share."""
    atoms: float | None = Field(default=None, gt=0, le=4)
    """The size of a dictionary, where the bytes suffice, as a share of what it spans: the smaller side of the map.
    None: a few sizes are tried on one map of each shape."""
    method: Literal["fisher", "svd_llm", "svd"] = "fisher"
    """The metric of the error that training begins with, see `factorize`."""
    freeze: float = Field(default=0.2, ge=0, le=1)
    """The share of the steps, the last ones, in which codes keep their places."""
    head: bool = False
    """Also the output head."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and integer weights have no codes.",
                "Put `factorize_sparse` before `quantize` in the recipe, and start from the float model.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        from compress.passes.coding import coded, settle
        from compress.passes.plain_maps import plain_maps

        self.check(model)
        weights, skips = plain_maps(model, self.scope, self.head)
        with lessons(self, model, context) as lesson:
            starts, left = self._starts(model, calibrated(context, lesson), weights)
            skips += left
            if not starts:
                return Result(model.module, (), tuple(skips))
            names = trainable(model, self.scope)
            changes = [_change(path, model.module.get_submodule(path), one) for path, one in starts.items()]
            layers = coded(model.module, starts)
            trained = self._teach(lesson, model.module, names, layers)
        settle(model.module, layers.values())
        changes += [trained] if isinstance(trained, Change) else []
        skips += [trained] if isinstance(trained, Skip) else []
        record = {path: [one.form.atoms, one.form.count] for path, one in starts.items()}
        return Result(model.module, tuple(changes), tuple(skips), {"codes": record})

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        from compress.layers.coded import empty_coded
        from compress.layers.linear import matrix
        from compress.layers.quantized import swap

        new = {}
        for path, (atoms, count) in record["codes"].items():
            layer = module.get_submodule(path)
            made = empty_coded(matrix(layer), getattr(layer, "bias", None), atoms, count)
            new[layer] = made.train(layer.training)
        swap(module, new)
        return module

    def _starts(
        self, model: Model, context: Context, weights: Sequence[Weight]
    ) -> tuple[dict[str, Start], list[Skip]]:
        """Where those of `weights` begin that become codes, by path, and why the others do not."""
        from compress.layers.linear import matrix
        from compress.passes.coding import start, two_sided
        from compress.progress import track

        maps = {one.path: Map(one, one) for one in weights}
        what = f"{self.use}: second moments"
        metrics = measured(self.method, 0.5, model, context, list(maps.values()), what)
        skips = [Skip(path, UNSEEN) for path, one in maps.items() if not metrics.reaches(one)]
        dense = {
            path: matrix(model.module.get_submodule(path)).cpu()
            for path, one in maps.items()
            if metrics.reaches(one)
        }

        def metric(path: str) -> Metric:
            return two_sided(metrics.of(maps[path]), dense[path])

        chosen, starts = self._forms(dense, metric, context.seed), {}
        for path in track(context.observer, f"{self.use}: dictionaries", list(dense)):
            if form := chosen[path]:
                starts[path] = start(dense[path], form, metric(path), context.seed)
            else:
                skips.append(Skip(path, _why_dense(dense[path])))
        return starts, skips

    def _forms(
        self, dense: Mapping[str, Tensor], metric: Callable[[str], Metric], seed: int
    ) -> dict[str, Form | None]:
        """The form of each map, the best on one map of each shape; None: there is none that makes it smaller."""
        from compress.passes.coding import best_share, budget, forms, largest

        kept = dict.fromkeys(dense, self.keep)
        if self.shares == "budget" and dense:
            kept = budget(dense, metric, self.method != "fisher", self.keep)
        sizes: dict[Size, float] = {}
        chosen: dict[str, Form | None] = {}
        for path, weight in dense.items():
            keep = kept[path]
            offered = forms(weight, keep, self.atoms) or forms(weight, keep) if keep < 1 else []
            if len(offered) > 1:
                if weight.shape not in sizes:
                    sizes[weight.shape] = best_share(weight, keep, metric(path), seed)
                size = sizes[weight.shape] * largest(weight, keep) / min(weight.shape)
                offered = forms(weight, keep, size) or offered
            chosen[path] = offered[-1] if offered else None
        return chosen

    def _teach(
        self, lesson: Lesson, module: nn.Module, names: Sequence[str], layers: Mapping[str, CodedLinear]
    ) -> Change | Skip:
        """What training did; where it did not lower the loss, it is taken back."""
        from compress.passes.coding import freeze, renamed, take_back

        before = lesson.mean_loss(module)
        frozen = self.steps - round(self.freeze * self.steps)

        def prepare(step: int) -> None:
            if step >= frozen:
                freeze(layers.values())

        names = lesson.reached(module, renamed(names, layers))
        begun = {name: module.get_parameter(name).detach().clone() for name in names}
        lesson.learn(module, names, prepare)
        after = lesson.mean_loss(module)
        if not after < before:
            take_back(module, begun, layers.values())
            return Skip(
                "the model",
                f"it is as codes and dictionaries began: {self.steps} steps of training did not lower the loss, "
                f"{before:.4g} before and {after:.4g} after. A lower rate, more steps or more data may",
            )
        return Change(
            "the model",
            f"trained on {lesson.kind}, codes straight through",
            f"loss {before:.4g}",
            f"loss {after:.4g} ({len(names)} tensors, {self.steps} steps)",
        )


def _why_dense(weight: Tensor) -> str:
    out, width = weight.shape
    return f"stays dense: no codes and dictionary for {out}x{width} are smaller and worth their share"


def _change(path: str, layer: nn.Module, start: Start) -> Change:
    from compress.layers.linear import matrix

    weight, form = matrix(layer), start.form
    out, width = weight.shape
    share = form.bytes / (weight.numel() * weight.element_size())
    work = min(form.atoms * (out + width) / weight.numel(), 1)
    return Change(
        path,
        "sparsely factorized",
        f"{type(layer).__name__} {out}x{width}",
        f"{form.atoms} atoms, {form.count} non-zeros a code, {100 * share:.0f} % of the bytes, "
        f"{100 * work:.0f} % of the multiply-accumulates, "
        f"{100 * start.lost:.2g} % of the squared error of leaving it out",
    )
