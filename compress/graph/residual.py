"""The residual stream: which weighted modules add to it."""

from __future__ import annotations

from torch.fx import Node

from compress.graph.norms import Normalization
from compress.graph.ops import MOVES, op, shape
from compress.graph.record import Trace
from compress.graph.weights import Product


def find_residual_writers(
    trace: Trace, products: dict[Node, Product], normalizations: list[Normalization]
) -> tuple[str, ...]:
    """Weighted modules whose output is added to a tensor that they were computed from.

    Between the module and the sum may lie a norm, a scale, or another sum (as of an attention and an MLP in parallel).
    A shortcut with a linear map or convolution of its own counts as a writer too.
    """
    inputs = {made.output: made.input for made in normalizations}
    found: dict[str, None] = {}
    for node in trace.nodes:
        for branch, stream in residual_sums(trace, node, products, inputs):
            for writer in writers(trace, branch, stream, products, inputs):
                found[writer.owner] = None
    return tuple(found)


def residual_sums(
    trace: Trace, node: Node, products: dict[Node, Product], inputs: dict[Node, Node]
) -> list[tuple[Node, Node]]:
    """The (branch, stream) pairs of a sum in which one side was computed from the other."""
    sides = [read for read in node.args[:2] if isinstance(read, Node)] if op(node) == "add" else []
    if len(sides) != 2 or shape(sides[0])[-1:] != shape(sides[1])[-1:]:
        return []
    for stream, branch in (sides, sides[::-1]):
        root = behind(stream, {})
        if branch is not stream and trace.depends(branch, root):
            return [(branch, root)]
    for shortcut, branch in (sides, sides[::-1]):
        root = behind(shortcut, inputs)
        if root in products and goes_around(trace, behind(products[root].input, {}), branch, root, products):
            return [(branch, shortcut), (shortcut, branch)]
    return []


def goes_around(trace: Trace, start: Node, branch: Node, root: Node, products: dict[Node, Product]) -> bool:
    """Whether `branch` is computed from `start` by two weighted ops in a row, none of them `root`."""
    on_the_way = [
        made
        for node, made in products.items()
        if node is not root and trace.depends(branch, node) and trace.depends(node, start)
    ]
    return any(
        trace.depends(last.input, first.node)
        for first in on_the_way
        for last in on_the_way
        if last is not first
    )


def behind(node: Node, inputs: dict[Node, Node]) -> Node:
    """`node`, looking back through moves, and through norms where `inputs` gives what they read."""
    while True:
        if node in inputs:
            node = inputs[node]
        elif op(node) in MOVES and isinstance(node.args[0], Node):
            node = node.args[0]
        else:
            return node


def writers(
    trace: Trace, branch: Node, stream: Node, products: dict[Node, Product], inputs: dict[Node, Node]
) -> list[Product]:
    """The weighted ops at the end of `branch`, looking back through moves, norms, scales and sums, up to `stream`."""
    found: list[Product] = []
    queue = [branch]
    while queue:
        node = queue.pop()
        if node is stream:
            continue
        if node in products and products[node].kind != "embedding":
            found.append(products[node])
        elif node in inputs:
            queue.append(inputs[node])
        elif op(node) in MOVES or op(node) in ("mul", "div", "add"):
            queue += [read for read in node.all_input_nodes if read not in trace.names]
    return sorted(found, key=lambda made: trace.index[made.node])
