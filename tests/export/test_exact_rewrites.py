"""Rewrites by algebra, on small graphs: masks that mask nothing, biases in other biases, and rows that are read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.lowering.carried_addends import carry_addends
from export.lowering.constants import array
from export.lowering.integer_matmul import use_integer_matmuls
from export.lowering.select_early import select_early
from export.lowering.uniform import drop_uniform
from tests.export.graphs import Arrays, applied, graph, ops

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 5, 8)).astype(np.float32)
TRUE, ZEROS = np.ones((1, 1, 5, 1), bool), np.zeros(8, np.float32)


def weights(*names: str) -> Arrays:
    return {name: RANDOM.normal(size=(8, 8)).astype(np.float32) / 3 for name in names}


def vectors(*names: str) -> Arrays:
    return {name: RANDOM.normal(size=8).astype(np.float32) for name in names}


MASKED = """g (float[batch,5,8] x) => (float[batch,5,8] y) {
    shape = Shape<end = 1>(x)  rest = Constant<value_ints = [1, 5, 5]>()  sizes = Concat<axis = 0>(shape, rest)
    seen = Expand(true, sizes)  not = Not(seen)  number = Cast<to = 1>(not)  mask = Mul(number, lowest)
    a = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, mask)
    count = Cast<to = 1>(seen)  axis = Constant<value_ints = [-1]>()  sum = ReduceSum<keepdims = 1>(count, axis)
    less = Less(sum, one)  first = Constant<value_ints = [1]>()  none = Squeeze(less, first)  y0 = Where(none, zero, a)
    y = Neg(y0)
}"""
MASK: Arrays = {"true": TRUE, "lowest": np.float32(-1e9), "one": np.float32(1), "zero": np.float32(0)}


def test_a_mask_that_masks_nothing_is_dropped_with_its_guard():
    model = graph(MASKED, MASK)
    assert applied(drop_uniform, model, {"x": X}) == 2
    assert ops(model) == {"Attention": 1, "Neg": 1}
    assert list(model.graph.initializers) == []
    assert drop_uniform(model) == 0


@pytest.mark.parametrize("seen", [~TRUE, np.tri(5, dtype=bool)[None, None]], ids=["nothing", "the past"])
def test_a_mask_that_masks_something_stays(seen: np.ndarray):
    model = graph(MASKED, MASK | {"true": seen, "lowest": np.float32(-np.inf)})
    drop_uniform(model)
    assert ops(model)["Attention"] == 1
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert len(attention.inputs) == 4


@pytest.mark.parametrize("number", [np.finfo(np.float32).min, -1e9, 1e4, -np.inf], ids=str)
def test_numbers_that_hide_the_scores_are_no_empty_mask(number: float):
    text = "g (float[2,5,8] x) => (float[2,5,8] y) { y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x, m) }"
    model = graph(text, {"m": np.full((5, 5), number, np.float32)})
    assert drop_uniform(model) == 0
    model = graph(text, {"m": np.zeros((5, 5), np.float32)})
    assert applied(drop_uniform, model, {"x": X}) == 1


@pytest.mark.parametrize("axes", [np.zeros(0, np.int64), np.asarray([0])], ids=["of all", "of given"])
def test_a_sum_over_given_axes_is_known(axes: np.ndarray):
    text = """g (float[2,3] x) => (float[2,3] y) {
        s = ReduceSum<keepdims = 0>(ones, axes)  c = Less(s, three)  a = Where(c, x, zeros)  y = Neg(a)
    }"""
    constants = {
        "ones": np.ones((2, 3), np.float32),
        "three": np.float32(3),
        "zeros": np.zeros((2, 3), np.float32),
    }
    model = graph(text, constants | {"axes": axes})
    assert applied(drop_uniform, model, {"x": X[0, :2, :3]}) == axes.size


def test_queries_without_keys_are_known_only_where_keys_are_counted():
    model = graph(MASKED.replace("[batch,5,8]", "[batch,rows,8]").replace("[1, 5, 5]", "[1, 1, -1]"), MASK)
    drop_uniform(model)
    assert ops(model)["Where"] == 1


@pytest.mark.parametrize(
    ("node", "number", "count"),
    [
        ("Add(x, c)", 0, 1),
        ("Add(c, x)", 0, 1),
        ("Mul(x, c)", 1, 1),
        ("Sub(x, c)", 0, 1),
        ("Div(x, c)", 1, 1),
        ("Sub(c, x)", 0, 0),
        ("Div(c, x)", 1, 0),
        ("Add(x, c)", 1, 0),
        ("Mul(x, c)", 0, 0),
    ],
)
def test_numbers_that_change_nothing(node: str, number: int, count: int):
    model = graph(
        f"g (float[2,5,8] x) => (float[2,5,8] y) {{ a = {node}  y = Neg(a) }}", {"c": ZEROS + number}
    )
    assert applied(drop_uniform, model, {"x": X}) == count


def test_zeros_that_spread_rows_stay():
    text = "g (float[1,5,8] x) => (float[2,5,8] y) { a = Add(x, zeros)  y = Neg(a) }"
    model = graph(text, {"zeros": np.zeros((2, 1, 8), np.float32)})
    assert applied(drop_uniform, model, {"x": X[:1]}) == 0


BLOCKS = """g (float[2,5,8] x) => (float[2,6] y) {
    m1 = MatMul(x, w1)  a1 = Add(m1, b1)  r1 = Add(a1, x)
    m2 = MatMul(r1, w2)  a2 = Add(b2, m2)  h = Gelu(a2)  m3 = MatMul(h, w3)  a3 = Add(m3, b3)  r2 = Add(r1, a3)
    token = Gather<axis = 1>(r2, zero)  y = Gemm<transB = 1>(token, w4, b4)
}"""
BLOCK: Arrays = {
    **weights("w1", "w2", "w3"),
    **vectors("b1", "b2", "b3"),
    "w4": RANDOM.normal(size=(6, 8)).astype(np.float32),
    "b4": RANDOM.normal(size=6).astype(np.float32),
    "zero": np.int64(0),
}


def test_biases_go_through_residual_sums_into_others():
    model = graph(BLOCKS, BLOCK)
    assert applied(carry_addends, model, {"x": X}, 1e-6) == 2
    assert ops(model) == {"MatMul": 3, "Add": 3, "Gelu": 1, "Gather": 1, "Gemm": 1}
    assert {"b1", "b2", "b3", "b4"}.isdisjoint(model.graph.initializers)
    assert carry_addends(model) == 0


def test_a_bias_that_two_share_is_increased_for_one():
    model = graph(BLOCKS.replace("b3)", "b2)"), BLOCK)
    assert applied(carry_addends, model, {"x": X}, 1e-6) == 2
    bias = next(node.inputs[0] for node in model.graph if node.outputs[0].name == "a2")
    assert not np.array_equal(array(bias), BLOCK["b2"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("token = Gather<axis = 1>(r2", "n = LayerNormalization(r2, scale)  token = Gather<axis = 1>(n"),
        ("=> (float[2,6] y)", "=> (float[2,6] y, float[2,5,8] r2)"),
        ("Gather<axis = 1>", "Gather<axis = 2>"),
        ("transB = 1>", "transB = 1, alpha = 2.0>"),
    ],
    ids=["a norm", "an output", "a choice of features", "a factor"],
)
def test_a_bias_that_something_else_sees_stays(old: str, new: str):
    features = {"w4": RANDOM.normal(size=(6, 5)).astype(np.float32)} if "axis = 2" in new else {}
    text = BLOCKS.replace(old, new)
    model = graph(text, BLOCK | {"scale": ZEROS + 1} | features)
    assert applied(carry_addends, model, {"x": X}, 1e-6) == 0


def test_a_bias_of_one_feature_that_is_spread_over_many_stays():
    text = """g (float[2,5,8] x) => (float[2,5,8] y) {
        m1 = MatMul(x, w1)  a1 = Add(m1, b1)  r1 = Add(a1, x)  m2 = MatMul(r1, w2)  y = Add(m2, b2)
    }"""
    model = graph(text, BLOCK | {"w1": BLOCK["w1"][:, :1], "b1": BLOCK["b1"][:1]})
    assert applied(carry_addends, model, {"x": X}) == 0


def test_numbers_of_places_are_no_biases():
    text = """g (float[2,5,8] x, int64[2] at) => (float[2,2,8] y) {
        moved = Add(at, by)  chosen = Gather<axis = 1>(x, moved)  y = Add(chosen, b1)
    }"""
    model = graph(text, BLOCK | {"by": np.asarray([1, 2])})
    assert applied(carry_addends, model, {"x": X, "at": np.asarray([0, 2])}) == 0


def test_an_unread_half_of_a_walk_leaves_no_trace():
    """The first bias meets a constant that could take it, and then a norm."""
    text = BLOCKS.replace("h = Gelu(a2)", "l = LayerNormalization(r1, scale)  g = Gelu(a2)  h = Add(g, l)")
    model = graph(text, BLOCK | {"scale": ZEROS + 1})
    assert applied(carry_addends, model, {"x": X}, 1e-6) == 1
    assert "b2" in model.graph.initializers


ATTENTION = """g (float[2,5,8] x, bool[2,1,5,5] m) => (float[2,5,8] y) {
    mq = MatMul(x, wq)  q = Add(mq, bq)  mk = MatMul(x, wk)  k = Add(mk, bk)  mv = MatMul(x, wv)  v = Add(mv, bv)
    a = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, v)
    mo = MatMul(a, wo)  y = Add(mo, bo)
}"""
MAPS = weights("wq", "wk", "wv", "wo") | vectors("bq", "bk", "bv", "bo")
SEEN = RANDOM.random((2, 1, 5, 5)) < 0.6
SEEN[..., 0] = True


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("", "", 2),
        ("q, k, v)", "q, k, v, m)", 1),
        ("kv_num_heads = 2>", "kv_num_heads = 2, is_causal = 1>", 2),
        ("kv_num_heads = 2>", "kv_num_heads = 2, softcap = 0.5>", 0),
        ("(q, k, v)", "(k, q, v)", 2),
        ("k = Add(mk, bk)", "k = Add(q, bk)", 2),
    ],
    ids=["plain", "masked", "causal", "capped", "swapped", "keys of queries"],
)
def test_biases_of_keys_and_values(old: str, new: str, count: int):
    model = graph(ATTENTION.replace(old, new), MAPS)
    assert applied(carry_addends, model, {"x": X, "m": SEEN}, 2e-6) == count


def test_values_of_fewer_heads_keep_their_bias():
    text = ATTENTION.replace("kv_num_heads = 2", "kv_num_heads = 1")
    narrow = {name: MAPS[name][..., :4] for name in ("wk", "wv", "bk", "bv")}
    model = graph(text, MAPS | narrow)
    assert applied(carry_addends, model, {"x": X, "m": SEEN}, 2e-6) == 1


ROWS = """g (float[2,rows,8] x, bool[2,1,rows,rows] m) => (float[2,8] y) {
    n = LayerNormalization(x, scale)  mq = MatMul(n, wq)  q = Add(mq, bq)  k = MatMul(n, wk)
    a = Attention<q_num_heads = 2, kv_num_heads = 2>(q, k, n)
    mo = MatMul(a, wo)  o = Add(mo, bo)  r = Add(o, x)  h = Gelu(r)
    y = Gather<axis = 1>(h, place)
}"""
ROW: Arrays = MAPS | {"scale": ZEROS + 2, "place": np.int64(0)}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({}, np.int64(0)),
        ({}, np.int64(-1)),
        ({"=> (float[2,8] y)": "=> (float[2,1,8] y)"}, np.asarray([3])),
        ({"(q, k, n)": "(q, k, n, m)"}, np.int64(2)),
    ],
    ids=["first", "last", "kept axis", "masked"],
)
def test_only_the_row_that_is_read_is_computed(change: dict[str, str], place: np.ndarray):
    text = ROWS
    for old, new in change.items():
        text = text.replace(old, new)
    model = graph(text, ROW | {"place": place})
    assert applied(select_early, model, {"x": X, "m": SEEN}, 1e-6) == 7
    query = next(node.inputs[0] for node in model.graph if node.op_type == "Attention")
    assert query is not None
    assert query.shape == [2, 1, 8]
    assert select_early(model) == 0


@pytest.mark.parametrize(
    ("old", "new", "count"),
    [
        ("kv_num_heads = 2>", "kv_num_heads = 2, is_causal = 1>", 4),
        ("=> (float[2,8] y)", "=> (float[2,8] y, float[2,rows,8] r)", 1),
        ("=> (float[2,8] y)", "=> (float[2,8] y, float[2,rows,8] h)", 0),
        ("h = Gelu(r)", "t = Transpose<perm = [0, 2, 1]>(x)  p = MatMul(t, r)  h = MatMul(x, p)", 1),
        ("h = Gelu(r)", "h = Softmax<axis = 1>(r)", 0),
        ("h = Gelu(r)", "z = Constant<value_int = 1>()  h = CumSum(r, z)", 0),
        ("<axis = 1>", "<axis = 2>", 0),
    ],
    ids=["causal", "an output", "the choice's own", "a sum of rows", "over rows", "up to a row", "a feature"],
)
def test_rows_that_are_read_are_computed(old: str, new: str, count: int):
    text = ROWS.replace(old, new).replace(
        "=> (float[2,8] y", "=> (float[2,rows] y" if "axis = 2" in new else "=> (float[2,8] y"
    )
    model = graph(text, ROW)
    assert applied(select_early, model, {"x": X, "m": SEEN}, 1e-6) == count


def test_choices_from_one_tensor_have_names_of_their_own():
    text = """g (float[2,5,8] x) => (float[2,8] y, float[2,8] z, float[2,8] u) {
        n = LayerNormalization(x, scale)  a = Gelu(n)  b = Tanh(n)  c = Relu(n)
        y = Gather<axis = 1>(a, place)  z = Gather<axis = 1>(b, other)  u = Gather<axis = 1>(c, place)
    }"""
    model = graph(text, ROW | {"other": np.int64(2)})
    assert applied(select_early, model, {"x": X}, 1e-6) == 3


def test_a_name_that_is_taken_is_not_used():
    text = """g (float[2,5,8] x) => (float[2,8] y, int64[1] k) {
        a = Relu(x)  y = Gather<axis = 1>(a, place)  k = Neg(y_place)
    }"""
    model = graph(text.replace("y_place", "taken"), {"place": np.int64(1), "taken": np.asarray([3])})
    model.graph.initializers["taken"].name = "y.place"
    assert applied(select_early, model, {"x": X}) == 1


@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8), (5, 1)], ids=str)
def test_a_norm_with_a_scale_for_each_row_stays(shape: tuple[int, ...]):
    text = "g (float[2,5,8] x) => (float[2,8] y) { a = LayerNormalization(x, scale)  y = Gather<axis = 1>(a, place) }"
    model = graph(text, ROW | {"scale": RANDOM.normal(size=shape).astype(np.float32)})
    assert applied(select_early, model, {"x": X}) == 0


def test_what_a_caller_may_give_is_no_constant():
    text = """g (float[2,5,8] x, float[8] b, int64 i) => (float[2,8] y) {
        a = Add(x, b)  c = Add(a, b)  y = Gather<axis = 1>(c, i)
    }"""
    model = graph(text, {})
    for value, content in zip(model.graph.inputs[1:], (ZEROS, np.int64(0)), strict=True):
        value.const_value = ir.tensor(np.asarray(content), name=value.name)
        model.graph.register_initializer(value)
    given = {"x": X, "b": ZEROS + 1, "i": np.asarray(3)}
    counts = [applied(rewrite, model, given) for rewrite in (drop_uniform, carry_addends, select_early)]
    assert counts == [0, 0, 0]


def test_queries_of_unknown_shape_stay():
    text = """g (float[2,5,8] x, int64[three] sizes) => (float[2,8] y) {
        q = Reshape(x, sizes)  a = Attention<q_num_heads = 2, kv_num_heads = 2>(q, x, x)  y = Gather<axis = 1>(a, place)
    }"""
    model = graph(text, {"place": np.int64(1)})
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.inputs[0].shape = None
    attention.outputs[0].shape = ir.Shape([2, 5, 8])
    assert applied(select_early, model, {"x": X, "sizes": np.asarray([2, 5, 8])}) == 0


def test_a_row_is_rounded_alone_by_one_scale_and_not_by_its_own():
    text = """g (float[2,5,8] x) => (float[2,8] y) {
        q = QuantizeLinear<axis = 1>(x, s, z)  d = DequantizeLinear<axis = 1>(q, s, z)  y = Gather<axis = 1>(d, place)
    }"""
    one: Arrays = {"s": np.float32(0.03), "z": np.uint8(117), "place": np.int64(1)}
    assert applied(select_early, graph(text, one), {"x": X}) == 2
    rows: Arrays = {"s": np.full(5, 0.03, np.float32), "z": np.full(5, 117, np.uint8), "place": np.int64(1)}
    assert applied(select_early, graph(text, rows), {"x": X}) == 0


def test_a_product_of_the_row_that_is_read_stays_one_of_integers():
    text = """g (float[2,5,8] x) => (float[2,8] y, float[2,5,8] k, float[2,5,8] twice) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
        dw = DequantizeLinear(w, ws)  k = MatMul(d, dw)
        twice = DequantizeLinear(q, two, z)  mq = MatMul(d, dw)  sum = Add(mq, twice)  y = Gather<axis = 1>(sum, place)
    }"""
    grid: Arrays = {
        "s": np.float32(0.03),
        "z": np.uint8(117),
        "two": np.float32(0.06),
        "ws": np.float32(0.02),
        "place": np.int64(1),
    }
    model = graph(text, grid | {"w": RANDOM.integers(-127, 128, (8, 8)).astype(np.int8)})
    assert applied(select_early, model, {"x": X}, 1e-6) == 2
    assert applied(use_integer_matmuls, model, {"x": X}, 1e-6) == 2
