"""Equal constants stored once: tied weights, and the scales and zero points that many layers have in common."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir


def share_constants(model: ir.Model) -> int:
    """Let every initializer with the type, shape and bytes of an earlier one be that one, in place.

    Returns the number of initializers gone. Compares by hash, so that no weight is held twice. (onnx_ir's own
    pass of this kind refuses arrays that are not contiguous, such as folded transposes.)
    """
    graph = model.graph
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    gone = 0
    for value in list(graph.initializers.values()):
        if value.const_value is None or value.is_graph_input() or value.is_graph_output():
            continue
        kept = first.setdefault(_key(value.const_value), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            graph.initializers.pop(str(value.name))
            gone += 1
    return gone


def _key(tensor: ir.TensorProtocol) -> tuple[ir.DataType, tuple[int, ...], bytes]:
    content = np.ascontiguousarray(tensor.numpy()).view(np.uint8)
    return tensor.dtype, tuple(tensor.shape.numpy()), hashlib.sha256(content.data).digest()
