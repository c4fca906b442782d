"""Prove on the CPU that an ONNX graph computes what its module does, rounding to integers included.

ONNX Runtime computes the graph as it is written, op by op. A graph in float must agree with its module to a
fixed bound. A quantized one cannot be held to one: where a value lies between two integers, the last bit of a
sum decides, and one layer's flipped integers flip those of the next. So it is proved twice:

1. with the rounding of activations taken out of both, to the fixed bound: the same weights, in the same
   places;
2. with the rounding, padding left out, to a small multiple of what the module differs from itself by when the
   last bits of what it rounds are noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from compress.compare import forward, parity, require_finite, worst
from compress.errors import Unproved
from compress.layers.quantized import Activation, is_quantized, lowered
from compress.model import Inputs
from compress.report import Parity
from export.proof import attended

Floats = Literal["float32", "float16"]

TOLERANCE: Mapping[Floats, float] = {"float32": 1e-4, "float16": 0.02}
"""Largest `Parity.relative` of a graph without rounding to integers, by the type of its float tensors."""

LAST_BIT: Mapping[Floats, float] = {"float32": 2.0**-22, "float16": 2.0**-10}
"""Noise on what is rounded to integers, relative to the tensor's largest value: the last bits of a sum."""

ROUNDING_TOLERANCE = 0.02
"""Added to the noise of a quantized module: in a small one, no integer may have flipped under the noise."""

NOISE_FACTOR = 2.0
"""How many times the module's own distance under noise a quantized graph may be off."""


Rounding = Callable[[torch.Tensor, Activation], torch.Tensor]


@dataclass(frozen=True)
class Proof:
    """How far the graph is from the module, and for a quantized one the two figures of the module's
    docstring.
    """

    floats: Floats
    parity: Parity
    without_rounding: Parity | None = None
    noise: Parity | None = None


def prove(onnx: Path, module: nn.Module, cases: tuple[Inputs, ...], floats: Floats) -> Proof:
    """Compare the graph in the file `onnx` with `module`, in the symmetric scheme, on every one of `cases`.

    Raises `Unproved` with the distance and the bound if the graph is too far off.
    """
    with lowered(module, "symmetric"):
        references = [forward(module, inputs) for inputs in cases]
        for reference in references:
            require_finite(reference, "module")
        found = _distance(onnx, cases, references)
        if not is_quantized(module):
            _require(found, TOLERANCE[floats], "")
            return Proof(floats, found)
        plain = _without_rounding(onnx, module, cases)
        _require(plain, TOLERANCE[floats], ", both without the rounding to integers")
        noise = _noise(module, cases, references, LAST_BIT[floats])
        _require(found, ROUNDING_TOLERANCE + NOISE_FACTOR * noise.relative, "")
        return Proof(floats, found, plain, noise)


def _require(found: Parity, bound: float, where: str) -> None:
    if found.relative > bound:
        raise Unproved(
            f"The graph for TensorRT is {found.relative:.2g} of the largest value off its module{where}; "
            f"allowed is {bound:.2g}.",
            "No engine was built from it. precision: float32 shows whether float16 is the cause.",
        )


def _distance(onnx: Path, cases: tuple[Inputs, ...], references: list[dict[str, torch.Tensor]]) -> Parity:
    session = _session(onnx)
    pairs = zip(cases, references, strict=True)
    return worst(
        parity(attended(reference, inputs), attended(_outputs(session, inputs), inputs), "ONNX graph")
        for inputs, reference in pairs
    )


def _session(onnx: Path) -> onnxruntime.InferenceSession:
    """A session that computes the graph as it is written, with no integer kernels in place of Q/DQ."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(onnx), options, providers=["CPUExecutionProvider"])


def _outputs(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, torch.Tensor]:
    wanted = {value.name for value in session.get_inputs()}
    arrays = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in wanted})
    return {
        value.name: torch.from_numpy(array)
        for value, array in zip(session.get_outputs(), arrays, strict=True)
    }


def _without_rounding(onnx: Path, module: nn.Module, cases: tuple[Inputs, ...]) -> Parity:
    """The distance of graph and module when activations are rounded in neither; weights stay integers."""
    unrounded = onnx.with_stem(f"{onnx.stem}-unrounded")
    model = ir.load(onnx)
    bypass_activations(model.graph)
    ir.save(model, unrounded)  # shares the weights' file with `onnx`
    try:
        with _activations(module, lambda x, _: x):
            return _distance(unrounded, cases, [forward(module, inputs) for inputs in cases])
    finally:
        unrounded.unlink()


def bypass_activations(graph: ir.Graph) -> None:
    """Make whoever reads the DequantizeLinear of a QuantizeLinear read what was quantized instead, in
    place.
    """
    for node in list(graph):
        source = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if source is not None and source.op_type == "QuantizeLinear":
            ir.convenience.replace_all_uses_with(node.outputs[0], source.inputs[0])  # type: ignore[arg-type]


def _noise(
    module: nn.Module, cases: tuple[Inputs, ...], references: list[dict[str, torch.Tensor]], size: float
) -> Parity:
    """How far `module` is from itself with noise, `size` of the largest value, on everything that it
    rounds.
    """
    generator = torch.Generator().manual_seed(0)

    def shake(x: torch.Tensor, layer: Activation) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x.dtype)
        return layer.rounded(x + size * x.abs().max() * noise)

    with _activations(module, shake):
        pairs = zip(cases, references, strict=True)
        return worst(
            parity(attended(reference, inputs), attended(forward(module, inputs), inputs), "module")
            for inputs, reference in pairs
        )


@contextmanager
def _activations(module: nn.Module, replace: Rounding) -> Iterator[None]:
    """Let every `Activation` of `module` give `replace(input, layer)` inside the block."""
    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, Activation):
                hook = layer.register_forward_hook(lambda layer, inputs, _: replace(inputs[0], layer))
                stack.callback(hook.remove)
        yield
