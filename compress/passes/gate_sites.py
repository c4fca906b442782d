"""Where gates can go: attentions whose queries and output are plain linear maps over the same positions."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.layers.linear import is_linear, matrix
from compress.outputs import forward
from compress.report import Skip

if TYPE_CHECKING:
    from torch import nn

    from compress.graph.structure import Attention
    from compress.model import Model
    from compress.scope import Scope


@dataclass(frozen=True)
class GateSite:
    """A gate of `heads` heads in the module at `holder`: it reads what the map at `query` reads, `features` wide, and
    multiplies what the map at `output` reads.
    """

    holder: str
    query: str
    output: str
    features: int
    heads: int


def gate_sites(model: Model, scope: Scope, apart: bool) -> tuple[list[GateSite], list[Skip]]:
    """The sites in `scope`, and the attentions there that have none; `apart`, where each head reads its own share."""
    sites: dict[str, GateSite] = {}
    skips = []
    attentions = [one for one in model.graph.attentions if one.path in scope]
    leading = _leading(model, attentions)
    for one in attentions:
        why = _obstacle(model, one, leading, apart)
        if not why and one.path in sites:
            why = "another attention of the same module has its gate"
        if why:
            skips.append(Skip(one.path, why))
            continue
        assert one.query is not None and one.output is not None  # noqa: PT018
        width = matrix(model.module.get_submodule(one.query.path)).shape[1]
        sites[one.path] = GateSite(one.path, one.query.path, one.output.path, width, one.heads)
    return list(sites.values()), skips


def _obstacle(model: Model, one: Attention, leading: dict[str, tuple[int, ...]], apart: bool) -> str:
    """Why the attention `one` cannot have a gate; "" if it can."""
    if one.query is None or one.output is None:
        return f"no linear map {'makes its queries' if one.query is None else 'reads its heads alone'}"
    for path in (one.query.path, one.output.path):
        layer = model.module.get_submodule(path)
        if not is_linear(layer):
            return f"`{path}` is a {type(layer).__name__}, and not a plain linear map"
        if path not in leading:
            return f"`{path}` is not called with its input as first argument, where a gate would hear it"
    if sharers := model.graph.sharers(f"{one.output.path}.weight"):
        return f"the weight of its output map is tied with {', '.join(sharers)}"
    if leading[one.query.path] != leading[one.output.path]:
        return (
            f"its queries are made from {leading[one.query.path]} positions, and its output from "
            f"{leading[one.output.path]}"
        )
    width = matrix(model.module.get_submodule(one.query.path)).shape[1]
    if apart and width % one.heads:
        return f"{width} features cannot be shared out among {one.heads} heads; set `kind: all`"
    return ""


def _leading(model: Model, attentions: Iterable[Attention]) -> dict[str, tuple[int, ...]]:
    """The leading dimensions of what the maps of queries and outputs read, on the model's example; none of a map whose
    weight is used without a call, or that is given its input by name: a gate's hooks would not hear it.
    """
    found: dict[str, tuple[int, ...]] = {}
    paths = {side.path for one in attentions for side in (one.query, one.output) if side is not None}
    with ExitStack() as hooks:
        for path in paths:

            def see(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                if args:
                    found[path] = tuple(args[0].shape[:-1])

            hooks.callback(model.module.get_submodule(path).register_forward_pre_hook(see).remove)
        forward(model.module, model.example)
    return found
