"""One row of a sequence, chosen before what is computed of each row alone.

A classifier reads one token of what the last block gives: the class token, or the first. The block computes all of
them. Maps, norms and activations work on each row alone, and an attention gives each query its own row, so the
choice can be made before them; keys and values stay whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from export.lowering.attention import MASK, QUERIES, has_cache, mask_of
from export.lowering.constants import array, constant, scalar
from export.lowering.shapes import rank, size

_ROWS = -2
"""The axis of the rows, in every tensor here: (..., rows, features)."""
_RANK = 2
"""A tensor of rows has at least so many axes."""
_ARITHMETIC = frozenset(
    {"Add", "Cast", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Sqrt", "Sub", "Sum", "Where"}
)
_ACTIVATIONS = frozenset(
    {"Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Tanh"}
)
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "Softmax"})
_ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear"})


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
    if gather.op_type != "Gather" or gather.domain != "":
        return None
    axes, row = rank(gather.inputs[0]), scalar(gather.inputs[1])
    if row is None or axes < _RANK or gather.attributes.get_int("axis", 0) % axes != axes + _ROWS:
        return None
    if size(gather.inputs[0], _ROWS) == 1:
        return None  # there is but one row
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
        and rank(outputs[0]) >= _RANK
        and not outputs[0].is_graph_output()
        and bool(uses)
        and all(use.idx in readers.get(use.node, ()) for use in uses)
    )


def _rows(node: ir.Node) -> tuple[int, ...]:
    """The inputs whose rows become the rows of the output one by one; none where the rows are not apart."""
    places = _places(node) if node.domain == "" else ()
    return places if all(rank(node.inputs[place]) >= _RANK for place in places) else ()


def _places(node: ir.Node) -> tuple[int, ...]:
    if node.op_type in _NORMS:
        last = node.attributes.get_int("axis", -1) in (-1, rank(node.inputs[0]) - 1)
        return (0,) if last and all(map(_has_no_rows, node.inputs[1:])) else ()
    if node.op_type in _ROUNDING:
        return (0,) if scalar(node.inputs[1]) is not None else ()
    if node.op_type == "MatMul":
        return (0,) if rank(node.inputs[1]) >= _RANK else ()
    if node.op_type == "Attention":
        return _places_of_queries(node)
    return _places_side_by_side(node) if node.op_type in _ARITHMETIC | _ACTIVATIONS else ()


def _has_no_rows(value: ir.Value | None) -> bool:
    """Whether `value` is the same for all rows, as far as is known."""
    return value is None or 0 <= rank(value) < _RANK or size(value, _ROWS) == 1


def _places_of_queries(attention: ir.Node) -> tuple[int, ...]:
    """Those of the queries, and of a mask with a row for each."""
    if attention.attributes.get_int("is_causal", 0) or has_cache(attention):
        return ()  # what a query sees depends on where it stands
    mask = mask_of(attention)
    if _has_no_rows(mask):
        return (QUERIES,)
    return (QUERIES, MASK) if _same_rows(mask, attention.inputs[QUERIES]) else ()


def _places_side_by_side(node: ir.Node) -> tuple[int, ...]:
    """The inputs of an elementwise `node` that have as many rows as its output; none where one's number is unknown."""
    places = tuple(place for place, value in enumerate(node.inputs) if not _has_no_rows(value))
    return places if all(_same_rows(node.inputs[place], node.outputs[0]) for place in places) else ()


def _same_rows(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether two tensors have as many rows, and it is known."""
    if rank(left) < _RANK or rank(right) < _RANK:
        return False
    return size(left, _ROWS) is not None and size(left, _ROWS) == size(right, _ROWS)


def _move(graph: ir.Graph, choice: _Choice) -> None:
    name = str(choice.gather.outputs[0].name)
    index = constant(graph, f"{name}.place", np.asarray([choice.row], np.int64))
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
    only = constant(graph, f"{name}.only", np.zeros_like(where))
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
    result.name, result.type, result.shape = f"{value.name}.row.{index.name}", value.type, _one_row(value)
    reader.prepend(node)
    chosen[value] = result
    return result


def _one_row(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([*value.shape[:_ROWS], 1, *value.shape[_ROWS + 1 :]])
