"""Every rewrite on a small graph made by hand: the same numbers before and after, and how often it applied."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from export.lowering.attention_layout import flatten_attentions
from export.lowering.constants import array, scalar
from export.lowering.cpu import lower_cpu, lower_standard
from export.lowering.gemm import split_quantized_gemms
from export.lowering.integer_matmul import use_integer_matmuls
from export.lowering.product_scale import fold_product_scales
from export.lowering.quantize_early import quantize_early
from export.lowering.residual_sum import sum_residuals
from export.lowering.shared_weights import share_constants
from export.lowering.weight_layout import transpose_weights
from tests.export.graphs import Arrays, applied, graph, ops

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 5, 8)).astype(np.float32)
GRID: Arrays = {"s": np.float32(0.03), "z": np.uint8(117)}
WEIGHT: Arrays = {
    "w": RANDOM.integers(-127, 128, (6, 8)).astype(np.int8),
    "ws": RANDOM.uniform(0.01, 0.02, 6).astype(np.float32),
    "b": RANDOM.normal(size=6).astype(np.float32),
}


LINEAR = """g (float[2,5,8] x) => (float[2,5,6] y) {
    q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
    dw = DequantizeLinear<axis = 0>(w, ws)  t = Transpose<perm = [1, 0]>(dw)
    m = MatMul(d, t)  y = Add(m, b)
}"""


def linear() -> ir.Model:
    return graph(LINEAR, GRID | WEIGHT)


def test_transposed_weights_are_stored_as_they_are_multiplied():
    model = linear()
    assert applied(transpose_weights, model, {"x": X}) == 1
    assert ops(model)["Transpose"] == 0
    assert "w" not in model.graph.initializers
    stored = array(model.graph.initializers["w.transposed"])
    np.testing.assert_array_equal(stored, WEIGHT["w"].T)
    assert transpose_weights(model) == 0


def test_a_transpose_of_float_weights_stays():
    text = "g (float[2,5,8] x) => (float[2,5,6] y) { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }"
    model = graph(text, {"w": WEIGHT["ws"][:, None] * WEIGHT["w"]})
    assert transpose_weights(model) == 0


def test_an_integer_product_takes_its_bias():
    model = linear()
    transpose_weights(model)
    assert applied(use_integer_matmuls, model, {"x": X}, 1e-6) == 1
    assert ops(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert model.opset_imports["com.microsoft"] == 1
    assert use_integer_matmuls(model) == 0


def test_an_integer_product_that_others_read_keeps_its_add():
    text = LINEAR.replace("(float[2,5,6] y)", "(float[2,5,6] y, float[2,5,6] m)")
    model = graph(text, GRID | WEIGHT)
    transpose_weights(model)
    assert applied(use_integer_matmuls, model, {"x": X}, 1e-6) == 1
    assert ops(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"w": WEIGHT["w"].view(np.uint8)},
        {"ws": np.full(8, 0.02, np.float32)},
    ],
    ids=["uint8 weight", "scale for each input"],
)
def test_products_without_a_fast_kernel_stay(change: Arrays):
    text = LINEAR.replace("<axis = 0>", "<axis = 1>") if "ws" in change else LINEAR
    model = graph(text, GRID | WEIGHT | change)
    transpose_weights(model)
    assert use_integer_matmuls(model) == 0
    assert ops(model)["MatMul"] == 1


HEADS = """g (float[2,5,8] x, bool[2,1,5,5] mask) => (float[2,5,8] y) {
    split = Constant<value_ints = [2, 5, 4, 2]>()
    q = Reshape(x, split)  qt = Transpose<perm = [0, 2, 1, 3]>(q)
    k = Reshape(x, split)  kt = Transpose<perm = [0, 2, 1, 3]>(k)
    a = Attention(qt, kt, kt, mask)
    n = Cast<to = 1>(mask)  axis = Constant<value_ints = [-1]>()  sum = ReduceSum<keepdims = 1>(n, axis)
    none = Less(sum, one)  g = Where(none, zero, a)
    t = Transpose<perm = [0, 2, 1, 3]>(g)  rows = Constant<value_ints = [2, 5, 8]>()  y = Reshape(t, rows)
}"""
NUMBERS: Arrays = {"one": np.float32(1), "zero": np.float32(0)}
MASK = RANDOM.random((2, 1, 5, 5)) < 0.4


def test_an_attention_takes_whole_rows():
    model = graph(HEADS, NUMBERS)
    mask = MASK.copy()
    mask[1, :, 2] = False  # a query without any key, whose row the guard zeroes
    assert applied(flatten_attentions, model, {"x": X, "mask": mask}, 1e-6) == 1
    assert ops(model)["Transpose"] == ops(model)["Reshape"] == 0
    assert ops(model)["Where"] == 1
    assert flatten_attentions(model) == 0


def test_an_attention_whose_keys_are_changed_after_the_split_stays():
    model = graph(HEADS.replace("a = Attention(qt, kt, kt", "r = Neg(kt)  a = Attention(qt, r, kt"), NUMBERS)
    assert flatten_attentions(model) == 0


def test_zeros_are_put_among_integers():
    text = """g (float[2,5,8] x, bool[2,5,1] none) => (float[2,5,8] y) {
        g = Where(none, zero, x)  q = QuantizeLinear(g, s, z)  y = DequantizeLinear(q, s, z)
    }"""
    model = graph(text, GRID | NUMBERS)
    assert applied(quantize_early, model, {"x": X, "none": MASK[:, 0, :, :1]}) == 1
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "Where", "DequantizeLinear"]


ATTENTION = """g (float[2,5,8] x) => (float[2,5,5] y) {
    q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
    k = QuantizeLinear(x, ks, kz)  dk = DequantizeLinear(k, ks, kz)
    kt = Transpose<perm = [0, 2, 1]>(x)  qkt = QuantizeLinear(kt, ks, kz)  dkt = DequantizeLinear(qkt, ks, kz)
    m = MatMul(d, dkt)  y = Mul(m, c)
}"""
KEYS: Arrays = {"ks": np.float32(0.04), "kz": np.int8(0), "c": np.float32(0.3)}


def test_the_factor_of_a_product_moves_into_a_scale():
    model = graph(ATTENTION, GRID | KEYS)
    assert applied(fold_product_scales, model, {"x": X}, 1e-6) == 1
    assert ops(model)["Mul"] == 0
    product = next(node for node in model.graph if node.op_type == "MatMul")
    left = product.inputs[0]
    assert left is not None
    assert scalar(left.producer().inputs[1]) == pytest.approx(0.03 * 0.3)


def test_a_factor_that_is_computed_stays():
    text = ATTENTION.replace("y = Mul(m, c)", "cc = Exp(c)  y = Mul(m, cc)")
    assert fold_product_scales(graph(text, GRID | KEYS)) == 0


def test_products_of_two_activations_become_integer_products():
    model = graph(ATTENTION, GRID | KEYS)
    fold_product_scales(model)
    assert applied(use_integer_matmuls, model, {"x": X}, 1e-6) == 1
    assert ops(model)["MatMulIntegerToFloat"] == 1


def test_rounding_comes_before_transposing():
    model = graph(ATTENTION, GRID | KEYS)
    assert applied(quantize_early, model, {"x": X}) == 1
    transpose = next(node for node in model.graph if node.op_type == "Transpose")
    assert transpose.inputs[0] is not None
    assert transpose.inputs[0].producer().op_type == "QuantizeLinear"
    assert transpose.outputs[0].dtype == ir.DataType.INT8
    assert quantize_early(model) == 0


def test_rounding_stays_where_the_float_tensor_is_read_too():
    text = ATTENTION.replace("(float[2,5,5] y)", "(float[2,5,5] y, float[2,8,5] kt)")
    assert quantize_early(graph(text, GRID | KEYS)) == 0


GEMM = """g (float[5,8] x) => (float[5,6] y) {
    q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
    dw = DequantizeLinear<axis = 0>(w, ws)
    y = Gemm<transB = 1>(d, dw, b)
}"""


def test_a_quantized_gemm_becomes_one_integer_product():
    model = graph(GEMM, GRID | WEIGHT)
    assert applied(split_quantized_gemms, model, {"x": X[0]}, 1e-6) == 1
    assert ops(model)["MatMul"] == 1
    transpose_weights(model)
    assert applied(use_integer_matmuls, model, {"x": X[0]}, 1e-6) == 1
    assert ops(model) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}


def test_a_gemm_with_factors_stays():
    assert (
        split_quantized_gemms(graph(GEMM.replace("transB = 1", "transB = 1, alpha = 0.5"), GRID | WEIGHT))
        == 0
    )


RESIDUAL = """g (float[2,5,8] x, float[2,5,8] r) => (float[2,5,8] y) {
    a = Add(x, r)  y = LayerNormalization(a, one)
}"""


def test_residuals_are_summed_where_a_norm_reads_them():
    model = graph(RESIDUAL, {"one": np.ones(8, np.float32)})
    assert applied(sum_residuals, model, {"x": X, "r": X[::-1].copy()}) == 1
    assert ops(model) == {"Sum": 1, "LayerNormalization": 1}


def test_onnx_runtime_does_not_fuse_the_sum(tmp_path):
    def fused(model: ir.Model) -> bool:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        return ops(ir.load(tmp_path / "optimized.onnx"))["SkipLayerNormalization"] == 1

    model = graph(RESIDUAL, {"one": np.ones(8, np.float32)})
    assert fused(model)
    sum_residuals(model)
    assert not fused(model)


def test_equal_constants_are_stored_once():
    text = "g (float[2,5,8] x) => (float[2,5,8] y) { a = Add(x, one)  b = Mul(a, two)  y = Mul(b, three) }"
    ones, threes = np.ones(8, np.float32), np.full(8, 3, np.float32)
    model = graph(text, {"one": ones, "two": ones.copy(), "three": threes})
    assert applied(share_constants, model, {"x": X}) == 1
    assert sorted(model.graph.initializers) == ["one", "three"]


def test_constants_of_one_content_and_two_shapes_are_two():
    text = "g (float[2,5,8] x) => (float[2,5,8] y) { a = Add(x, one)  y = Mul(a, two) }"
    model = graph(text, {"one": np.ones(8, np.float32), "two": np.ones((1, 8), np.float32)})
    assert share_constants(model) == 0


def test_the_whole_lowering_counts_what_it_does():
    assert lower_cpu(linear()) == {
        "share_constants": 0,
        "drop_uniform": 0,
        "split_quantized_gemms": 0,
        "transpose_weights": 1,
        "fold_product_scales": 0,
        "flatten_attentions": 0,
        "carry_addends": 0,
        "select_early": 0,
        "quantize_early": 0,
        "use_integer_matmuls": 1,
        "sum_residuals": 0,
    }


def test_the_standard_lowering_keeps_to_the_standard():
    model = linear()
    lower_standard(model)
    assert {node.domain for node in model.graph} == {""}
    assert ops(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, "Add": 1}
