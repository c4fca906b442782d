"""Constants of an ONNX graph as arrays, and new ones beside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def array(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or constant node, or None where `value` is computed."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else constant.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, or None."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return float(constant.numpy().item()) if constant is not None and constant.size == 1 else None


def constant(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    """A new initializer of `graph`, or the one that has the name already. Names come from values, so they are
    unique.
    """
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(content, name=name)))
    return graph.initializers[name]


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
