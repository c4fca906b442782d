"""Attentions: where queries meet keys, the maps that make both, and how their heads lie in these maps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from compress.graph.cores import Core, Operand, find_cores
from compress.graph.flow import CARRIERS, common, follow, in_order, label, sources
from compress.graph.masks import is_causal, is_relative
from compress.graph.ops import MOVES, NOT_A_PATH, op, readers, shape
from compress.graph.record import Trace, path_of, told
from compress.graph.structure import Attention, Projection
from compress.graph.ways import Pairs, bent, between, pairs_of_a_head, rotated
from compress.graph.weights import Product, ambiguous, projection


def find_attentions(trace: Trace, products: dict[Node, Product]) -> tuple[Attention, ...]:
    """All attentions of the trace, in order."""
    known: dict[Node, Any] = {}
    found = [answer(trace, core, products, known) for core in find_cores(trace, products)]
    # A module that runs twice gives the same answer twice.
    return tuple(dict.fromkeys(found))


def answer(trace: Trace, core: Core, products: dict[Node, Product], known: dict[Node, Any]) -> Attention:
    """Everything about one attention."""
    query, key = (Side(trace, side, products, CARRIERS) for side in (core.query, core.key))
    value = Side(trace, core.value, products, MOVES)
    output = output_of(trace, core, query, products)
    sides = [side.projection(in_order) for side, in_order in ((query, False), (key, False), (value, True))]
    queries, keys = core.query.count, core.key.count
    is_cross = not same_sequence(query.start, key.start)
    causal = core.is_causal or (not is_cross and is_causal(trace, core.biases, (queries, keys), known))
    paths = [made.path for made in (*sides, output) if made is not None]
    return Attention(
        path=common([*paths, path_of(core.mixture)]),
        query=sides[0],
        key=sides[1],
        value=sides[2],
        output=output,
        heads=query.heads,
        kv_heads=key.heads,
        head_size=core.query.size,
        causal=causal,
        cross=is_cross,
        positions=positions(trace, core, query, known),
        pairs=query.pairs() or (),
        bend=bend(trace, query, key),
    )


def bend(trace: Trace, query: Side, key: Side) -> str:
    """What keeps a linear map between queries and keys from commuting with all that lies before the scores, or ""."""
    if (pairs := query.pairs()) is None or pairs != key.pairs():
        return "its queries and keys are not rotated in the same plain pairs of features"
    return query.bend(trace, "queries") or key.bend(trace, "keys")


def positions(trace: Trace, core: Core, query: Side, known: dict) -> Literal["none", "rotary", "relative"]:
    """How positions enter: by rotating queries and keys, or by a term added to the scores."""
    if query.is_rotated():
        return "rotary"
    return "relative" if is_relative(trace, core.biases, known) else "none"


class Side:
    """One operand of an attention, followed back to the map that makes it.

    Only ops in `through` may lie between. `rows` holds one line a place in the leading axes of the operand (batch and
    heads, in any layout), with the rows of the map that make its features; None where there is no single map.
    """

    def __init__(
        self, trace: Trace, operand: Operand, products: dict[Node, Product], through: frozenset[str]
    ) -> None:
        self.operand = operand
        self.product = single_source(trace, operand.node, products)
        self.start = operand.node if self.product is None else self.product.input
        self.labels: dict[Node, Any] = {}
        if self.product is not None:
            labels = label(self.product.node, self.product.axis, self.product.rows)
            within = trace.ancestors[operand.node]
            self.labels = follow(trace, self.product.node, labels, through, within)
        self.rows = head_rows(self.labels.get(operand.node), operand)
        if self.product is not None and self.product.owner in ambiguous(products):
            self.product = None

    @property
    def heads(self) -> int:
        """Number of heads with features of their own."""
        if self.rows is not None:
            return len(distinct(self.rows))
        return shape(self.operand.node)[1] if len(shape(self.operand.node)) > 3 else 1

    def lead(self) -> Tensor:
        """The head of each place in the leading axes of the operand, flattened."""
        if self.rows is not None:
            lines = {line: head for head, line in enumerate(distinct(self.rows))}
            return torch.tensor([lines[tuple(line)] for line in self.rows.tolist()])
        count = self.operand.lead
        return torch.arange(count) % self.heads

    def projection(self, in_order: bool) -> Projection | None:
        """The map and its rows, head by head; those of one head in the order of the map unless `in_order`."""
        if self.product is None or self.rows is None:
            return None
        heads = distinct(self.rows)
        return projection(
            self.product, [row for head in heads for row in (head if in_order else sorted(head))]
        )

    def is_rotated(self) -> bool:
        """Whether features of a head are mixed with one another on the way: a sum of two different arrangements."""
        return bool(rotated(self.labels))

    def pairs(self) -> Pairs | None:
        """The features of a head that are rotated together; None where that is no plain pairing."""
        return None if self.rows is None else pairs_of_a_head(self.labels, self.rows)

    def bend(self, trace: Trace, name: str) -> str:
        """What keeps the features that the map makes from coming to the scores linearly, or ""; `name` is theirs."""
        if self.product is None:
            return f"its {name} come from no single map"
        node = bent(trace, self.product.node, between(trace, self.product.node, self.operand.node))
        return "" if node is None else f"{told(node)} stands between the map of its {name} and its scores"


def distinct(rows: Tensor) -> list[tuple[int, ...]]:
    """The different lines of `rows`, in order of their first appearance."""
    return list(dict.fromkeys(tuple(line) for line in rows.tolist()))


def single_source(trace: Trace, node: Node, products: dict[Node, Product]) -> Product | None:
    """The one weighted op that makes `node` through moves, norms and element-wise ops; None if there is not one."""
    found = sources(trace, node, products, NOT_A_PATH)
    return products[found.pop()] if found is not None and len(found) == 1 else None


def head_rows(labels: Any, operand: Operand) -> Tensor | None:
    """Labels of an operand as (leading places, features of a head), if they are the same for every token."""
    if not isinstance(labels, Tensor) or labels.shape != shape(operand.node) or labels.dim() < 3:
        return None
    lines = labels.movedim((operand.places, operand.features), (-2, -1))
    lines = (lines[..., :1, :] if lines.stride(-2) == 0 else lines).flatten(0, -3)
    if not bool((lines == lines[:, :1]).all()) or bool((lines < 0).any()):
        return None
    return lines[:, 0]


def output_of(trace: Trace, core: Core, query: Side, products: dict[Node, Product]) -> Projection | None:
    """The map that reads the mixture of all heads, head after head, and that alone reads it."""
    sizes = shape(core.mixture)
    lead = query.lead()
    if lead.numel() * sizes[-1] * sizes[-2] != torch.Size(sizes).numel():
        return None
    labels = (lead[:, None] * sizes[-1] + torch.arange(sizes[-1]))[:, None].expand(-1, sizes[-2], -1)
    reached = follow(trace, core.mixture, labels.reshape(sizes), MOVES)
    ends = [(node, user) for node in reached for user in readers(node) if user not in reached]
    if len(ends) != 1 or ends[0][1] not in products or products[ends[0][1]].input is not ends[0][0]:
        return None
    made = products[ends[0][1]]
    whole = in_order(reached[made.input], made.axis)
    return projection(made) if whole and made.owner not in ambiguous(products) else None


def same_sequence(query: Node, key: Node) -> bool:
    """Whether both come from one tensor by norms, maps and moves alone, before any sum joins streams."""
    return bool(nearby(query) & nearby(key))


def nearby(start: Node) -> set[Node]:
    """The nodes above `start`, up to the first sum of two tensors, product, or look-up on each way."""
    found: set[Node] = set()
    queue = [start]
    while queue:
        node = queue.pop()
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        joins = op(node) == "add" and len(node.all_input_nodes) == 2 and joins_streams(node)
        if not joins and op(node) not in NOT_A_PATH | {"embedding"}:
            queue += node.all_input_nodes
    return found


def joins_streams(node: Node) -> bool:
    """Whether `node` adds two tensors, neither of them a parameter."""
    return all(read.op == "call_function" for read in node.all_input_nodes)
