"""Tensors that hold one number everywhere, whatever their sizes, and what becomes plain because of them.

Models make masks even where there is nothing to mask: a True is expanded to the size of the scores, negated and scaled,
added in every attention, and a guard behind each attention looks for queries without keys. The sizes are only known
when the model runs, so no constant folding of a runtime sees that all of it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common

from export.lowering.attention import MASK, mask_of
from export.lowering.constants import array
from export.lowering.shapes import same_shape, size

_MOVES = frozenset({"Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that give the elements of their first input."""
_ARITHMETIC = frozenset({"Add", "Cast", "Div", "Mul", "Neg", "Sub"})
_CHOICES = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Where"}
)
_FOLLOWED = frozenset(map(np.dtype, ("bool", "float16", "float32", "float64", "int32", "int64")))
"""Types of numbers that numpy computes with as runtimes do."""
_NEUTRAL = {"Add": 0, "Mul": 1, "And": True, "Or": False}
_NEUTRAL_RIGHT = {**_NEUTRAL, "Sub": 0, "Div": 1}

Numbers = Mapping[ir.Value, np.ndarray]


def drop_uniform(model: ir.Model) -> int:
    """Take out what the number that a tensor holds everywhere makes plain, in place. Returns how often.

    That is a choice by it, adding zero, multiplying by one, and a mask of an attention that adds zero to every score or
    keeps all of them. (Adding another number to all would be the same but for rounding, which for the large numbers
    of masks is all that is left.)
    """
    numbers = _numbers(model.graph)
    dropped = sum(_drop(node, numbers) for node in list(model.graph))
    if dropped:
        common.RemoveUnusedNodesPass()(model)
    return dropped


def _numbers(graph: ir.Graph) -> dict[ir.Value, np.ndarray]:
    """The number, as an array of no axes, in each value that holds one number everywhere."""
    found: dict[ir.Value, np.ndarray] = {}
    for value in graph.initializers.values():
        if (number := _everywhere(value)) is not None:
            found[value] = number
    for node in graph:
        if node.domain == "" and len(node.outputs) == 1 and (number := _computed(node, found)) is not None:
            found[node.outputs[0]] = number
    return found


def _everywhere(value: ir.Value | None) -> np.ndarray | None:
    content = array(value)
    if content is None or not content.size or content.dtype not in _FOLLOWED:
        return None
    first, last = content.flat[0], content.flat[-1]  # most weights are told by these, without a copy
    return np.asarray(first) if last == first and (content == first).all() else None


def _computed(node: ir.Node, numbers: Numbers) -> np.ndarray | None:
    """The number that `node` gives everywhere, or None."""
    if node.op_type == "Constant":
        return _everywhere(node.outputs[0])
    if node.op_type in _MOVES:
        return numbers.get(node.inputs[0]) if node.inputs[0] is not None else None
    if node.op_type == "ReduceSum":
        return _summed(node, numbers)
    if node.op_type not in _ARITHMETIC | _CHOICES:
        return None
    given = [numbers.get(value) if value is not None else None for value in node.inputs]
    if any(number is None for number in given):
        return None
    named = {
        str(value.name): number for value, number in zip(node.inputs, given, strict=True) if value is not None
    }
    with np.errstate(all="ignore"):
        (result,) = ReferenceEvaluator(ir.to_proto(node)).run(None, named)
    return np.asarray(result) if np.asarray(result).dtype in _FOLLOWED else None


def _summed(node: ir.Node, numbers: Numbers) -> np.ndarray | None:
    """A sum of equal floats over given axes of known size."""
    values, axes = node.inputs[0], array(node.inputs[1]) if len(node.inputs) > 1 else None
    if (
        values is None
        or axes is None
        or not axes.size
        or values not in numbers
        or numbers[values].dtype.kind != "f"
    ):
        return None
    sizes = [size(values, int(axis)) for axis in axes]
    if not all(isinstance(one, int) for one in sizes):
        return None
    number = numbers[values]
    return np.asarray(number * math.prod(map(int, sizes)), number.dtype)  # type: ignore[arg-type]


def _drop(node: ir.Node, numbers: Numbers) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Attention":
        return _drop_mask(node, numbers)
    kept = _chosen(node, numbers) if node.op_type == "Where" else _unchanged(node, numbers)
    result = node.outputs[0]
    if kept is None or result.is_graph_output() or not same_shape(kept, result):
        return False  # with another shape, its other operand spreads it over more rows
    ir.convenience.replace_all_uses_with(result, kept)
    return True


def _drop_mask(attention: ir.Node, numbers: Numbers) -> bool:
    mask = mask_of(attention)
    number = None if mask is None else numbers.get(mask)
    if number is None or number != (number.dtype == np.bool_):  # True keeps a score, and 0 adds nothing to it
        return False
    attention.replace_input_with(MASK, None)
    if len(attention.inputs) == MASK + 1:
        attention.resize_inputs(MASK)
    return True


def _chosen(where: ir.Node, numbers: Numbers) -> ir.Value | None:
    condition, chosen, other = where.inputs
    number = None if condition is None else numbers.get(condition)
    return None if number is None else chosen if number else other


def _unchanged(node: ir.Node, numbers: Numbers) -> ir.Value | None:
    """The operand of `node` that its other operand leaves as it is."""
    if node.op_type not in _NEUTRAL_RIGHT or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if right in numbers and numbers[right] == _NEUTRAL_RIGHT[node.op_type]:
        return left
    if left in numbers and node.op_type in _NEUTRAL and numbers[left] == _NEUTRAL[node.op_type]:
        return right
    return None
