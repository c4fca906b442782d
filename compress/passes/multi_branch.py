"""Training with branches: linear maps learn with grouped branches and batch norms beside them, then take these in.

After the convolutional multigroup re-parameterization of FMViT (arXiv 2311.05707), which has published no code; see
`compress.layers.branches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compress.data import spread
from compress.errors import Unsuitable
from compress.passes.base import Context, Result
from compress.passes.taught import AGREED, Taught, agrees_already, lessons, require_fall, trainable, trained
from compress.report import Change, Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Weight
    from compress.layers.branches import Branched
    from compress.model import Inputs, Model
    from compress.passes.calibration import Watch

SEEN = 32
"""The statistics of the branches are those of so many training batches, evenly spread."""


class MultiBranch(Taught):
    """Train the model to answer as its teacher does, with branches beside its linear maps and 1x1 convolutions."""

    use: Literal["multi_branch"] = "multi_branch"
    steps: int = Field(default=400, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The largest learning rate."""
    groups: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 2, 4), min_length=1)
    """One branch for each: a block diagonal matrix of so many blocks. Where in and out are equal, an identity too."""
    merge: bool = True
    """Merge the branches into the layers in the end; else they stay, for another `multi_branch` to train on."""

    def check(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if is_quantized(model.module):
            raise Unsuitable(
                "The model is quantized already, and integer weights cannot take branches in.",
                "Put `multi_branch` before `quantize` in the recipe.",
            )

    def apply(self, model: Model, context: Context) -> Result:
        self.check(model)
        chosen, skips = self._choose(model)
        if not chosen and not branched_in(model.module):
            return Result(model.module, (), tuple(skips))
        with lessons(self, model, context) as lesson:
            before = lesson.mean_loss(model.module)
            if before < AGREED:
                return Result(model.module, (), (agrees_already(self.use),))
            names = self._trainable(model)
            new = branch_out(model.module, chosen)
            measure(model.module, new, lesson.batches, context)
            names = lesson.reached(model.module, _renamed(names, new))
            lesson.learn(model.module, names)
            after = lesson.mean_loss(model.module)
        require_fall(self.use, before, after)
        layers = branched_in(model.module)
        what = f"{lesson.kind}, with branches beside {len(layers)} layers"
        changes = [trained(self, model.module, names, what, before, after)]
        if self.merge:
            merge(model.module)
        else:
            changes += [_left(path, layer) for path, layer in layers.items()]
        return Result(model.module, tuple(changes), tuple(skips), _record(model.module))

    def restore(self, module: nn.Module, record: dict[str, Any]) -> nn.Module:
        merge(module)
        branch_out(module, record["branched"])
        return module

    def _trainable(self, model: Model) -> list[str]:
        """The parameters in scope: those of a layer with branches are at its path and below it."""
        within = tuple(f"{path}." for path in branched_in(model.module) if path in self.scope)
        inside = [name for name in trainable(model) if name.startswith(within)] if within else []
        return list(dict.fromkeys((*trainable(model, self.scope), *inside)))

    def _choose(self, model: Model) -> tuple[dict[str, tuple[int, ...]], list[Skip]]:
        """The layers that get branches, with the groups of these; and the weighted modules in scope that get none."""
        from compress.layers.branches import groups_for

        chosen, skips = {}, []
        for weight in model.graph.weights:
            if weight.path not in self.scope:
                continue
            why = _refusal(model, weight)
            groups = () if why else groups_for(model.module.get_submodule(weight.path), self.groups)
            if groups:
                chosen[weight.path] = groups
            else:
                skips.append(
                    Skip(weight.path, why or f"none of {list(self.groups)} cuts both of its sides evenly")
                )
        return chosen, skips


def _refusal(model: Model, weight: Weight) -> str:
    """Why a weighted module gets no branches, or ""."""
    from compress.layers.branches import can_branch
    from compress.layers.sparse import is_sparse

    layer = model.module.get_submodule(weight.path)
    if weight.role == "embedding":
        return "an embedding has no product to put branches beside"
    if weight.role == "head":
        return "the output head trains without branches"
    if is_sparse(layer):
        return "its weight is sparse, and branches would fill its zeros; it trains without branches"
    if not can_branch(layer):
        return f"{type(layer).__name__} is no plain linear map or 1x1 convolution; it trains without branches"
    if sharers := model.graph.sharers(f"{weight.path}.weight"):
        return f"its weight is tied with {', '.join(sharers)}"
    if not layer.get_parameter("weight").requires_grad:
        return "its weight is frozen"
    return ""


def branched_in(module: nn.Module) -> dict[str, Branched]:
    """The layers inside `module` that have branches, by path."""
    from compress.layers.branches import Branched

    return {path: part for path, part in module.named_modules() if isinstance(part, Branched)}


def branch_out(module: nn.Module, chosen: Mapping[str, Sequence[int]]) -> dict[str, Branched]:
    """Put branches of the given groups beside the layers at the paths `chosen`, in place."""
    from compress.layers.branches import Branched
    from compress.layers.quantized import swap

    layers = {path: module.get_submodule(path) for path in chosen}
    new = {path: Branched(layer, chosen[path]) for path, layer in layers.items()}
    swap(module, {layers[path]: one for path, one in new.items()})
    return new


def merge(module: nn.Module) -> None:
    """Merge all branches inside `module` into the layers beside them, in place."""
    from compress.layers.quantized import swap

    swap(module, {layer: layer.merge() for layer in branched_in(module).values()})


def measure(
    module: nn.Module, layers: Mapping[str, Branched], batches: Sequence[Inputs], context: Context
) -> None:
    """Set the statistics of the branches of `layers`, at their paths in `module`: means and variances over all places
    of a part of `batches`, padding left out. Every process reads the same ones."""
    from compress.passes.calibration import watch

    sums = {path: _Sums(layer) for path, layer in layers.items()}
    seen = replace(context, calibration=spread(batches, SEEN))
    watch(module, seen, {path: one.watch() for path, one in sums.items()}, "multi_branch: statistics")
    for one in sums.values():
        one.write()


class _Sums:
    """Sums over places, in float64, of what the matrices of a layer's branches give, and of the squares."""

    def __init__(self, layer: Branched) -> None:
        self.layer = layer
        self.count = 0
        self.first: list[Any] = [0.0] * len(layer.branches)
        self.second: list[Any] = [0.0] * len(layer.branches)

    def watch(self) -> Watch:
        from torch import nn

        from compress.passes.calibration import Watch

        return Watch(self._add, None if isinstance(self.layer.plain, nn.Conv2d) else 1)

    def _add(self, index: int, values: Any) -> None:
        del index  # these layers have one input
        rows = self.layer.rows(values)
        self.count += len(rows)
        for number, branch in enumerate(self.layer.branches):
            made = (rows.to(branch.scale.dtype) @ branch.matrix().T).double()  # type: ignore[operator]
            self.first[number] = self.first[number] + made.sum(0)
            self.second[number] = self.second[number] + made.square().sum(0)

    def write(self) -> None:
        """Give the layer its statistics; one that saw nothing keeps those of a new one."""
        if self.count:
            self.layer.measure(
                [one / self.count for one in self.first], [one / self.count for one in self.second]
            )


def _renamed(names: Sequence[str], new: Mapping[str, Branched]) -> list[str]:
    """The parameters called `names` before there were branches, as they are called now, and those of the branches."""
    renamed = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        renamed.append(f"{path}.plain.{leaf}" if path in new else name)
    return renamed + [
        f"{path}.branches.{name}"
        for path, layer in new.items()
        for name, _ in layer.branches.named_parameters()
    ]


def _left(path: str, layer: Branched) -> Change:
    groups = [branch.groups for branch in layer.branches]
    kinds = ", ".join("identity" if not count else f"{count} block{'s' * (count > 1)}" for count in groups)
    return Change(path, "branches", type(layer.plain).__name__, f"with {len(groups)} branches: {kinds}")


def _record(module: nn.Module) -> dict[str, Any]:
    layers = branched_in(module)
    return {"branched": {path: [one.groups for one in layer.branches] for path, layer in layers.items()}}
