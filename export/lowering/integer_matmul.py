"""Products of two dequantized tensors as one integer kernel with its bias: MatMulIntegerToFloat.

ONNX Runtime finds the kernel by itself in Q/DQ form, but leaves the bias in an Add of its own, or fuses it
into a slower Gelu, and turns some products into QLinearMatMul, which is slower too. Written into the file, it
is what runs.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lowering.constants import array, only_reader, replace

DOMAIN = "com.microsoft"


def use_integer_matmuls(model: ir.Model) -> int:
    """Replace MatMul(DequantizeLinear, DequantizeLinear) and its bias, in place. Returns the number replaced."""
    found = [node for node in model.graph if node.op_type == "MatMul" and _operands(node) is not None]
    for node in found:
        _replace(model.graph, node)
    if found:
        model.opset_imports.setdefault(DOMAIN, 1)
    return len(found)


def _operands(matmul: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The two DequantizeLinears: uint8 or int8 with one scale on the left; int8 on the right, with no zero
    point.

    The right may have a scale for each column (constant, one for each of the last dimension).
    """
    left, right = (value.producer() if value is not None else None for value in matmul.inputs)
    if left is None or right is None or {left.op_type, right.op_type} != {"DequantizeLinear"}:
        return None
    fits = (
        _is_per_tensor(left)
        and (_is_per_tensor(right) or _is_per_column(right))
        and _is_symmetric_int8(right)
    )
    return (left, right) if fits else None


def _is_per_tensor(dequantize: ir.Node) -> bool:
    scale = array(dequantize.inputs[1])
    return scale is not None and scale.size == 1


def _is_per_column(dequantize: ir.Node) -> bool:
    weight, scale = array(dequantize.inputs[0]), array(dequantize.inputs[1])
    if weight is None or scale is None or weight.ndim != 2 or "block_size" in dequantize.attributes:
        return False
    return dequantize.attributes.get_int("axis", 1) % 2 == 1 and scale.shape == (weight.shape[1],)


def _is_symmetric_int8(dequantize: ir.Node) -> bool:
    integers = dequantize.inputs[0]
    zero_point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    zeros = array(zero_point)
    return integers is not None and integers.dtype == ir.DataType.INT8 and (zeros is None or not zeros.any())


def _bias(matmul: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add that reads the product alone, and its constant vector of one value a column."""
    add = only_reader(matmul.outputs[0])
    if add is None or add.op_type != "Add":
        return None
    vector = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
    content, columns = array(vector), matmul.outputs[0].shape
    if (
        vector is None
        or content is None
        or content.ndim != 1
        or columns is None
        or content.shape[0] != columns[-1]
    ):
        return None
    return add, vector


def _replace(graph: ir.Graph, matmul: ir.Node) -> None:
    operands = _operands(matmul)
    assert operands is not None
    left, right = operands
    found = _bias(matmul)
    inputs = [left.inputs[0], right.inputs[0], left.inputs[1], right.inputs[1], _zero_point(left), None]
    if found is not None:
        inputs.append(found[1])
    node = ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN, version=1, name=matmul.name)
    replace(matmul if found is None else found[0], node)
    if found is not None:
        graph.remove(matmul, safe=True)
    for source in operands:
        if not source.outputs[0].uses() and source.graph is not None:
            graph.remove(source, safe=True)


def _zero_point(dequantize: ir.Node) -> ir.Value | None:
    return dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
