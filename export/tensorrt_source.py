"""The ONNX graph that an engine is built from: exported, brought into TensorRT's form, and proved on the CPU.

An engine can be built where it cannot run, so the proof is made on the graph (see `export.proof`):
in float32 first, where nothing but the lowering can be wrong, and then again in the precision that is asked
for.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from torch import nn

from compress.layers.coded import unpacked_copy
from compress.layers.products import Products
from compress.layers.quantized import QuantizedWeight, is_quantized
from compress.model import Inputs, Model
from compress.progress import Observer, task
from compress.target import Artifact, files_of
from export.graph import export_graph
from export.lowering.tensorrt_float16 import convert_to_float16
from export.lowering.tensorrt_int8 import lower_tensorrt
from export.proof import Call, Floats, Proof, cases_of, prove
from export.runners import as_written
from export.tensorrt_engine import Shapes, dynamic_dimensions, require_shapes
from export.to_onnx import specs

Precision = Literal["float32", "float16", "int8"]

OPSET = 23
"""The first with `Attention`, which TensorRT's parser keeps as one op, and with float16 `QuantizeLinear`."""

FILE = "model.onnx"


def quantized_products(module: nn.Module) -> int:
    """How many products of `module` have integer operands: one a quantized layer, two an attention."""
    layers = sum(isinstance(part, QuantizedWeight) for part in module.modules())
    attentions = sum(isinstance(part, Products) and is_quantized(part) for part in module.modules())
    return layers + 2 * attentions


def write_source(
    model: Model, folder: Path, precision: Precision, shapes: Shapes, observer: Observer
) -> Artifact:
    """Write `model` as a proved ONNX graph in TensorRT's form into the new folder `folder`.

    int8 keeps the quantized products in int8 and everything else in float16. Raises `UsageError` if `shapes`
    does not fit the graph, and `Unproved` if the graph does not compute what the module does.
    """
    with task(observer, "Exporting to ONNX"):
        # Its parser has no operators for bits, and an engine holds what they unpack to anyway.
        plain = replace(model, module=unpacked_copy(model.module))
        graph = export_graph(plain, opset=OPSET, scheme="symmetric").program
        rewrites = lower_tensorrt(graph)
        inputs, outputs = specs(graph.graph.inputs), specs(graph.graph.outputs)
        require_shapes(shapes, dynamic_dimensions(inputs))
        folder.mkdir()
    with task(observer, "Proving the ONNX graph"):
        cases = cases_of(model.example, inputs)
        proofs = [_save_and_prove(graph, folder / FILE, model, cases, "float32")]
        if precision != "float32":
            convert_to_float16(graph)
            proofs.append(_save_and_prove(graph, folder / FILE, model, cases, "float16"))
    return Artifact(
        folder=folder,
        target="onnx",
        settings={"precision": precision, "scheme": "symmetric"},
        files=files_of(folder),
        inputs=inputs,
        outputs=outputs,
        parity=proofs[-1].parity,
        facts={"opset": OPSET, "rewrites": rewrites, "proofs": [asdict(proof) for proof in proofs]},
    )


def _save_and_prove(
    graph: ir.Model, path: Path, model: Model, cases: tuple[Inputs, ...], floats: Floats
) -> Proof:
    ir.save(graph, path, external_data=f"{FILE}.data")
    return prove(path, model.module, cases, "symmetric", floats, written_call)


def written_call(onnx: Path) -> tuple[Call]:
    """The way to run the graph in the file `onnx`: as it is written, in ONNX Runtime."""
    session = as_written(onnx)
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]

    def call(inputs: Inputs) -> dict[str, torch.Tensor]:
        arrays = session.run(names, {name: value.numpy() for name, value in inputs.items() if name in wanted})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return (call,)
