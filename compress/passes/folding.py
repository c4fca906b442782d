"""Rescales taken on by the weights beside them, one after the other, through those that are gone already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.graph.structure import Graph, Neighbour, Rescale, ScoreScale
from compress.layers.quantized import swap
from compress.layers.weighted import add_bias, fits, matrices, outputs, unwritable, write
from compress.numerics.rescaling import rescale_after, rescale_before, scale_and_shift
from compress.scope import Scope

Rescaled = tuple[Tensor, Tensor | None]
Rule = Callable[[Tensor, Tensor | None, Tensor, Tensor], Rescaled]


class Folding:
    """The rescales of one module.

    `into` says which modules took on each one that is gone, by its name; `biases` which of them got a bias for it.
    """

    def __init__(self, graph: Graph, module: nn.Module, scope: Scope) -> None:
        self.graph = graph
        self.module = module
        self.scope = scope
        self.rescales = {one.name: one for one in graph.rescales}
        self.into: dict[str, tuple[str, ...]] = {}
        self.biases: list[str] = []
        self.places = Counter(part for _, part in module.named_modules(remove_duplicate=False))

    def fold(self, only: Container[str] | None = None) -> dict[str, str]:
        """Fold all that is in scope, in place; why each of the others stays, by name. With `only`, these names alone.

        First each into what writes its input, in the order of execution; then those that are left into what reads their
        output, in the reverse order.
        """
        wanted = [one for one in self.graph.rescales if one.path in self.scope]
        wanted = [one for one in wanted if only is None or one.name in only]
        whys = {one.name: self._into_writer(one) for one in wanted}
        for one in reversed(wanted):
            if whys[one.name] and not one.parameter:
                why = self._into_readers(one)
                whys[one.name] = ", and ".join(dict.fromkeys((whys[one.name], why))) if why else ""
        return {name: why for name, why in whys.items() if why}

    def gone(self) -> list[Rescale]:
        """What has been folded, in the order of execution."""
        return [one for name, one in self.rescales.items() if name in self.into]

    def record(self) -> dict[str, Any]:
        """What `restore_folds` needs."""
        gone = self.gone()
        return {
            "gone": [one.path for one in gone if not one.parameter],
            "ones": [one.name for one in gone if one.parameter],
            "biases": [path for path in self.biases if path not in self.into],
            "scales": [],
        }

    def takers(self, name: str) -> list[str]:
        """The modules that hold the rescale `name` in the end, where some that took it on are gone too."""
        return [
            last for path in self.into[name] for last in (self.takers(path) if path in self.into else [path])
        ]

    def _into_writer(self, one: Rescale) -> str:
        """Fold `one` into what writes its input, or say why not."""
        beside, why = one.writer, one.no_writer
        zeros = False
        while beside is not None:
            zeros |= beside.zeros
            if beside.path not in self.into:
                break
            above = self.rescales[beside.path]
            beside, why = above.writer, above.no_writer
        if beside is None:
            return why
        return self._move(one, [replace(beside, zeros=zeros)], rescale_after)

    def _into_readers(self, one: Rescale) -> str:
        """Fold `one` into all that reads its output, or say why not."""
        readers, why = self._readers(one)
        if why:
            return why
        if staying := [beside.path for beside in readers if beside.path in self.rescales]:
            return f"`{staying[0]}` reads it, and stays"
        return self._move(one, readers, rescale_before)

    def _readers(self, one: Rescale) -> tuple[list[Neighbour], str]:
        """What reads `one`, through rescales that are gone; or why it cannot be that alone."""
        found: list[Neighbour] = []
        why = one.no_readers or one.no_writer if not one.readers else ""
        for beside in one.readers:
            if beside.path in self.into:
                further, why = self._readers(self.rescales[beside.path])
                found += [replace(more, zeros=more.zeros or beside.zeros) for more in further]
            else:
                found.append(beside)
            if why:
                break
        return found, why

    def _move(self, one: Rescale, beside: list[Neighbour], rule: Rule) -> str:
        """Let all of `beside` take `one` on by `rule`, or say why they cannot."""
        if why := self._immovable(one) or next(filter(None, map(self._refusal, beside)), ""):
            return why
        scale, shift = self._values(one)
        if shift.any() and (padded := [other.path for other in beside if other.zeros]):
            return f"zeros are padded between it and `{padded[0]}`, and its shift would be missing there"
        layers = {other.path: self.module.get_submodule(other.path) for other in beside}
        values = {path: rescaled(layer, scale, shift, rule) for path, layer in layers.items()}
        for path, pair in values.items():
            if not fits(layers[path], *pair):
                return f"`{path}` would not stay finite in {layers[path].weight.dtype}"
        for path, (weight, bias) in values.items():
            if bias is not None and layers[path].bias is None:
                self.biases.append(path)
            write(layers[path], weight, bias)
        self.into[one.name] = tuple(layers)
        return ""

    def _values(self, one: Rescale) -> tuple[Tensor, Tensor]:
        """Scale and shift (features,) of a rescale, as they are now."""
        if not one.parameter:
            return scale_and_shift(self.module.get_submodule(one.path), one.probe)
        scale = self.module.get_parameter(one.name).detach().double().flatten()
        return scale, torch.zeros_like(scale)

    def _immovable(self, one: Rescale) -> str:
        if one.parameter and (sharers := self.graph.sharers(one.name)):
            return f"`{one.parameter}` is tied with {', '.join(sharers)}"
        places = self.places[self.module.get_submodule(one.path)]
        return "its module stands in several places" if places > 1 and not one.parameter else ""

    def _refusal(self, beside: Neighbour) -> str:
        """Why a neighbour cannot take anything on, or ""."""
        if beside.path in self.rescales and self.rescales[beside.path].parameter:
            return f"`{beside.path}` is next to it, and stays"
        return refusal(self.graph, self.module, self.scope, beside.path)


def refusal(graph: Graph, module: nn.Module, scope: Scope, path: str) -> str:
    """Why the module at `path` cannot take anything on, or ""."""
    if path not in scope:
        return f"`{path}` would have to take it on, and is out of scope"
    if why := unwritable(module.get_submodule(path)):
        return f"`{path}` {why}"
    for name in ("weight", "bias"):
        if sharers := graph.sharers(f"{path}.{name}"):
            return f"`{path}.{name}` is tied with {', '.join(sharers)}"
    return ""


def rescaled(layer: nn.Module, scale: Tensor, shift: Tensor, rule: Rule) -> Rescaled:
    """Weight and bias of a writable layer that has taken a scale and a shift (features,) on by `rule`."""
    bias = None if layer.bias is None else layer.get_parameter("bias").detach().double()
    return rule(matrices(layer), bias, scale, shift)


def fold_score_scale(graph: Graph, module: nn.Module, scope: Scope, one: ScoreScale) -> str:
    """Let the map of the queries take on the factor of an attention, in place, or say why it cannot.

    The attribute that holds the factor stays as it is: `restore_folds` sets it to 1.
    """
    if one.query is None:
        return one.why
    if why := refusal(graph, module, scope, one.query.path):
        return why
    layer = module.get_submodule(one.query.path)
    scale = torch.ones(outputs(layer), dtype=torch.float64, device=layer.weight.device)
    for start, stop in one.query.rows:
        scale[start:stop] = one.factor
    write(layer, *rescaled(layer, scale, torch.zeros_like(scale), rescale_after))
    return ""


def restore_folds(module: nn.Module, record: dict[str, Any]) -> None:
    """Take out the modules that are `gone`, make the parameters `ones` a single 1 and the attributes `scales` 1.0, and
    give the modules `biases` a bias. What is so already stays so.
    """
    swap(module, {module.get_submodule(path): nn.Identity() for path in record["gone"]})
    for name in record["ones"]:
        path, _, leaf = name.rpartition(".")
        before = module.get_parameter(name)
        # Not trained: its freedom is that of the weight that has taken it on.
        one = nn.Parameter(before.detach().new_ones([1] * before.dim()), requires_grad=False)
        setattr(module.get_submodule(path), leaf, one)
    for name in record["scales"]:
        path, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(path), attribute, 1.0)
    for path in record["biases"]:
        add_bias(module.get_submodule(path))
