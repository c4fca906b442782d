"""Constant vectors, added where something is added anyway.

The bias of a linear map that feeds another one is part of the other's bias. So is one that gets there through a
residual sum, as in a model without norms, and one of an attention's values, whose weights sum to one. A bias of its
keys adds the same to all scores of a query, which the softmax does not see.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export.lowering.attention import KEYS, VALUES, has_cache, mask_of
from export.lowering.constants import array, constant
from export.lowering.shapes import rank, same_shape, size

Places = dict[tuple[ir.Node, int], np.ndarray]
"""What the constant that a node has as its input of this number is to be increased by, in float64."""


@dataclass
class _Walk:
    """How far one vector was carried: what each value on its way `lacks`, and which constants take it up."""

    lacks: dict[ir.Value, np.ndarray]
    taken: Places = field(default_factory=dict)

    def into(self, node: ir.Node) -> np.ndarray:
        """The sum of what the inputs of `node` lack."""
        return sum(self.lacks[value] for value in node.inputs if value in self.lacks)  # type: ignore[return-value]


def carry_addends(model: ir.Model) -> int:
    """Move constant vectors from their own Add into constants behind it, in place. Returns the number of Adds gone."""
    taken: Places = {}
    gone = 0
    nodes = list(model.graph)
    for place, node in enumerate(nodes):
        if (addend := _addend(node, taken)) is None:
            continue
        vector, other = addend
        walk = _Walk({node.outputs[0]: vector})
        if not _carry(model.graph, islice(nodes, place + 1, None), walk):
            continue
        for key, more in walk.taken.items():
            taken[key] = taken.get(key, 0) + more
        ir.convenience.replace_all_uses_with(node.outputs[0], other)
        model.graph.remove(node, safe=True)
        gone += 1
    for (node, index), more in taken.items():
        if node.graph is not None:
            _increase(model.graph, node, index, more)
    if gone:
        common.RemoveUnusedNodesPass()(model)
    return gone


def _addend(node: ir.Node, taken: Places) -> tuple[np.ndarray, ir.Value] | None:
    """The constant vector that `node` adds to all rows of a tensor, with what it has `taken`, and the tensor."""
    floats = node.outputs[0].dtype is not None and node.outputs[0].dtype.is_floating_point()
    if node.op_type != "Add" or node.domain != "" or not floats:
        return None
    for index, other in ((1, node.inputs[0]), (0, node.inputs[1])):
        vector = array(node.inputs[index])
        if vector is None or other is None or vector.ndim != 1 or not same_shape(other, node.outputs[0]):
            continue
        if vector.shape[0] == size(other, -1):
            return vector.astype(np.float64) + taken.get((node, index), 0), other
    return None


def _carry(graph: ir.Graph, behind: Iterable[ir.Node], walk: _Walk) -> bool:
    """Follow what is lacking through the nodes `behind` until constants take it up. False where something in between
    is not linear.
    """
    for node in behind:
        if not any(value in walk.lacks for value in node.inputs):
            continue
        if len(node.outputs) != 1 or node.domain != "" or not _pass(node, walk):
            return False
    return not any(
        value.is_graph_output() or any(use.node.graph is not graph for use in value.uses())
        for value in walk.lacks
    )


def _pass(node: ir.Node, walk: _Walk) -> bool:
    """Carry what the inputs of `node` lack past it, or into its constant. False where that is impossible."""
    carry = _PASSED.get(node.op_type)
    return carry is not None and carry(node, walk)


def _past_sum(node: ir.Node, walk: _Walk) -> bool:
    lacking = walk.into(node)
    if lacking.shape[0] != size(node.outputs[0], -1):
        return False  # one feature, spread over many
    for index, value in enumerate(node.inputs):
        if array(value) is not None:
            walk.taken[node, index] = lacking
            return True
    walk.lacks[node.outputs[0]] = lacking
    return True


def _past_product(node: ir.Node, walk: _Walk) -> bool:
    weight = array(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return False
    walk.lacks[node.outputs[0]] = walk.into(node) @ weight.astype(np.float64)
    return True


def _past_gemm(node: ir.Node, walk: _Walk) -> bool:
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    weight, bias = (array(value) for value in (*node.inputs[1:], None)[:2])
    if factors != [1.0, 1.0] or node.attributes.get_int("transA", 0) or weight is None or bias is None:
        return False
    weight = weight.T if node.attributes.get_int("transB", 0) else weight
    walk.taken[node, 2] = walk.into(node) @ weight.astype(np.float64)
    return True


def _past_attention(node: ir.Node, walk: _Walk) -> bool:
    """Keys may lack anything; values may where no query is without keys. What the queries lack matters."""
    lacking = {index for index, value in enumerate(node.inputs) if value in walk.lacks}
    if not lacking <= {KEYS, VALUES} or has_cache(node) or node.attributes.get_float("softcap", 0.0):
        return False
    if VALUES not in lacking:
        return True
    value = node.inputs[VALUES]
    heads = [node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads")]
    if mask_of(node) is not None or heads[0] != heads[1] or value is None:
        return False
    walk.lacks[node.outputs[0]] = walk.lacks[value]
    return True


def _past_choice(node: ir.Node, walk: _Walk) -> bool:
    """A Gather along any axis but that of the features."""
    values, axes = node.inputs[0], rank(node.inputs[0])
    if values not in walk.lacks or axes < 1 or node.attributes.get_int("axis", 0) % axes == axes - 1:
        return False
    walk.lacks[node.outputs[0]] = walk.lacks[values]
    return True


_PASSED = {
    "Add": _past_sum,
    "Sum": _past_sum,
    "MatMul": _past_product,
    "Gemm": _past_gemm,
    "Attention": _past_attention,
    "Gather": _past_choice,
}


def _increase(graph: ir.Graph, node: ir.Node, index: int, more: np.ndarray) -> None:
    before = array(node.inputs[index])
    assert before is not None
    name = f"{node.outputs[0].name}.carried"
    node.replace_input_with(index, constant(graph, name, (before + more).astype(before.dtype)))
