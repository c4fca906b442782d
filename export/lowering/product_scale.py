"""The factor of an integer product, folded into the scale of its left operand.

Attention multiplies the scores, a large tensor, by 1 / sqrt(head size). Dequantizing the queries with a scale
that holds the factor already gives the same product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.lowering.constants import array, constant, only_reader, replace, scalar


def fold_product_scales(model: ir.Model) -> int:
    """Fold Mul(MatMul(DequantizeLinear(a), b), constant) into the scale of a, in place. Returns the number folded."""
    found = [node for node in model.graph if node.op_type == "Mul" and _parts(node) is not None]
    for node in found:
        _fold(model.graph, node)
    return len(found)


def _parts(mul: ir.Node) -> tuple[ir.Node, ir.Node, float] | None:
    """The MatMul, the DequantizeLinear of its left operand, and the factor; None where `mul` is something else."""
    for value, other in (mul.inputs, mul.inputs[::-1]):
        factor = scalar(other)
        product = None if value is None else value.producer()
        if (
            factor is None
            or product is None
            or product.op_type != "MatMul"
            or only_reader(product.outputs[0]) is not mul
        ):
            continue
        left = product.inputs[0].producer() if product.inputs[0] is not None else None
        if left is not None and left.op_type == "DequantizeLinear" and array(left.inputs[1]) is not None:
            return product, left, factor
    return None


def _fold(graph: ir.Graph, mul: ir.Node) -> None:
    parts = _parts(mul)
    assert parts is not None
    product, left, factor = parts
    scale = array(left.inputs[1])
    assert scale is not None
    name = str(mul.outputs[0].name)
    factored = np.asarray(scale * np.float32(factor), scale.dtype)
    # The operand may have other readers, so it is dequantized once more rather than changed.
    scaled = ir.node(
        "DequantizeLinear",
        [left.inputs[0], constant(graph, f"{name}.scale", factored), *left.inputs[2:]],
        dict(left.attributes),
        name=f"{name}_dequantize",
    )
    result, source = scaled.outputs[0], left.outputs[0]
    result.name, result.type, result.shape = f"{name}.left", source.type, source.shape
    graph.insert_before(product, scaled)
    new = ir.node("MatMul", [result, product.inputs[1]], name=product.name)
    replace(mul, new)
    graph.remove(product, safe=True)
    if not source.uses():
        graph.remove(left, safe=True)
