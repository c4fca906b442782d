"""Which attentions can have fewer key and value heads, and why the others cannot."""

from __future__ import annotations

from compress.graph.structure import Attention, Projection
from compress.layers.linear import is_linear
from compress.layers.repeated import RepeatedLinear
from compress.layers.sparse import is_sparse
from compress.model import Model


def reason_to_skip(model: Model, attention: Attention, kv_heads: int, even: bool) -> str:
    """Why an attention cannot have `kv_heads` key and value heads, in groups of one size if `even`; or ""."""
    sides = {"queries": attention.query, "keys": attention.key, "values": attention.value}
    for name, side in sides.items():
        if side is None:
            return f"the trace shows no linear map that makes its {name} alone, head by head"
    if attention.kv_heads <= kv_heads:
        return f"it has {attention.kv_heads} key and value heads already"
    if even and attention.kv_heads % kv_heads:
        return (
            f"its {attention.kv_heads} key and value heads make no {kv_heads} groups of one size; choose a divisor, or "
            "`grouping: norms`"
        )
    if attention.heads % attention.kv_heads:
        return (
            f"its {attention.heads} query heads do not share {attention.kv_heads} key and value heads evenly"
        )
    whys = [
        _of_map(model, name, side) for name, side in (*sides.items(), ("mixture", attention.output)) if side
    ]
    return next(filter(None, whys), "")


def _of_map(model: Model, name: str, side: Projection) -> str:
    """Why the map of an attention's `name` cannot be written to, or ""."""
    layer = model.module.get_submodule(side.path)
    if not is_linear(layer):
        return f"the map of its {name}, `{side.path}`, is a {type(layer).__name__}, and no plain linear map"
    if is_sparse(layer):
        return f"the map of its {name}, `{side.path}`, is sparse, and new heads would fill its zeros"
    if isinstance(model.module.get_submodule(side.path.rpartition(".")[0]), RepeatedLinear):
        return f"the map of its {name}, `{side.path}`, makes heads that are repeated already"
    weight = model.graph.weight(side.path)
    if weight is None:
        return f"the map of its {name}, `{side.path}`, does more than to multiply by one weight"
    if "|" in weight.reads:
        return f"the map of its {name}, `{side.path}`, reads more than one tensor"
    for leaf in ("weight", "bias"):
        if sharers := model.graph.sharers(f"{side.path}.{leaf}"):
            return f"`{side.path}.{leaf}` is tied with {', '.join(sharers)}"
    return ""
