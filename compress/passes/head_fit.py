"""Pooled heads: which heads share one, and what the one computes, by second moments of calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from compress.graph.structure import Attention
from compress.numerics.grouping import Groups, alike, in_order, proportional
from compress.numerics.low_rank import root
from compress.numerics.shared_heads import Layout, cosines, joint, likeness
from compress.passes.base import Context
from compress.passes.calibration import Watch, watch
from compress.passes.head_maps import HeadMaps, sides

if TYPE_CHECKING:
    from compress.model import Model

Grouping = Literal["similarity", "in_order", "norms"]
Pooling = Literal["joint", "mean"]


@dataclass(frozen=True)
class Seen:
    """Mean second moments (in + 1, in + 1) of what the queries' and the keys' maps read, a 1 behind each input."""

    queries: Tensor
    keys: Tensor

    @cached_property
    def root(self) -> Tensor:
        """A root of the moment of the keys' inputs."""
        return root(self.keys)

    @cached_property
    def centred_root(self) -> Tensor:
        """A root of the covariance of the keys' inputs."""
        mean = self.keys[:, -1]
        return root(self.keys - torch.outer(mean, mean))


def input_moments(model: Model, context: Context, attentions: Sequence[Attention]) -> dict[str, Tensor]:
    """The mean second moment of what each map of queries and of keys reads, with a 1 behind it, by the map's path.

    Maps that read one tensor share one moment. A map that calibration does not reach has none.
    """
    paths = dict.fromkeys(side.path for one in attentions for side in sides(one)[:2])
    reads = {path: weight.reads for path in paths if (weight := model.graph.weight(path))}
    first = {read: path for path, read in reversed(reads.items())}
    sums: dict[str, Tensor] = {}

    def seer(path: str) -> Callable[[int, Tensor], None]:
        def see(index: int, values: Tensor) -> None:
            if index == 0:
                rows = torch.nn.functional.pad(values.flatten(0, -2).float(), (0, 1), value=1.0)
                gram = (rows.T @ rows).double().cpu()
                sums[path] = sums[path] + gram if path in sums else gram

        return see

    watches = {path: Watch(seer(path)) for path in first.values()}
    watch(model.module, context, watches, "group_queries: second moments")
    return {
        path: sums[first[read]] / sums[first[read]][-1, -1]
        for path, read in reads.items()
        if first[read] in sums
    }


def seen_by(attention: Attention, moments: Mapping[str, Tensor]) -> Seen | None:
    """The moments of one attention; None where calibration says nothing of it."""
    query, key, _ = sides(attention)
    found = [moments.get(one.path) for one in (query, key)]
    if any(one is None or not one[:-1, :-1].any() for one in found):
        return None
    return Seen(*(one for one in found if one is not None))


def groups_of(
    attention: Attention, maps: HeadMaps, seen: Seen, count: int, grouping: Grouping, pooling: Pooling
) -> Groups:
    """Which kv heads of an attention become one of `count`."""
    heads = attention.kv_heads
    even = in_order([heads // count] * count)
    if grouping == "in_order":
        return even
    if grouping == "norms":
        pooled = torch.stack([maps.key[list(group)].mean(0) for group in even])
        norms = (pooled @ seen.root).flatten(1).norm(dim=1)
        return in_order(proportional(norms.tolist(), heads))
    if pooling == "mean":
        return alike(cosines(maps.key, seen.root), count)
    keys, values = (Layout(one.shape[1], pairs) for one, pairs in _parts(attention, maps))
    root = seen.centred_root
    return alike(likeness(keys.split(maps.key), root) + likeness(values.split(maps.value), root), count)


def _parts(attention: Attention, maps: HeadMaps) -> tuple[tuple[Tensor, tuple[tuple[int, int], ...]], ...]:
    return (maps.key, attention.pairs), (maps.value, ())


def pooled(attention: Attention, maps: HeadMaps, seen: Seen, groups: Groups, pooling: Pooling) -> HeadMaps:
    """The maps of an attention in which the kv heads of each group are one.

    With `joint` keys and values are fitted to all heads of a group; keys only where the scores are bilinear in queries
    and keys, and values only where a linear map reads the mixture. What is not fitted is a mean, of keys that are
    scaled to one energy where the scores are not bilinear: a norm behind them takes their scale away.
    """
    keys, values = (
        torch.stack([one[list(group)].mean(0) for group in groups])
        for one in (_levelled(attention, maps, seen), maps.value)
    )
    group_of = {kv: number for number, group in enumerate(groups) for kv in group}
    made = replace(maps, key=keys, value=values, reads=tuple(group_of[kv] for kv in maps.reads))
    if pooling == "joint" and not attention.bend:
        made = _joint_keys(attention, maps, made, seen)
    if pooling == "joint" and maps.output is not None:
        made = _joint_values(maps, made, seen)
    return made


def is_joint(attention: Attention, pooling: Pooling) -> tuple[bool, bool]:
    """Whether keys and values of an attention are fitted, and not means."""
    return pooling == "joint" and not attention.bend, pooling == "joint" and attention.output is not None


def _levelled(attention: Attention, maps: HeadMaps, seen: Seen) -> Tensor:
    """The maps of the keys; where something bends them, scaled to keys of one mean energy."""
    if not attention.bend:
        return maps.key
    energies = (maps.key @ seen.root).square().mean((1, 2)).sqrt()
    return maps.key * (energies.mean() / energies.clamp(min=1e-30))[:, None, None]


def _joint_keys(attention: Attention, maps: HeadMaps, made: HeadMaps, seen: Seen) -> HeadMaps:
    """`made` with keys fitted to the scores: the lifts of each head are taken back in its queries."""
    layout = Layout(attention.head_size, attention.pairs)
    queries, keys = layout.split(maps.query), layout.split(maps.key[list(maps.reads)])
    asked = [one @ root(seen.queries).to(one.dtype) for one in queries]
    query, key = [one.clone() for one in queries], [one.clone() for one in layout.split(made.key)]
    for heads, number in _members(made):
        for block in range(len(queries)):
            energies = asked[block][:, heads] @ asked[block][:, heads].mH
            shared, lifts = joint(keys[block][:, heads], energies, seen.root)
            key[block][:, number] = shared
            query[block][:, heads] = lifts.mH @ queries[block][:, heads]
    return replace(made, query=layout.join(query), key=layout.join(key))


def _joint_values(maps: HeadMaps, made: HeadMaps, seen: Seen) -> HeadMaps:
    """`made` with values fitted to what the output map makes of them: the lifts of each head go into it."""
    assert maps.output is not None
    output, value = maps.output.clone(), made.value.clone()
    for heads, number in _members(made):
        mixed = maps.output[heads]
        of_heads = maps.value[[maps.reads[head] for head in heads]]
        shared, lifts = joint(of_heads[None], (mixed.mT @ mixed)[None], seen.root)
        value[number] = shared[0]
        output[heads] = mixed @ lifts[0]
    return replace(made, output=output, value=value)


def _members(made: HeadMaps) -> list[tuple[list[int], int]]:
    """The query heads that read each kv head, with its number."""
    return [
        ([head for head, read in enumerate(made.reads) if read == number], number)
        for number in range(len(made.key))
    ]
