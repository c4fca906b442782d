"""What the ops of a trace do to values: move them, map them one by one, or more. Keyed by aten op names only."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

SAME = frozenset(
    [
        "alias",
        "clone",
        "contiguous",
        "detach",
        "dropout",
        "feature_dropout",
        "alpha_dropout",
        "lift_fresh_copy",
        "lift_fresh",
        "to",
        "_to_copy",
        "type_as",
        "quantize_per_tensor",
        "dequantize_per_tensor",
        "quantize_per_channel",
        "dequantize_per_channel",
        "fake_quantize_per_tensor_affine",
        "fake_quantize_per_channel_affine",
        "float",
        "half",
    ]
)
"""The output holds the values of the first operand at the same places (up to a cast or a rounding)."""

RESHAPES = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "transpose",
        "permute",
        "t",
        "mT",
        "numpy_T",
        "movedim",
        "swapaxes",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "roll",
        "flip",
    ]
)
"""The output holds the values of the first operand, all of them, at other places."""

PICKS = frozenset(
    [
        "slice",
        "narrow",
        "select",
        "split",
        "split_with_sizes",
        "chunk",
        "tensor_split",
        "unbind",
        "getitem",
        "cat",
        "stack",
        "repeat",
        "repeat_interleave",
        "pad",
        "constant_pad_nd",
        "zeros_pad",
        "diagonal",
        "unfold",
    ]
)
"""The output holds some of the values of the operands, or repeats them, or stands them beside others."""

MOVES = SAME | RESHAPES | PICKS

NORMALIZES = frozenset(
    [
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "batch_norm",
        "_native_batch_norm_legit_no_training",
        "group_norm",
        "instance_norm",
    ]
)

ELEMENTWISE = frozenset(
    [
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "true_divide",
        "neg",
        "pow",
        "square",
        "abs",
        "exp",
        "log",
        "tanh",
        "sigmoid",
        "relu",
        "gelu",
        "silu",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "sin",
        "cos",
        "where",
        "masked_fill",
        "maximum",
        "minimum",
        "hardsigmoid",
        "hardswish",
        "softplus",
        "mish",
        "elu",
        "celu",
        "selu",
        "leaky_relu",
        "relu6",
        "log_sigmoid",
        "erf",
        "sign",
        "nan_to_num",
    ]
)
"""Output element i depends on element i of each operand, after broadcasting."""

AVERAGES = frozenset(["mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"])
"""The output holds means of the values of the operand, over some of its axes: what all places share stays."""

REDUCTIONS = frozenset(["mean", "sum", "var", "linalg_vector_norm", "norm", "amax", "amin", "max", "min"])

SHAPE_ONLY = frozenset(
    [
        "_assert_tensor_metadata",
        "_assert_async",
        "_assert_scalar",
        "sym_size",
        "sym_numel",
        "sym_stride",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
    ]
)
"""Ops that read the shape or the dtype of an operand, not its values."""

LIKE = frozenset(["expand_as", "view_as", "reshape_as", "type_as"])
"""Ops that read the values of their first operand, and the shape or the dtype of their second."""

QUOTIENTS = frozenset(["div", "true_divide"])
FACTORS = QUOTIENTS | {"mul"}
CONVOLUTIONS = frozenset(["conv1d", "conv2d", "conv3d", "convolution"])
PRODUCTS = frozenset(["matmul", "bmm", "mm", "baddbmm", "einsum"])
"""Products of two tensors, where neither need be a weight."""

NOT_A_PATH = PRODUCTS | frozenset(
    [
        "scaled_dot_product_attention",
        "softmax",
        "_softmax",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "index",
        "gather",
        "index_select",
        "cumsum",
        "sort",
        "topk",
    ]
)
"""Ops after which a value is no longer one tensor's features, only rescaled, rotated or moved."""


def op(node: Node) -> str:
    """The name of the op of `node` without namespace, overload and the underscore of in-place variants.

    Inputs, parameters and outputs are "placeholder" and "output".
    """
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    name = str(packet).rsplit(".", 1)[-1] if packet is not None else getattr(node.target, "__name__", "")
    return name.strip("_") if name.startswith("__") else name.rstrip("_")


def in_place(node: Node) -> bool:
    """Whether the op of `node` writes into one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def shape(node: Node) -> tuple[int, ...]:
    """The shape of the tensor that `node` makes; () for anything else."""
    value = node.meta.get("val")
    return tuple(int(size) for size in value.shape) if hasattr(value, "shape") else ()


def operand(node: Node, position: int, name: str) -> Any:
    """An argument of `node`, given by position or by `name`, or None."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def readers(node: Node) -> list[Node]:
    """The nodes that read the values of `node`."""
    return [
        user
        for user in node.users
        if op(user) not in SHAPE_ONLY and (op(user) not in LIKE or user.args[0] is node)
    ]


def strip(node: Any) -> Any:
    """`node`, or the node whose values it holds at the same places."""
    while isinstance(node, Node) and op(node) in SAME:
        node = node.args[0]
    return node


def source(node: Any) -> Any:
    """`node`, or the node whose values it holds at any places, all of them."""
    while isinstance(node, Node) and op(node) in SAME | RESHAPES:
        node = node.args[0]
    return node


def ends(constant: Node) -> set[Node]:
    """The nodes that read the values of `constant`, looking through moves."""
    found: set[Node] = set()
    for user in readers(constant):
        found |= ends(user) if op(user) in MOVES else {user}
    return found
