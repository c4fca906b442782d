"""How fewer key and value heads stand in a model: as its config says, or as maps that repeat some of their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.errors import Unsuitable
from compress.graph.structure import Attention
from compress.graph.weights import runs
from compress.layers.linear import matrix
from compress.layers.quantized import swap
from compress.layers.repeated import Pieces, RepeatedLinear
from compress.model import Model
from compress.numerics.grouping import Groups
from compress.passes.head_maps import HeadMaps, reordered, row_numbers, sides, write_maps
from compress.passes.kv_setting import Setting, apply_setting, find_setting

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """An attention, which of its kv heads become one, and its maps when they are."""

    attention: Attention
    groups: Groups
    maps: HeadMaps


def setting_for(module: nn.Module, plans: Sequence[tuple[Attention, Groups]]) -> Setting | None:
    """The setting of the config that gives all these attentions, and no others, groups of equal size; or None."""
    counts = {(one.kv_heads, len(groups)) for one, groups in plans}
    uneven = any(len({len(group) for group in groups}) > 1 for _, groups in plans)
    if uneven or len(counts) != 1:
        return None
    [(before, after)] = counts
    fewer: dict[str, int] = {}
    for attention, _ in plans:
        for side in sides(attention)[1:]:
            gone = side.features - side.features // before * after
            fewer[side.path] = fewer.get(side.path, 0) + gone
    return find_setting(module, _smaller(module, fewer), before, after)


def write_setting(model: Model, plans: Sequence[Plan], setting: Setting) -> Record:
    """Give the model the setting, and the plans' maps, at the places where a new trace finds the heads."""
    apply_setting(model.module, setting)
    found = replace(model, module=model.module).graph.attentions
    by_paths = {_paths(one): one for one in found}
    for plan in plans:
        now = by_paths.get(_paths(plan.attention))
        if now is None or (now.heads, now.kv_heads) != (plan.attention.heads, setting.value):
            raise Unsuitable(
                f"With `{setting.name}: {setting.value}` the attention `{plan.attention.path}` is not one of "
                f"{plan.attention.heads} heads with {setting.value} keys and values each.",
                "Leave one of the attentions out by `scope`: then all keep the config as it is.",
            )
        write_maps(model.module, now, reordered(plan.maps, range(setting.value)))
    return {"setting": setting.record()}


def write_repeated(module: nn.Module, plans: Sequence[Plan]) -> Record:
    """Put maps that make each shared head once, and repeat it, in the places of those of keys and values."""
    from_rows: dict[str, list[int]] = {}
    for plan in plans:
        attention = plan.attention
        group_of = {head: number for number, group in enumerate(plan.groups) for head in group}
        spread = [group_of[head] for head in range(attention.kv_heads)]
        full = replace(plan.maps, key=plan.maps.key[spread], value=plan.maps.value[spread])
        write_maps(module, attention, full)
        for side in sides(attention)[1:]:
            rows = torch.tensor(row_numbers(side)).view(attention.kv_heads, -1)
            whole = from_rows.setdefault(side.path, list(range(len(matrix(module.get_submodule(side.path))))))
            for head in range(attention.kv_heads):
                first = plan.groups[group_of[head]][0]
                for row, source in zip(rows[head].tolist(), rows[first].tolist(), strict=True):
                    whole[row] = source
    repeated = {}
    for path, sources in from_rows.items():
        kept = sorted(set(sources))
        place = {row: number for number, row in enumerate(kept)}
        pieces = runs([place[row] for row in sources])
        _repeat(module, path, kept, pieces)
        repeated[path] = {"distinct": len(kept), "pieces": [list(piece) for piece in pieces]}
    return {"repeated": repeated}


def restore_form(module: nn.Module, record: Record) -> None:
    """Give `module`, not yet loaded, the form that a record tells of."""
    if "setting" in record:
        apply_setting(module, Setting(**record["setting"]))
    for path, one in record.get("repeated", {}).items():
        pieces = tuple((start, stop) for start, stop in one["pieces"])
        _repeat(module, path, list(range(one["distinct"])), pieces)


def _repeat(module: nn.Module, path: str, kept: Sequence[int], pieces: Pieces) -> None:
    """Replace the linear map at `path` by one with its rows `kept` alone, which come out as `pieces`."""
    layer = module.get_submodule(path)
    weight, bias = matrix(layer), layer.bias
    distinct = nn.Linear(weight.shape[1], len(kept), bias is not None, device="meta")
    trains = layer.get_parameter("weight").requires_grad
    distinct.weight = nn.Parameter(weight[list(kept)].contiguous(), trains)
    if bias is not None:
        distinct.bias = nn.Parameter(bias.detach()[list(kept)], bias.requires_grad)
    swap(module, {layer: RepeatedLinear(distinct, pieces).train(layer.training)})


def _smaller(module: nn.Module, fewer: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of the maps at the paths in `fewer`, with so many output features less."""
    shapes = {}
    for path, gone in fewer.items():
        layer = module.get_submodule(path)
        out, width = matrix(layer).shape
        weight = (out - gone, width)
        shapes[f"{path}.weight"] = weight[::-1] if isinstance(layer, Conv1D) else weight
        if layer.bias is not None:
            shapes[f"{path}.bias"] = (out - gone,)
    return shapes


def _paths(attention: Attention) -> tuple[str, ...]:
    return attention.path, *(side.path for side in sides(attention))
