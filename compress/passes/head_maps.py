"""The maps of one attention, head by head, as they are read from a model and written into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.graph.structure import Attention, Projection
from compress.layers.linear import matrix


@dataclass(frozen=True)
class HeadMaps:
    """Float64: `query` (heads, size, in), `key` and `value` (kv heads, size, in), `output` (heads, out, size) or None.

    The bias stands as a last input, zero where there is none. Query head i reads the kv head number `reads[i]`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor | None
    reads: tuple[int, ...]


def read_maps(module: nn.Module, attention: Attention) -> HeadMaps:
    """The maps of an attention of `module` whose query, key and value are linear maps."""
    query, key, value = sides(attention)
    output = None
    if attention.output is not None:
        weight = matrix(module.get_submodule(attention.output.path))
        mixed = weight.to("cpu", torch.float64, copy=True)  # no view, which would follow what is written
        output = mixed.unflatten(1, (attention.heads, -1)).transpose(0, 1)
    shared = attention.heads // attention.kv_heads
    return HeadMaps(
        query=_with_bias(module, query, attention.heads),
        key=_with_bias(module, key, attention.kv_heads),
        value=_with_bias(module, value, attention.kv_heads),
        output=output,
        reads=tuple(head // shared for head in range(attention.heads)),
    )


def write_maps(module: nn.Module, attention: Attention, maps: HeadMaps) -> None:
    """Write `maps`, of as many heads as `attention` has, into `module`."""
    for side, heads in zip(sides(attention), (maps.query, maps.key, maps.value), strict=True):
        rows, layer = row_numbers(side), module.get_submodule(side.path)
        weight = matrix(layer)
        weight[rows] = heads.flatten(0, 1)[:, :-1].to(weight)
        if layer.bias is not None:
            layer.get_parameter("bias").data[rows] = heads.flatten(0, 1)[:, -1].to(weight)
    if attention.output is not None and maps.output is not None:
        weight = matrix(module.get_submodule(attention.output.path))
        weight.copy_(maps.output.transpose(0, 1).flatten(1))


def sides(attention: Attention) -> tuple[Projection, Projection, Projection]:
    """Query, key and value, which must be there."""
    query, key, value = attention.query, attention.key, attention.value
    assert query is not None
    assert key is not None
    assert value is not None
    return query, key, value


def row_numbers(projection: Projection) -> list[int]:
    """The output features of a projection in order, head after head."""
    return [row for start, stop in projection.rows for row in range(start, stop)]


def reordered(maps: HeadMaps, order: Sequence[int]) -> HeadMaps:
    """The same attention with its kv heads in another order, and the query heads in that of the kv heads they read."""
    order = list(order)
    queries = [head for kv in order for head, read in enumerate(maps.reads) if read == kv]
    place = {kv: number for number, kv in enumerate(order)}
    return HeadMaps(
        query=maps.query[queries],
        key=maps.key[order],
        value=maps.value[order],
        output=None if maps.output is None else maps.output[queries],
        reads=tuple(place[maps.reads[head]] for head in queries),
    )


def _with_bias(module: nn.Module, side: Projection, heads: int) -> Tensor:
    layer, rows = module.get_submodule(side.path), row_numbers(side)
    weight = matrix(layer)[rows].double().cpu()
    bias = weight.new_zeros(len(rows)) if layer.bias is None else layer.bias.detach()[rows].double().cpu()
    return torch.cat([weight, bias[:, None]], 1).unflatten(0, (heads, -1))
