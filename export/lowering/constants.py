"""Constants of an ONNX graph as arrays, and new ones beside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def array(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or constant node, or None where `value` is computed or may be given by a caller."""
    if value is None or value.is_graph_input():
        return None
    constant = ir.convenience.get_const_tensor(value)
    return None if constant is None else constant.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, or None."""
    content = array(value)
    return float(content.item()) if content is not None and content.size == 1 else None


def constant(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    """An initializer of `graph` that holds `content`: the one that has `name` and is the same, or a new one.

    `name` should come from that of a value, so that no node has it. Other initializers of that name stay: the new one
    is numbered.
    """
    free, number = name, 0
    while (found := graph.initializers.get(free)) is not None:
        there = array(found)
        if there is not None and there.dtype == content.dtype and np.array_equal(there, content):
            return found
        number += 1
        free = f"{name}.{number}"
    value = ir.val(free, const_value=ir.tensor(content, name=free))
    graph.register_initializer(value)
    return value


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, or None where there are none, several, or `value` is a graph output."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def replace(old: ir.Node, new: ir.Node) -> None:
    """Put `new` where `old` was; its output takes the name, type, shape and readers of the one output of `old`."""
    graph = old.graph
    assert graph is not None
    before, after = old.outputs[0], new.outputs[0]
    after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
