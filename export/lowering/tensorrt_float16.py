"""Float16 for a strongly typed network: the float32 tensors of an ONNX graph become float16, but for islands.

TensorRT compiles a strongly typed graph as it is written, so the precision has to be in the graph. Inputs and
outputs of the graph stay float32. What stays float32 inside is found from the graph:

1. Ops that square, sum, or take roots and exponentials (`_SQUARES`, `_SUMS`): the statistics of an RMS norm
   written out as Pow, ReduceMean, Sqrt and Reciprocal overflow above 256 in float16. LayerNormalization,
   Softmax and Attention are not among them: the runtime sums in float32 inside these.
2. Everything that a sine or a cosine is computed from: the angle of a rotary embedding at position 2049
   cannot be told from that at 2048 in float16.
3. Ops that have no float16 form in their ONNX schema.
4. Nodes that lie between such nodes only, so that no cast goes down and up again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from compress.errors import Unsuitable

_SQUARES = frozenset({"Pow", "Sqrt", "Reciprocal", "Exp", "Log"})
_SUMS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "ReduceLogSumExp", "CumSum"})
_ANGLES = frozenset({"Sin", "Cos"})
_LARGEST = 65504.0
"""The largest finite float16."""
_MASK = 32752.0
"""What a finite value beyond float16 becomes: half of the largest, so that the sum of two masks is finite
too.
"""
_SMALLEST = 2.0**-24
"""The smallest positive float16. A quantization scale below it must not become zero."""


def convert_to_float16(model: ir.Model) -> None:
    """Rewrite `model` in place; see the module's docstring.

    Raises `Unsuitable` for a graph with control flow, whose branches this rewrite does not enter.
    """
    common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.ShapeInferencePass()(model)
    graph = model.graph
    _refuse_control_flow(graph)
    kept = _float32_nodes(graph, model.opset_imports)
    _Rewrite(graph, kept, model.opset_imports).run()
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)


def _refuse_control_flow(graph: ir.Graph) -> None:
    for node in graph:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise Unsuitable(
                f"The graph branches (`{node.op_type}` at {node.name}), which cannot be made float16.",
                "Export with precision: float32, or write the forward without branches on values.",
            )


def _float32_nodes(graph: ir.Graph, opsets: dict[str, int]) -> set[ir.Node]:
    kept = {
        node for node in graph if node.op_type in _SQUARES | _SUMS or not _has_float16_outputs(node, opsets)
    }
    for node in graph:
        if node.op_type in _ANGLES:
            kept |= {node, *_float_ancestors(node)}
    return _with_enclosed(graph, kept)


def _float_ancestors(node: ir.Node) -> Iterator[ir.Node]:
    seen: set[ir.Node] = set()
    waiting = [node]
    while waiting:
        for value in waiting.pop().inputs:
            producer = value.producer() if value is not None and _is_float32(value) else None
            if producer is not None and producer not in seen:
                seen.add(producer)
                waiting.append(producer)
                yield producer


def _with_enclosed(graph: ir.Graph, kept: set[ir.Node]) -> set[ir.Node]:
    """Add the nodes that read float32 from kept nodes and constants only, and are read by kept nodes only."""
    while True:
        enclosed = {node for node in graph if node not in kept and _is_enclosed(node, kept)}
        if not enclosed:
            return kept
        kept = kept | enclosed


def _is_enclosed(node: ir.Node, kept: set[ir.Node]) -> bool:
    sources = [
        value
        for value in node.inputs
        if value is not None and _is_float32(value) and not value.is_initializer()
    ]
    readers = [user for value in node.outputs if _is_float32(value) for user, _ in value.uses()]
    return (
        bool(sources)
        and bool(readers)
        and all(value.producer() in kept for value in sources)
        and all(user in kept for user in readers)
    )


def _is_float32(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


def _has_float16_outputs(node: ir.Node, opsets: dict[str, int]) -> bool:
    schema = _schema(node, opsets)
    return all(
        "tensor(float16)" in schema.outputs[min(at, len(schema.outputs) - 1)].types
        for at, value in enumerate(node.outputs)
        if _is_float32(value)
    )


def _takes_float16(node: ir.Node, at: int, opsets: dict[str, int]) -> bool:
    """Whether input `at` may be float16; the scales of a Resize, for one, may not. The last input may be
    variadic.
    """
    inputs = _schema(node, opsets).inputs
    return "tensor(float16)" in inputs[min(at, len(inputs) - 1)].types


def _schema(node: ir.Node, opsets: dict[str, int]) -> onnx.defs.OpSchema:
    return onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)


class _Rewrite:
    """One rewrite of one graph: remembers the casts and the float16 constants that it has made."""

    def __init__(self, graph: ir.Graph, kept: set[ir.Node], opsets: dict[str, int]) -> None:
        self.graph = graph
        self.kept = kept
        self.opsets = opsets
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.halves: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        nodes = list(self.graph)
        wanted = [
            (node, at, value, self._wants(node, at)) for node in nodes for at, value in _float32_inputs(node)
        ]
        outputs = {
            value for value in self.graph.outputs if _is_float32(value) and value.producer() not in self.kept
        }
        for node in nodes:
            if node not in self.kept:
                self._retype(node)
        for node, at, value, dtype in wanted:
            node.replace_input_with(at, self._as(value, dtype))
        for value in outputs:
            self._restore_output(value)

    def _wants(self, node: ir.Node, at: int) -> ir.DataType:
        half = node not in self.kept and _takes_float16(node, at, self.opsets)
        return ir.DataType.FLOAT16 if half else ir.DataType.FLOAT

    def _retype(self, node: ir.Node) -> None:
        for value in node.outputs:
            if _is_float32(value):
                value.dtype = ir.DataType.FLOAT16
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype", "output_dtype"):
                if attribute.as_int() == ir.DataType.FLOAT:
                    node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
            elif (
                attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT
            ):
                node.attributes[name] = ir.AttrTensor(
                    name, ir.tensor(to_float16(attribute.as_tensor().numpy()))
                )

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` (already retyped) as a tensor of `dtype`."""
        if value.dtype == dtype:
            return value
        return self._half_constant(value) if value.is_initializer() else self._cast(value, dtype)

    def _half_constant(self, value: ir.Value) -> ir.Value:
        if value not in self.halves:
            is_scale = any(
                user.op_type in ("QuantizeLinear", "DequantizeLinear") and at == 1
                for user, at in value.uses()
            )
            array = to_float16(_array(value), smallest=_SMALLEST if is_scale else 0.0)
            half = ir.val(f"{value.name}.float16", const_value=ir.tensor(array, name=f"{value.name}.float16"))
            self.graph.register_initializer(half)
            self.halves[value] = half
        return self.halves[value]

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self.casts:
            node = ir.node(
                "Cast", [value], attributes={"to": dtype}, name=f"cast_{value.name}_{dtype.name.lower()}"
            )
            result = node.outputs[0]
            result.name, result.dtype, result.shape = f"{value.name}.{dtype.name.lower()}", dtype, value.shape
            self.graph.append(node)
            self.casts[value, dtype] = result
        return self.casts[value, dtype]

    def _restore_output(self, value: ir.Value) -> None:
        name = value.name
        result = self._cast(value, ir.DataType.FLOAT)
        value.name, result.name = f"{name}.float16", name
        for at, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[at] = result


def _float32_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value]]:
    return ((at, value) for at, value in enumerate(node.inputs) if value is not None and _is_float32(value))


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None  # an initializer of a main graph always has its value
    return value.const_value.numpy()


def to_float16(array: np.ndarray, smallest: float = 0.0) -> np.ndarray:
    """`array` in float16: infinities stay, finite values beyond 65504 become 32752 of their sign.

    `smallest` is the least result for values above zero; those that round to less get it.
    """
    beyond = np.isfinite(array) & (np.abs(array) > _LARGEST)
    limited = np.where(beyond, np.copysign(_MASK, array), array)
    return np.where(array > 0, np.maximum(limited, smallest), limited).astype(np.float16)
