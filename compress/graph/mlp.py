"""Feed-forward parts: a map up, an activation, perhaps a gate, and a map down to the width that was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from compress.graph.activations import name_of
from compress.graph.flow import along, common, compute, follow, in_order, label
from compress.graph.ops import ELEMENTWISE, MOVES, op, shape
from compress.graph.record import Trace
from compress.graph.structure import Mlp
from compress.graph.weights import Product, ambiguous, only_output, projection


@dataclass(frozen=True)
class Tap:
    """Where some features of an upward map enter the element-wise part: the nodes that hold them, all alike.

    `rows` are rows of the map's weight, in the order of the features along `axis` of each node.
    """

    up: Product
    rows: tuple[int, ...]
    axis: int
    nodes: tuple[Node, ...]
    depthwise: tuple[str, ...]


def find_mlps(trace: Trace, products: dict[Node, Product]) -> tuple[Mlp, ...]:
    """All feed-forward parts of the trace, in order."""
    unnamed = ambiguous(products)
    found = [answer(trace, down, products) for down in products.values() if down.pointwise]
    named = [
        mlp
        for mlp in found
        if mlp is not None
        and not unnamed & {made.path for made in (mlp.up, mlp.gate, mlp.down) if made is not None}
    ]
    # A module that runs twice gives the same answer twice.
    return tuple(dict.fromkeys(named))


def answer(trace: Trace, down: Product, products: dict[Node, Product]) -> Mlp | None:
    """The feed-forward part that ends in `down`, or None."""
    taps = find_taps(trace, down, products)
    if not 1 <= len(taps) <= 2 or only_output(trace, down.node):
        return None
    if any(tap.up.inputs != down.outputs or len(tap.rows) != down.inputs for tap in taps):
        return None
    if not all(aligned(trace, tap, down) for tap in taps):
        return None
    named = activation(trace, down, taps)
    if named is None:
        return None
    name, gate, up = named
    parts = [projection(tap.up, list(tap.rows)) for tap in taps]
    return Mlp(
        path=common([down.owner, *(part.path for part in parts)]),
        up=parts[up],
        gate=None if gate == up else parts[gate],
        down=projection(down),
        activation=name,
        depthwise=tuple(dict.fromkeys(path for tap in taps for path in tap.depthwise)),
    )


def find_taps(trace: Trace, down: Product, products: dict[Node, Product]) -> list[Tap]:
    """What the input of `down` is computed from by element-wise ops alone; [] if anything else comes in."""
    entries = entry_nodes(trace, down, products)
    taps: dict[tuple, Tap] = {}
    for node in entries or ():
        made = tap_at(trace, node, products)
        if made is None:
            return []
        key = (made.up.node, made.rows)
        nodes = (*taps[key].nodes, node) if key in taps else (node,)
        taps[key] = Tap(made.up, made.rows, made.axis, nodes, made.depthwise)
    return list(taps.values())


def entry_nodes(trace: Trace, down: Product, products: dict[Node, Product]) -> list[Node] | None:
    """The nodes, moved from the output of one weighted op, that enter the element-wise part above `down`."""
    entries: dict[Node, None] = {}
    seen: set[Node] = set()
    queue = [down.input]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if moved_product(node, products) is not None:
            entries[node] = None
        elif op(node) in MOVES | ELEMENTWISE:
            queue += node.all_input_nodes
        else:
            return None
    return sorted(entries, key=lambda node: trace.index[node])


def moved_product(node: Node, products: dict[Node, Product]) -> Product | None:
    """The weighted op whose output `node` holds, moved; None if it is anything else."""
    while node not in products and op(node) in MOVES and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return products.get(node)


def tap_at(trace: Trace, node: Node, products: dict[Node, Product]) -> Tap | None:
    """The features of one upward map that `node` holds."""
    made = moved_product(node, products)
    if made is None or made.kind == "embedding":
        return None
    reached = follow(trace, made.node, label(made.node, made.axis, made.rows), MOVES, trace.ancestors[node])
    axis, rows = feature_line(reached.get(node), made.axis)
    if rows is None:
        return None
    if made.pointwise:
        return Tap(made, rows, axis, (node,), ())
    if not made.depthwise or shape(made.node) != shape(made.input):
        return None
    before = tap_at(trace, made.input, products)
    if before is None or before.axis not in (made.axis, made.axis - len(shape(made.input))):
        return None
    return Tap(
        before.up, tuple(before.rows[row] for row in rows), axis, (node,), (*before.depthwise, made.owner)
    )


def feature_line(labels: Any, first: int) -> tuple[int, tuple[int, ...] | None]:
    """The axis along which labels differ, and the labels along it; `first` is tried first."""
    if not isinstance(labels, Tensor):
        return first, None
    for axis in (first, *range(labels.dim())):
        line = along(labels, axis)
        if line is not None and len(set(line.tolist())) == len(line) and int(line.min()) >= 0:
            return axis, tuple(line.tolist())
    return first, None


def aligned(trace: Trace, tap: Tap, down: Product) -> bool:
    """Whether feature i of the tap becomes input feature i of `down`."""
    within = trace.ancestors[down.input]
    reached = follow(trace, tap.nodes[0], label(tap.nodes[0], tap.axis), MOVES | ELEMENTWISE, within)
    return in_order(reached.get(down.input), down.axis)


def activation(trace: Trace, down: Product, taps: list[Tap]) -> tuple[str, int, int] | None:
    """The activation by what the element-wise part computes, and which taps are the gate and the upward map."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape(tap.nodes[0]), generator=generator, dtype=torch.float64) * 2 for tap in taps]
    if any(shape(node) != shape(tap.nodes[0]) for tap in taps for node in tap.nodes):
        return None
    given = {node: x for tap, x in zip(taps, inputs, strict=True) for node in tap.nodes}
    computed = compute(trace, down.input, dict(given))
    placed = [moved_alike(trace, tap, x, down) for tap, x in zip(taps, inputs, strict=True)]
    if len(taps) == 1:
        name = name_of(computed, placed[0])
        return None if name is None else (name, 0, 0)
    for gate, up in ((0, 1), (1, 0)):
        name = name_of(computed, placed[gate], placed[up])
        if name is not None:
            return name, gate, up
    return None


def moved_alike(trace: Trace, tap: Tap, x: Tensor, down: Product) -> Tensor:
    """`x`, given in the layout of the tap, in the layout of the input of `down`."""
    places = torch.arange(x.numel()).view(x.shape)
    within = trace.ancestors[down.input]
    reached = follow(trace, tap.nodes[0], places, MOVES | ELEMENTWISE, within)
    return x.flatten()[reached[down.input]]
