"""One row of a sequence, chosen before what is computed of each row alone.

A classifier reads one token of what the last block gives: the class token, or the first. The block computes all of
them. Maps, norms and activations work on each row alone, and an attention gives each query its own row, so the
choice can be made before them; keys and values stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.lowering.constants import array, constant, scalar
from export.lowering.shapes import rank, size

_ROWS = -2
"""The axis of the rows, in every tensor here: (..., rows, features)."""
_ELEMENTWISE = frozenset(
    {
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Elu",
        "Erf",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Max",
        "Min",
        "Mul",
    }
    | {"Neg", "Pow", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Sum", "Tanh", "Where"}
)
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "Softmax"})
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})
_MASK = 3
"""The input of `Attention` that holds its mask, of one row a query."""


@dataclass(frozen=True)
class _Choice:
    """A Gather of one `row`, and, in the graph's order, the nodes of which only that row is read, with the inputs
    that hold the rows.
    """

    gather: ir.Node
    row: int
    before: dict[ir.Node, tuple[int, ...]]


def select_early(model: ir.Model) -> int:
    """Choose rows before they are computed, in place. Returns the number of nodes that work on one row now."""
    moved = 0
    for node in list(model.graph):
        if (choice := _choice(model.graph, node)) is not None:
            _move(model.graph, choice)
            moved += len(choice.before)
    return moved


def _choice(graph: ir.Graph, gather: ir.Node) -> _Choice | None:
    if gather.op_type != "Gather":
        return None
    axes, row = rank(gather.inputs[0]), scalar(gather.inputs[1])
    if row is None or axes < -_ROWS or gather.attributes.get_int("axis", 0) % axes != axes + _ROWS:
        return None
    readers: dict[ir.Node, tuple[int, ...]] = {gather: (0,)}
    for node in reversed(graph):
        if _is_read_by(readers, node.outputs) and (rows := _rows(node)):
            readers[node] = rows
    del readers[gather]
    return _Choice(gather, int(row), dict(reversed(readers.items()))) if readers else None


def _is_read_by(readers: dict[ir.Node, tuple[int, ...]], outputs: tuple[ir.Value, ...]) -> bool:
    """Whether the one of `outputs` is read, and as the rows of `readers` alone."""
    uses = [use for output in outputs for use in output.uses()]
    return (
        len(outputs) == 1
        and not outputs[0].is_graph_output()
        and bool(uses)
        and all(use.idx in readers.get(use.node, ()) for use in uses)
    )


def _rows(node: ir.Node) -> tuple[int, ...]:
    """The inputs whose rows become the rows of the output one by one; none where the rows are not apart."""
    if node.domain != "":
        return ()
    last = node.attributes.get_int("axis", -1) in (-1, rank(node.inputs[0]) - 1)
    if (
        (node.op_type in _NORMS and last)
        or (node.op_type in _ROUNDING and scalar(node.inputs[1]) is not None)
        or (node.op_type == "MatMul" and rank(node.inputs[1]) >= -_ROWS)
    ):
        return (0,) if rank(node.inputs[0]) >= -_ROWS else ()
    if node.op_type == "Attention":
        return _rows_of_queries(node)
    return _rows_side_by_side(node) if node.op_type in _ELEMENTWISE else ()


def _rows_of_queries(attention: ir.Node) -> tuple[int, ...]:
    if attention.attributes.get_int("is_causal", 0) or len(attention.inputs) > _MASK + 1:
        return ()  # what a query sees depends on where it stands
    if len(attention.inputs) <= _MASK or attention.inputs[_MASK] is None:
        return (0,)
    mask, queries = attention.inputs[_MASK], attention.inputs[0]
    if rank(mask) < -_ROWS or rank(queries) < -_ROWS:
        return ()
    number = size(mask, _ROWS)
    if number == 1:
        return (0,)
    return (0, _MASK) if number is not None and number == size(queries, _ROWS) else ()


def _rows_side_by_side(node: ir.Node) -> tuple[int, ...]:
    """The inputs of an elementwise `node` that have as many rows as its output; none where one's number is unknown."""
    if rank(node.outputs[0]) < -_ROWS:
        return ()
    rows = []
    for index, value in enumerate(node.inputs):
        if value is None or 0 <= rank(value) < -_ROWS:
            continue
        number = size(value, _ROWS)
        if number is None or number not in (1, size(node.outputs[0], _ROWS)):
            return ()
        if number != 1:
            rows.append(index)
    return tuple(rows)


def _move(graph: ir.Graph, choice: _Choice) -> None:
    index = constant(graph, f"row_{choice.row}", np.asarray([choice.row], np.int64))
    chosen: dict[ir.Value, ir.Value] = {}
    for node, rows in choice.before.items():
        for place in rows:
            value = node.inputs[place]
            assert value is not None
            if value.producer() in choice.before:
                continue
            node.replace_input_with(place, _gathered(value, index, node, chosen))
        node.outputs[0].shape = _one_row(node.outputs[0])
    where = array(choice.gather.inputs[1])
    assert where is not None
    only = constant(graph, f"{choice.gather.outputs[0].name}.row", np.zeros_like(where))
    choice.gather.replace_input_with(1, only)


def _gathered(
    value: ir.Value, index: ir.Value, reader: ir.Node, chosen: dict[ir.Value, ir.Value]
) -> ir.Value:
    """The row of `value`: one of those `chosen`, or a new one, put before `reader`.

    Of a dequantized tensor the row is chosen from its integers, so that what reads it stays an integer product.
    """
    if value in chosen:
        return chosen[value]
    source = value.producer()
    if source is not None and source.op_type == "DequantizeLinear" and _rows(source):
        integers = source.inputs[0]
        assert integers is not None
        row = _gathered(integers, index, reader, chosen)
        node = ir.node("DequantizeLinear", [row, *source.inputs[1:]], dict(source.attributes))
    else:
        node = ir.node("Gather", [value, index], {"axis": rank(value) + _ROWS})
    result = node.outputs[0]
    result.name, result.type, result.shape = f"{value.name}.row", value.type, _one_row(value)
    reader.prepend(node)
    chosen[value] = result
    return result


def _one_row(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([*value.shape[:_ROWS], 1, *value.shape[_ROWS + 1 :]])
