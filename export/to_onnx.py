"""The ONNX target: one file for ONNX Runtime, with dynamic sizes, proved against the module."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from compress.artifacts import save_artifact
from compress.progress import SILENT, Observer, task
from compress.target import Artifact, Runner, Target, TensorSpec, files_of
from compress.timing import Variant

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers.exporters import ExportedModel

    from compress.model import Model


class Onnx(Target):
    """ONNX for ONNX Runtime, with external weights, dynamic batch and sequence, and the cache of a causal LM."""

    use: Literal["onnx"] = "onnx"
    runtime: Literal["cpu", "standard"] = "cpu"
    """`cpu` is shaped for ONNX Runtime's x86 kernels and uses its own operators for integer products.
    `standard` keeps to the operators of the ONNX standard, for other runtimes: integer products are in Q/DQ
    form.
    """
    opset: int = Field(default=23, ge=18, le=23)
    """Version of the ONNX operators. From 23 on, an attention is one operator."""

    def write(self, model: Model, into: Path, observer: Observer = SILENT) -> Artifact:
        """Write `model.onnx`, its weights, configs and tokenizer into the empty or new folder `into`, and
        prove them.

        Raises `Unsuitable` if the module cannot be exported, and `Unproved` if the graph does not compute
        what the module does.
        """
        into = Path(into)
        into.mkdir(parents=True, exist_ok=True)
        inputs, outputs, facts = self._write_graph(model, into, observer)
        with task(observer, "Proving the ONNX graph"):
            from export.proof import cases_of, prove
            from export.runners import GRAPH, calls

            cases = cases_of(model.example, inputs)
            proof = prove(into / GRAPH, model.module, cases, "asymmetric", "float32", calls)
        artifact = Artifact(
            folder=into,
            target=self.use,
            settings=self.model_dump(mode="json"),
            files=files_of(into),
            inputs=inputs,
            outputs=outputs,
            parity=proof.parity,
            facts={**facts, "proof": asdict(proof)},
        )
        save_artifact(artifact)
        return artifact

    def load(self, artifact: Artifact) -> Runner:
        """Open a written artifact in ONNX Runtime."""
        from export.runners import OnnxRunner

        return OnnxRunner(artifact.folder)

    def variant(self, artifact: Artifact, name: str, inputs: Path) -> Variant:
        """How to time `artifact` on the tensors in the safetensors file `inputs`."""
        return timed(artifact.folder, name, inputs)

    def _write_graph(
        self, model: Model, into: Path, observer: Observer
    ) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], dict[str, Any]]:
        """Export, lower and save. The graph's weights are gone from memory when this returns."""
        from export.graph import export_graph, generates
        from export.lowering.cpu import lower_cpu, lower_standard

        with task(observer, "Exporting to ONNX"):
            exported = export_graph(model, opset=self.opset, scheme="asymmetric", cache=generates(model))
            graph = exported.program.graph
        with task(observer, "Lowering the ONNX graph"):
            lower = lower_cpu if self.runtime == "cpu" else lower_standard
            rewrites = lower(exported.program)
        save(exported, model, into)
        facts = {"opset": self.opset, "nodes": graph.num_nodes(), "rewrites": rewrites}
        return specs(graph.inputs), specs(graph.outputs), facts


def timed(folder: Path, name: str, inputs: Path) -> Variant:
    """How to time the graph in `folder` in ONNX Runtime on the tensors in the safetensors file `inputs`."""
    return Variant(name, "export.runners:timed_call", {"folder": str(folder), "inputs": str(inputs)})


def save(exported: ExportedModel, model: Model, into: Path) -> None:
    """Write the graph, its metadata, and the configs and processor that a deployment needs beside it."""
    exported.generation_config = getattr(model.module, "generation_config", None)
    exported.save_pretrained(into)
    if model.processor is not None:
        model.processor.save_pretrained(into)


def specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Name, dtype and shape of graph inputs or outputs."""
    return tuple(
        TensorSpec(
            str(value.name),
            "" if value.dtype is None else str(value.dtype.numpy()),
            tuple(size if isinstance(size, int) else str(size) for size in value.shape or ()),
        )
        for value in values
    )
