"""What lies between a map and the scores of an attention: whether it commutes with a factor, and what it rotates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from compress.graph.ops import MOVES, QUOTIENTS, op
from compress.graph.record import Trace

TURNS = frozenset(["neg", "view_as_complex", "view_as_real"])

Pairs = tuple[tuple[int, int], ...]


def between(trace: Trace, start: Node, end: Node) -> list[Node]:
    """The nodes from `start`, left out, to `end`, in order."""
    return [node for node in trace.above(end) if node is not start and trace.depends(node, start)]


def numbers(values: Iterable[Any]) -> list[float]:
    """The floats among `values`."""
    return [value for value in values if type(value) is float]


def bent(trace: Trace, start: Node, way: list[Node]) -> Node | None:
    """What on the `way` from `start` does not commute with a factor, or None."""
    for node in way:
        scaled = [read for read in node.all_input_nodes if trace.depends(read, start)]
        if op(node) == "mul" or (op(node) in QUOTIENTS and node.args[0] in scaled):
            commutes = len(scaled) == 1
        elif op(node) in ("add", "sub", "cat", "stack"):
            commutes = len(scaled) == len(node.all_input_nodes) and not numbers(node.args)
        else:
            commutes = op(node) in MOVES | TURNS
        if not commutes:
            return node
    return None


def rotated(labels: dict[Node, Any]) -> list[Tensor]:
    """The pairs of features (pairs, 2) that sums of two arrangements mix, one tensor a sum; complex numbers are one.

    `labels` are those of the nodes that the features reach.
    """
    found = []
    for node, own in labels.items():
        read = [labels[one] for one in node.all_input_nodes if isinstance(labels.get(one), Tensor)]
        if op(node) == "view_as_complex" and isinstance(own, Tensor):
            found.append(own.reshape(-1, 2))
        elif op(node) in ("add", "sub") and len(read) == 2 and different(*read):
            found.append(torch.stack(torch.broadcast_tensors(*read), -1).reshape(-1, 2))
    return found


def different(first: Tensor, second: Tensor) -> bool:
    """Whether two label tensors differ, after broadcasting."""
    return not bool((first == second).all())


def pairs_of_a_head(labels: dict[Node, Any], rows: Tensor) -> Pairs | None:
    """The features of a head that are rotated together, as numbers among its rows in ascending order.

    `rows` (places, features of a head) are those of every place. None where heads differ, or a feature is mixed with
    more than one other.
    """
    mixed = {tuple(sorted(pair)) for some in rotated(labels) for pair in some.unique(dim=0).tolist()}
    found: set[Pairs] = set()
    for head in dict.fromkeys(tuple(sorted(line)) for line in rows.tolist()):
        number = {row: place for place, row in enumerate(head)}
        found.add(
            tuple(
                sorted((number[one], number[other]) for one, other in mixed if {one, other} <= number.keys())
            )
        )
    inside = {row for line in rows.tolist() for row in line}
    across = any((one in inside) != (other in inside) for one, other in mixed)
    one = found.pop()
    features = [feature for pair in one for feature in pair]
    return None if found or across or len(features) != len(set(features)) else one
