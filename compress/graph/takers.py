"""Weighted ops whose weight can take a constant on: those that alone use a whole weight of a module, once."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

import torch
from torch.fx import Node

from compress.graph.ops import ends, op, operand, shape, source, strip
from compress.graph.record import Trace
from compress.graph.weights import Product, ambiguous, name_here


class Takers:
    """The products of a trace, and why some of them can take nothing on."""

    def __init__(self, trace: Trace, products: dict[Node, Product]) -> None:
        self.trace = trace
        self.products = products
        self.unnamed = ambiguous(products)

    @cached_property
    def calls(self) -> Counter[str]:
        """How often each module runs its weighted op."""
        return Counter(made.owner for made in self.products.values())

    def refusal(self, made: Product) -> str:
        """Why `made` can take nothing on, or ""."""
        if made.kind == "embedding":
            return f"`{made.owner}` is a look-up"
        if self.calls[made.owner] > 1:
            return f"`{made.owner}` runs {self.calls[made.owner]} times"
        if made.owner in self.unnamed or not made.whole:
            return f"`{made.owner}` has more than one whole weight"
        if ends(self.weight(made)) != {made.node}:
            return f"the weight of `{made.owner}` is used elsewhere too"
        return ""

    def weight(self, made: Product) -> Node:
        """The node of the whole weight that `made` multiplies by."""
        names, roots = self.trace.names, map(source, made.node.all_input_nodes)
        return next(
            root for root in roots if root in names and made.parameter in self.trace.aliases[names[root]]
        )


def transposed(trace: Trace) -> dict[Node, Product]:
    """The transposed convolutions of the trace with a weight (in, out / groups, ...) of the model."""
    found = {}
    for node in trace.nodes:
        weight = strip(node.args[1]) if op(node).startswith("conv_transpose") else None
        if weight in trace.names:
            name = name_here(trace, trace.names[weight], node)
            found[node] = Product(
                node=node,
                input=node.args[0],
                owner=name.rpartition(".")[0],
                parameter=name,
                kind="conv",
                rows=torch.arange(shape(node)[1]),
                inputs=shape(node.args[0])[1],
                axis=1,
                kernel=shape(weight)[2:],
                groups=operand(node, 6, "groups") or 1,
                stride=tuple(operand(node, 3, "stride") or ()),
            )
    return found
