"""Quantization before data movement instead of after it.

Attention reshapes and transposes its queries, keys and values before their products round them. Rounding
first gives the same integers, and moves a quarter of the bytes.
"""

from __future__ import annotations

import onnx_ir as ir

from export.lowering.constants import array, only_reader, replace

_MOVEMENTS = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})


def quantize_early(model: ir.Model) -> int:
    """Move every QuantizeLinear with one scale above the movements that it alone reads, in place.

    Returns the number of movements passed.
    """
    passed = 0
    while found := [node for node in model.graph if _movement(node) is not None]:
        for quantize in found:
            _swap(model.graph, quantize)
        passed += len(found)
    return passed


def _movement(quantize: ir.Node) -> ir.Node | None:
    """The movement whose result `quantize` alone reads, or None."""
    if quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is None:
        return None
    scale, movement = array(quantize.inputs[1]), quantize.inputs[0].producer()
    if scale is None or scale.size != 1 or movement is None or movement.op_type not in _MOVEMENTS:
        return None
    return movement if only_reader(movement.outputs[0]) is quantize else None


def _swap(graph: ir.Graph, quantize: ir.Node) -> None:
    movement = _movement(quantize)
    assert movement is not None
    source = movement.inputs[0]
    assert source is not None
    first = ir.node(
        "QuantizeLinear", [source, *quantize.inputs[1:]], dict(quantize.attributes), name=quantize.name
    )
    integers = first.outputs[0]
    integers.name = f"{movement.outputs[0].name}.quantized"
    integers.type, integers.shape = quantize.outputs[0].type, source.shape
    graph.insert_before(movement, first)
    replace(
        quantize,
        ir.node(
            movement.op_type, [integers, *movement.inputs[1:]], dict(movement.attributes), name=movement.name
        ),
    )
    graph.remove(movement, safe=True)
