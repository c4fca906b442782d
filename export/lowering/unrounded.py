"""A quantized graph with the rounding of activations taken out, for proofs: what is left can be compared tightly.

Where a graph rounds x to x / scale + zero point, the result keeps its fraction and is not cut to eight bits;
whoever reads it subtracts the zero point and multiplies by the scale that it read before. So a scale, a zero
point or a weight that is wrong or in the wrong place still shows. Integer weights stay.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.tape import Tape

from export.lowering.constants import array

_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)


def remove_rounding(model: ir.Model) -> None:
    """Put float operators in the place of QuantizeLinear, DequantizeLinear of what is computed, and
    MatMulIntegerToFloat.
    """
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _rewrite(node, _quotient)
        elif node.op_type == "DequantizeLinear" and array(node.inputs[0]) is None:
            _rewrite(node, _multiple)
        elif node.op_type == "MatMulIntegerToFloat":
            _rewrite(node, _product)
        elif node.op_type == "Where" and node.inputs[1] is not None and node.inputs[1].dtype in _INTEGERS:
            _rewrite(node, _choice)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None  # what moved integers now moves floats


def _rewrite(node: ir.Node, build: Callable[..., ir.Value]) -> None:
    """Put what `build` makes of the inputs of `node` in its place."""
    tape = Tape()
    result = build(tape, *node.inputs)
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _quotient(tape: Tape, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None) -> ir.Value:
    quotient = tape.op("Div", [x, scale])
    return quotient if zero_point is None else tape.op("Add", [quotient, _like(tape, zero_point, scale)])


def _multiple(tape: Tape, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None) -> ir.Value:
    shifted = x if zero_point is None else tape.op("Sub", [x, _like(tape, zero_point, scale)])
    return tape.op("Mul", [shifted, scale])


def _product(
    tape: Tape,
    left: ir.Value,
    right: ir.Value,
    left_scale: ir.Value,
    right_scale: ir.Value,
    left_zero_point: ir.Value | None = None,
    right_zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
) -> ir.Value:
    """The float product that MatMulIntegerToFloat stands for."""
    if array(right) is not None:
        right = _like(tape, right, right_scale)  # a constant, still integers
    factors = [
        _multiple(tape, left, left_scale, left_zero_point),
        _multiple(tape, right, right_scale, right_zero_point),
    ]
    product = tape.op("MatMul", factors)
    return product if bias is None else tape.op("Add", [product, bias])


def _choice(tape: Tape, condition: ir.Value, zero_point: ir.Value, x: ir.Value) -> ir.Value:
    return tape.op("Where", [condition, _like(tape, zero_point, x), x])


def _like(tape: Tape, integers: ir.Value, floats: ir.Value) -> ir.Value:
    """Constant integers in the type of `floats`."""
    return tape.op("CastLike", [integers, floats])
