"""Whether an attention is what the trace says: changes of its maps that must change nothing are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.graph.structure import Attention
from compress.numerics.shared_heads import Layout
from compress.passes.head_maps import HeadMaps, read_maps, write_maps

if TYPE_CHECKING:
    from compress.model import Model

TOLERANCE = 1e-3
"""Outputs that move by less, as a share of the largest, have stayed the same."""

Turn = Callable[[Attention, HeadMaps], HeadMaps]


def moved_by(model: Model, attentions: Sequence[Attention], turn: Turn) -> list[Attention]:
    """The attentions for which the outputs on the example do not stay the same when `turn` changes their maps.

    All are tried together, and one by one only if that changes anything. The weights are as before in the end.
    """
    expected = _outputs(model)
    if _stays(model, attentions, turn, expected):
        return []
    return [one for one in attentions if not _stays(model, [one], turn, expected)]


def turned(attention: Attention, maps: HeadMaps) -> HeadMaps:
    """`maps` with keys and values in a random basis of each head that queries and the output map take back.

    Keys are turned only as rotary positions allow, and values only where there is an output map.
    """
    generator = torch.Generator().manual_seed(0)
    if not attention.bend:
        layout = Layout(attention.head_size, attention.pairs)
        queries, keys = layout.split(maps.query), layout.split(maps.key)
        for block in range(len(keys)):
            lifts = _near_one(keys[block], generator)
            keys[block] = lifts @ keys[block]
            queries[block] = torch.linalg.inv(lifts).mH[:, list(maps.reads)] @ queries[block]
        maps = replace(maps, query=layout.join(queries), key=layout.join(keys))
    if maps.output is not None:
        lifts = _near_one(maps.value, generator)
        output = maps.output @ torch.linalg.inv(lifts)[list(maps.reads)]
        maps = replace(maps, value=lifts @ maps.value, output=output)
    return maps


def _near_one(block: Tensor, generator: torch.Generator) -> Tensor:
    """Random square maps (..., features, features) of the features of `block` (..., features, in), well conditioned."""
    size = block.shape[-2]
    shape, kind = (*block.shape[:-1], size), block.dtype
    noise = torch.randn(shape, dtype=kind, generator=generator)
    return torch.eye(size, dtype=kind) + 0.3 * noise / max(size, 1) ** 0.5


def _stays(model: Model, attentions: Sequence[Attention], turn: Turn, expected: Mapping[str, Tensor]) -> bool:
    before = [read_maps(model.module, one) for one in attentions]
    for attention, maps in zip(attentions, before, strict=True):
        write_maps(model.module, attention, turn(attention, maps))
    found = _outputs(model)
    for attention, maps in zip(attentions, before, strict=True):
        write_maps(model.module, attention, maps)
    kinds = {parameter.dtype for parameter in model.module.parameters() if parameter.is_floating_point()}
    allowed = max(TOLERANCE, *(16 * torch.finfo(kind).eps for kind in kinds))
    return all(
        bool((found[name] - value).abs().max() <= allowed * value.abs().max())
        for name, value in expected.items()
    )


def _outputs(model: Model) -> dict[str, Tensor]:
    from compress.outputs import forward

    return {name: value.float() for name, value in forward(model.module, model.example).items()}
