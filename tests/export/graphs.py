"""Small ONNX graphs made by hand, and rewrites of them that must not change their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx_ir.passes.common import ShapeInferencePass

Arrays = dict[str, np.ndarray]


def graph(text: str, constants: Arrays) -> ir.Model:
    """A model from ONNX's text form, with `constants` as initializers."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    for name, content in constants.items():
        value = ir.val(name, const_value=ir.tensor(np.asarray(content), name=name))
        for node in model.graph:
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, value)
        model.graph.register_initializer(value)
    return ShapeInferencePass()(model).model


def run(model: ir.Model, inputs: Arrays) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, inputs)


def applied(
    rewrite: Callable[[ir.Model], int], model: ir.Model, inputs: Arrays, tolerance: float = 0.0
) -> int:
    """Apply `rewrite`; its count. Fails where an output moves by more than `tolerance` of its largest value."""
    before = run(model, inputs)
    count = rewrite(model)
    for old, new in zip(before, run(model, inputs), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=tolerance * np.abs(old).max())
    return count


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)
