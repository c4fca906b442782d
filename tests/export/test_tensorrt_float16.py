"""The float16 rewrite on small graphs: what becomes float16, what does not, and the same numbers after it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from compress.errors import Unsuitable
from export.lowering.tensorrt_float16 import convert_to_float16, to_float16
from export.lowering.tensorrt_rotary import expand_rotary_angles

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'


def model_of(text: str) -> ir.Model:
    model = onnx.parser.parse_model(HEADER + text)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, **inputs: np.ndarray) -> np.ndarray:
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def types(model: ir.Model) -> dict[str, str]:
    return {node.op_type: node.outputs[0].dtype.name for node in model.graph if node.op_type != "Cast"}


def casts(model: ir.Model) -> int:
    return Counter(node.op_type for node in model.graph)["Cast"]


RMS_NORM = """
    g (float[2, 8] x) => (float[2, 8] y)
    <float two = {2}, float eps = {0.000001}, int64[1] axes = {-1}, float half = {0.5}> {
        square = Pow (x, two)
        mean = ReduceMean (square, axes)
        shifted = Add (mean, eps)
        root = Sqrt (shifted)
        inverse = Reciprocal (root)
        normed = Mul (x, inverse)
        y = Mul (normed, half)
    }
"""


def test_the_statistics_of_an_rms_norm_stay_float32():
    model, x = model_of(RMS_NORM), np.full((2, 8), 1000.0, np.float32)
    convert_to_float16(model)
    assert types(model) == {
        "Pow": "FLOAT",
        "ReduceMean": "FLOAT",
        "Add": "FLOAT",  # between float32 ops only
        "Sqrt": "FLOAT",
        "Reciprocal": "FLOAT",
        "Mul": "FLOAT16",
    }
    assert casts(model) == 3  # x and the inverse down, the output up again
    np.testing.assert_allclose(run(model, x=x), 0.5, rtol=1e-3)


def test_inputs_and_outputs_keep_names_and_types():
    model = model_of("g (float[2] x, int64[2] n) => (float[2] y) { m = Cast <to = 1> (n) y = Add (x, m) }")
    convert_to_float16(model)
    assert [(value.name, value.dtype.name) for value in model.graph.outputs] == [("y", "FLOAT")]
    assert types(model)["Add"] == "FLOAT16"
    found = run(model, x=np.array([0.5, 1.5], np.float32), n=np.array([1, 2]))
    assert found.dtype == np.float32
    assert found.tolist() == [1.5, 3.5]


def test_rotary_angles_stay_exact_at_large_positions():
    text = """
        g (int64[2] positions) => (float[2] y) <float frequency = {1.0}> {
            p = Cast <to = 1> (positions)
            angle = Mul (p, frequency)
            y = Cos (angle)
        }
    """
    model = model_of(text)
    convert_to_float16(model)
    positions = np.array([2049, 4097])
    np.testing.assert_allclose(run(model, positions=positions), np.cos(positions), atol=1e-4)


def test_an_input_that_onnx_wants_in_float32_stays_so():
    text = """
        g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y) <float[4] scales = {1, 1, 2, 2}> {
            y = Resize <mode = "nearest"> (x, , scales)
        }
    """
    model = model_of(text)
    convert_to_float16(model)
    assert types(model) == {"Resize": "FLOAT16"}
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert run(model, x=np.ones((1, 1, 2, 2), np.float32)).sum() == 16


def test_constants_beyond_float16_become_finite_masks():
    array = np.array([-3.4e38, -np.inf, 70000.0, 65504.0, 1e-9, 0.0], np.float32)
    assert to_float16(array).tolist() == [-32752.0, -np.inf, 32752.0, 65504.0, 0.0, 0.0]
    assert to_float16(array, smallest=2.0**-24)[4] == 2.0**-24
    assert np.isfinite(to_float16(array)[0] + to_float16(array)[0])


def test_scales_follow_what_they_scale():
    text = """
        g (float[2] x) => (float[2] y) <float s = {0.5}, int8 z = {0}> {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            y = Relu (d)
        }
    """
    model = model_of(text)
    convert_to_float16(model)
    assert types(model) == {"QuantizeLinear": "INT8", "DequantizeLinear": "FLOAT16", "Relu": "FLOAT16"}
    assert run(model, x=np.array([1.3, -4.0], np.float32)).tolist() == [1.5, 0.0]


def test_control_flow_is_refused():
    text = """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <then_branch = a () => (float[2] t) { t = Relu (x) },
                        else_branch = b () => (float[2] e) { e = Neg (x) }>
        }
    """
    with pytest.raises(Unsuitable, match=r"The graph branches \(`If` at "):
        convert_to_float16(model_of(text))


def test_rotary_angles_reach_every_row():
    text = """
        g (float[3, 2, 4, 8] x, float[1, 4, 4] cos, float[1, 4, 4] sin) => (float[3, 2, 4, 8] y) {
            y = RotaryEmbedding (x, cos, sin)
        }
    """
    model = model_of(text)
    assert expand_rotary_angles(model) == 2
    x = np.arange(192, dtype=np.float32).reshape(3, 2, 4, 8)
    angles = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 4, 4)
    left, right = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    expected = np.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)
    np.testing.assert_allclose(run(model, x=x, cos=np.cos(angles), sin=np.sin(angles)), expected, rtol=1e-5)
