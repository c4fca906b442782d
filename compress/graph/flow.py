"""Follow values through a trace: where features go, where they come from, and what a small part of it computes."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Container, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from compress.graph.ops import (
    AVERAGES,
    ELEMENTWISE,
    MOVES,
    NORMALIZES,
    SAME,
    in_place,
    op,
    operand,
    readers,
    shape,
)
from compress.graph.record import Trace

OTHER = -1
"""The label of a value that is none of the labelled features."""
ZERO = -2
"""The label of a padded zero."""


def label(node: Node, axis: int, labels: Tensor | None = None) -> Tensor:
    """Labels for the output of `node`: along `axis` the numbers 0, 1, ... or `labels`, the same at all other places.

    The result has the shape of `node` and takes no memory of that size.
    """
    sizes = shape(node)
    line = torch.arange(sizes[axis]) if labels is None else labels
    view = [1] * len(sizes)
    view[axis] = sizes[axis]
    return line.view(view).expand(sizes)


def follow(
    trace: Trace, start: Node, labels: Tensor, through: Container[str], within: int | None = None
) -> dict[Node, Any]:
    """Labels of every value that the values of `start` reach through ops in `through`.

    Ops that move values are run on the labels themselves, so that slices, splits, rolls and permutations come out as
    they are. An op that works element by element keeps the labels of the first operand that has any. `within` is a set
    of bits: nodes outside it are left out. Values that are overwritten are lost.
    """
    found: dict[Node, Any] = {start: labels}
    queue = [trace.index[start]]
    seen: set[int] = set()
    while queue:
        place = heapq.heappop(queue)
        if place in seen:
            continue
        seen.add(place)
        node = trace.nodes[place]
        if node in trace.overwritten:
            found.pop(node, None)
            continue
        if node is not start:
            after = step(node, found) if op(node) in through else None
            if after is None:
                continue
            found[node] = after
        for user in readers(node):
            if user in trace.index and (within is None or within >> trace.index[user] & 1):
                heapq.heappush(queue, trace.index[user])
    return found


def step(node: Node, known: dict[Node, Any]) -> Any:
    """The labels of the output of `node`, given those of some of its operands; None where they are lost."""
    name = op(node)
    if name in SAME:
        return known.get(node.args[0])
    if name in MOVES:
        return move(node, known)
    if name in AVERAGES:
        return average(node, known[node.args[0]])
    return keep(node, known)


def move(node: Node, known: dict[Node, Any]) -> Any:
    """Run an op that moves values on labels."""
    kwargs = dict(node.kwargs)
    args = list(node.args)
    if op(node) in ("pad", "constant_pad_nd"):
        constant = op(node) == "constant_pad_nd" or operand(node, 2, "mode") in (None, "constant")
        filled = operand(node, 2 if op(node) == "constant_pad_nd" else 3, "value")
        if not constant:
            return None
        return torch.nn.functional.pad(known[args[0]], args[1], value=OTHER if filled else ZERO)
    if not all(read in known or shape(read) for read in node.all_input_nodes):
        return None
    moved = map_arg((tuple(args), kwargs), lambda read: known[read] if read in known else others(read))
    return call(node, *moved)


def others(node: Node) -> Tensor:
    """Labels that say that `node` holds none of the labelled features."""
    return torch.tensor(OTHER).expand(shape(node))


def average(node: Node, labels: Any) -> Tensor | None:
    """The labels of means, where all values of a mean have the same."""
    axes = operand(node, 1, "dim") if op(node) == "mean" else range(-int(op(node)[-2]), 0)
    if not axes or not isinstance(labels, Tensor):
        return None
    first = labels
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    if not bool((first == labels).all()):
        return None
    if len(shape(node)) < labels.dim():
        first = first.squeeze(tuple(axes))
    return first.expand(shape(node))


def keep(node: Node, known: dict[Node, Any]) -> Tensor | None:
    """The labels of an op that works element by element: those of the first labelled operand, broadcast."""
    labels = next((known[read] for read in node.all_input_nodes if isinstance(known.get(read), Tensor)), None)
    if labels is None:
        return None
    if op(node) in NORMALIZES | {"view_as_complex", "view_as_real"} or is_complex(node):
        return labels
    return labels.expand(shape(node)) if fits(labels, shape(node)) else None


def is_complex(node: Node) -> bool:
    """Whether `node` makes complex numbers, whose labels keep the pair of features as a last axis."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_complex()


def fits(labels: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether `labels` broadcast to `sizes`."""
    return len(labels.shape) <= len(sizes) and all(
        have in (1, want) for have, want in zip(reversed(labels.shape), reversed(sizes), strict=False)
    )


def along(labels: Any, axis: int) -> Tensor | None:
    """The labels along `axis` if they are the same at all other places, apart from padded zeros; None if not."""
    if not isinstance(labels, Tensor) or not labels.numel():
        return None
    lines = without_copies(labels.movedim(axis, -1)).flatten(0, -2) if labels.dim() > 1 else labels[None]
    line = lines.amax(0)
    return line if bool(((lines == line) | (lines == ZERO)).all()) else None


def in_order(labels: Any, axis: int, features: int | None = None) -> bool:
    """Whether `labels` number along `axis` the features from 0 on, in order, at every place but for padded zeros.

    `features`: how many there must be; None for any number.
    """
    line = along(labels, axis)
    if line is None or features not in (None, len(line)):
        return False
    return bool((line == torch.arange(len(line))).all())


def without_copies(labels: Tensor) -> Tensor:
    """`labels` with the axes before the last cut to one place where they repeat one place in memory."""
    for axis in range(labels.dim() - 1):
        if labels.stride(axis) == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


CARRIERS = MOVES | ELEMENTWISE | NORMALIZES | {"view_as_complex", "view_as_real"}
"""What may lie between a projection and the product that reads its heads: rotary embeddings, norms, scales."""


def sources(
    trace: Trace, start: Node, wanted: Collection[Node], barriers: Container[str]
) -> set[Node] | None:
    """The nearest nodes of `wanted` above `start`; None if an op of `barriers` comes between."""
    wanted_bits = sum(1 << trace.index[node] for node in wanted)
    found: set[Node] = set()
    seen: set[Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node in seen or not trace.ancestors[node] & wanted_bits:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        elif op(node) in barriers:
            return None
        else:
            queue += node.all_input_nodes
    return found


def compute(trace: Trace, goal: Node, given: dict[Node, Any]) -> Any:
    """The value of `goal`, run from the values of `given`, of parameters, buffers and example inputs.

    Fake quantization is left out, so that a quantized part computes what it stands for. `given` is extended by all
    values on the way.
    """
    queue = [goal]
    while queue:
        node = queue[-1]
        if node in given:
            queue.pop()
            continue
        if node in trace.values:
            given[node] = trace.values[node]
            continue
        missing = [read for read in node.all_input_nodes if read not in given]
        if missing:
            queue += missing
            continue
        given[node] = run(node, given)
    return given[goal]


def run(node: Node, given: dict[Node, Any]) -> Any:
    """Run one op on given values. Casts between float types and fake quantization are left out."""
    first: Any = given.get(operand(node, 0, "self"))
    if op(node) in SAME and isinstance(first, Tensor) and first.is_floating_point() and keeps_float(node):
        return first
    args, kwargs = map_arg((tuple(node.args), dict(node.kwargs)), given.__getitem__)
    return call(node, args, kwargs)


def call(node: Node, args: Any, kwargs: Any) -> Any:
    """Run the op of `node`; a view as a reshape, since values that were not copied have other strides."""
    if op(node) in ("view", "_unsafe_view"):
        return args[0].reshape(args[1])
    if in_place(node):
        args = (args[0].clone(), *args[1:])
    with torch.no_grad():
        return node.target(*args, **kwargs)


def keeps_float(node: Node) -> bool:
    """Whether `node` makes a float tensor, or the integers of a fake quantization."""
    value = node.meta.get("val")
    return op(node).startswith("quantize") or (isinstance(value, Tensor) and value.is_floating_point())


def common(paths: Iterable[str]) -> str:
    """The deepest module path that holds all `paths`."""
    parts = [path.split(".") if path else [] for path in paths]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
