"""Quantized linear maps of matrices as MatMul and Add.

A linear map of a tensor of rank 3 becomes MatMul and Add, one of a matrix becomes Gemm, for which ONNX
Runtime has no integer kernel that gives float. As MatMul and Add both meet the same kernel.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lowering.constants import replace


def split_quantized_gemms(model: ir.Model) -> int:
    """Turn every Gemm of two dequantized tensors into (Transpose,) MatMul and Add, in place. Returns their number."""
    found = [node for node in model.graph if node.op_type == "Gemm" and _is_plain(node)]
    for node in found:
        _split(model.graph, node)
    return len(found)


def _is_plain(gemm: ir.Node) -> bool:
    attributes = gemm.attributes
    factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    sources = [value.producer() for value in gemm.inputs[:2] if value is not None]
    return (
        factors == (1.0, 1.0)
        and attributes.get_int("transA", 0) == 0
        and all(source is not None and source.op_type == "DequantizeLinear" for source in sources)
    )


def _split(graph: ir.Graph, gemm: ir.Node) -> None:
    left, right, *bias = gemm.inputs
    if gemm.attributes.get_int("transB", 0):
        transpose = ir.node("Transpose", [right], {"perm": [1, 0]}, name=f"{gemm.name}_transpose")
        transpose.outputs[0].name = f"{gemm.outputs[0].name}.weight"
        graph.insert_before(gemm, transpose)
        right = transpose.outputs[0]
    product = ir.node("MatMul", [left, right], name=f"{gemm.name}_matmul")
    if not bias or bias[0] is None:
        replace(gemm, product)
        return
    product.outputs[0].name = f"{gemm.outputs[0].name}.product"
    product.outputs[0].type, product.outputs[0].shape = gemm.outputs[0].type, gemm.outputs[0].shape
    graph.insert_before(gemm, product)
    replace(gemm, ir.node("Add", [product.outputs[0], bias[0]], name=f"{gemm.name}_bias"))
