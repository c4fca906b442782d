"""RotaryEmbedding with cosines and sines for every row of the batch, as ONNX asks for.

transformers computes the angles of positions that are the same in all rows once, with a batch of 1; the
exporter hands them to the op as they are, and runtimes refuse that for larger batches.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def expand_rotary_angles(model: ir.Model) -> int:
    """Broadcast the caches of every RotaryEmbedding without position ids to its input's batch, in place.

    Returns the number of caches.
    """
    expanded: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
            for at in (1, 2):
                cache = node.inputs[at]
                if cache is not None and cache not in expanded:
                    expanded[cache] = _expand(model.graph, node, cache)
                node.replace_input_with(at, expanded.get(cache) if cache is not None else None)
    return len(expanded)


def _expand(graph: ir.Graph, rotary: ir.Node, cache: ir.Value) -> ir.Value:
    """Insert Expand(`cache`, [batch of the rotated tensor, 1, 1]) before `rotary`."""
    name = f"{cache.name}.expanded"
    ones = ir.val(f"{name}.ones", const_value=ir.tensor(np.ones(2, np.int64), name=f"{name}.ones"))
    graph.register_initializer(ones)
    batch = ir.node("Shape", [rotary.inputs[0]], attributes={"start": 0, "end": 1}, name=f"{name}.batch")
    shape = ir.node("Concat", [batch.outputs[0], ones], attributes={"axis": 0}, name=f"{name}.shape")
    expand = ir.node("Expand", [cache, shape.outputs[0]], name=f"{name}.expand")
    for made, dtype in ((batch, ir.DataType.INT64), (shape, ir.DataType.INT64), (expand, ir.DataType.FLOAT)):
        made.outputs[0].name, made.outputs[0].dtype = f"{made.name}.output", dtype
    graph.insert_before(rotary, (batch, shape, expand))
    return expand.outputs[0]
