"""Attention over whole rows instead of over heads that were moved apart.

`Attention` takes queries, keys and values as the linear maps give them, (batch, sequence, heads * size), and
gives its mixture so. The exporter splits the heads and transposes them before it, and back behind it: four
copies of a tensor, and between them a guard that runs along rows of the size of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnx_ir.tape import Tape

from export.lowering.attention import has_cache
from export.lowering.constants import constant, only_reader, scalar

_HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Split:
    """An attention over split heads: its query, key and value `rows` before the split, the Where behind it that
    zeroes queries without any key (or None), and the Reshape that `join`s the heads again.
    """

    rows: tuple[ir.Value, ir.Value, ir.Value]
    guard: ir.Node | None
    join: ir.Node


def flatten_attentions(model: ir.Model) -> int:
    """Let every Attention take and give whole rows, in place. Returns the number changed.

    Attentions whose queries or keys are computed on after they were split (rotary positions, a cache) stay.
    """
    found = [(node, split) for node in model.graph if (split := _split(node)) is not None]
    for attention, split in found:
        _flatten(model.graph, attention, split)
    if found:
        common.RemoveUnusedNodesPass()(model)  # the splits, where no other node reads them
    return len(found)


def _split(attention: ir.Node) -> _Split | None:
    if attention.op_type != "Attention" or has_cache(attention):
        return None
    query, key, value = (_rows(heads) for heads in attention.inputs[:3])
    guard = _guard(attention)
    join = _join((guard or attention).outputs[0])
    if query is None or key is None or value is None or join is None:
        return None
    return _Split((query, key, value), guard, join)


def _rows(heads: ir.Value | None) -> ir.Value | None:
    """What (batch, heads, sequence, size) was split from: (batch, sequence, heads * size). None if it was not."""
    transpose = None if heads is None else heads.producer()
    if transpose is None or not _swaps_heads(transpose) or transpose.inputs[0] is None:
        return None
    split = transpose.inputs[0].producer()
    if split is None or split.op_type != "Reshape":
        return None
    return split.inputs[0] if _same_rows(split.inputs[0], split.outputs[0]) else None


def _join(mixture: ir.Value) -> ir.Node | None:
    """The Reshape that makes (batch, sequence, heads * size) of (batch, heads, sequence, size), through a
    Transpose.
    """
    transpose = only_reader(mixture)
    join = only_reader(transpose.outputs[0]) if transpose is not None and _swaps_heads(transpose) else None
    if transpose is None or join is None or join.op_type != "Reshape":
        return None
    return join if _same_rows(join.outputs[0], transpose.outputs[0]) else None


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == _HEADS_FIRST


def _same_rows(rows: ir.Value | None, heads: ir.Value) -> bool:
    """Whether (batch, sequence, heads * size) and (batch, sequence, heads, size) hold the same rows."""
    if (
        rows is None
        or rows.shape is None
        or heads.shape is None
        or (len(rows.shape), len(heads.shape)) != (3, 4)
    ):
        return False
    count, size = heads.shape[2:]
    fits = isinstance(count, int) and isinstance(size, int) and rows.shape[2] == count * size
    return fits and list(rows.shape[:2]) == list(heads.shape[:2])


def _guard(attention: ir.Node) -> ir.Node | None:
    """The Where that alone reads the mixture and puts a number into some queries' rows, for all heads alike."""
    where = only_reader(attention.outputs[0])
    if where is None or where.op_type != "Where" or where.inputs[2] is not attention.outputs[0]:
        return None
    chosen = where.inputs[0].shape if where.inputs[0] is not None else None
    per_row = chosen is not None and len(chosen) == 4 and (chosen[1], chosen[3]) == (1, 1)
    return where if per_row and scalar(where.inputs[1]) is not None else None


def _flatten(graph: ir.Graph, attention: ir.Node, split: _Split) -> None:
    heads = [value.shape[1] for value in attention.inputs[:2]]  # type: ignore[union-attr, index]
    tape = Tape()
    result = tape.op(
        "Attention",
        [*split.rows, *attention.inputs[3:]],
        {**attention.attributes, "q_num_heads": heads[0], "kv_num_heads": heads[1]},
    )
    if split.guard is not None:
        chosen, number = split.guard.inputs[:2]
        result = tape.op("Where", [_without_heads(graph, tape, chosen), number, result])
    joined = split.join.outputs[0]
    for value in (node.outputs[0] for node in tape.nodes if node.op_type != "Squeeze"):
        value.type, value.shape = joined.type, joined.shape
    graph.insert_before(split.join, tape.nodes)
    ir.convenience.replace_all_uses_with(joined, result, replace_graph_outputs=True)
    for node in (split.join, split.join.inputs[0].producer(), split.guard, attention):  # type: ignore[union-attr]
        if node is not None:
            graph.remove(node, safe=True)


def _without_heads(graph: ir.Graph, tape: Tape, chosen: ir.Value | None) -> ir.Value:
    """The rows that are `chosen`, (batch, 1, sequence, 1), as (batch, sequence, 1)."""
    assert chosen is not None
    assert chosen.shape is not None
    squeezed = tape.op("Squeeze", [chosen, constant(graph, "heads_axis", np.asarray([1], np.int64))])
    squeezed.type, squeezed.shape = chosen.type, ir.Shape([chosen.shape[0], *chosen.shape[2:]])
    return squeezed
