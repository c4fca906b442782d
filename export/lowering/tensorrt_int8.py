"""The form of the graph that TensorRT's parser takes, and turns into int8 kernels.

The rewrites of the standard form give what its kernels need: one QuantizeLinear and one DequantizeLinear for
each tensor and range, however many layers read them, so that query, key and value share the quantized output
of their norm; and dequantized weights that a product reads with no Transpose in between. TensorRT adds that
every zero point is 0, and that a RotaryEmbedding has its angles for every row of the batch.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.errors import Unsuitable
from export.lowering.cpu import lower_standard
from export.lowering.tensorrt_rotary import expand_rotary_angles

_QDQ = ("QuantizeLinear", "DequantizeLinear")


def lower_tensorrt(model: ir.Model) -> dict[str, int]:
    """All rewrites for TensorRT, in place. Returns how often each one was applied.

    Raises `Unsuitable` for a zero point other than 0.
    """
    _require_symmetric(model.graph)
    return {**lower_standard(model), "expand_rotary_angles": expand_rotary_angles(model)}


def _require_symmetric(graph: ir.Graph) -> None:
    for node in graph:
        zero_point = node.inputs[2] if node.op_type in _QDQ and len(node.inputs) > 2 else None
        if zero_point is None:
            continue
        constant = ir.convenience.get_const_tensor(zero_point)
        if constant is None or np.any(constant.numpy()):
            raise Unsuitable(
                f"`{node.op_type}` at {node.name} has a zero point other than 0. TensorRT takes none.",
                "Export under `lowered(module, 'symmetric')` of compress.layers.quantized.",
            )
