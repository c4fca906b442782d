"""Quantized weights in the layout in which they are multiplied.

A linear map reads its weight (out, in) through DequantizeLinear and Transpose. A Transpose in between keeps
runtimes from seeing an integer product, so the integers are stored as (in, out), and the axis of their scales
moves along.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.lowering.constants import array, constant, replace


def transpose_weights(model: ir.Model) -> int:
    """Fold Transpose(DequantizeLinear(matrix)) into the matrix, in place. Returns the number of Transposes gone."""
    found = [node for node in model.graph if node.op_type == "Transpose" and _source(node) is not None]
    for node in found:
        _fold(model.graph, node)
    return len(found)


def _source(transpose: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a constant matrix that `transpose` reads, or None."""
    value = transpose.inputs[0]
    source = None if value is None else value.producer()
    if source is None or source.op_type != "DequantizeLinear" or "block_size" in source.attributes:
        return None
    integers = array(source.inputs[0])
    return source if integers is not None and integers.ndim == 2 else None


def _fold(graph: ir.Graph, transpose: ir.Node) -> None:
    source = _source(transpose)
    assert source is not None
    assert source.inputs[0] is not None
    weight = source.inputs[0]
    # A copy, since a transposed view would keep (out, in) alive and be copied at every write.
    integers = np.ascontiguousarray(weight.const_value.numpy().T)  # type: ignore[union-attr]
    axis = source.attributes.get_int("axis", 1) % 2
    dequantize = ir.node(
        "DequantizeLinear",
        [constant(graph, f"{weight.name}.transposed", integers), *source.inputs[1:]],
        {"axis": 1 - axis},
        name=f"{transpose.name}_dequantize",
    )
    replace(transpose, dequantize)
    if not source.outputs[0].uses():
        graph.remove(source, safe=True)
        if not weight.uses():
            graph.initializers.pop(str(weight.name))
