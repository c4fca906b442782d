"""The TensorRT target: engines of both editions, from one code path."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from compress.artifacts import save_artifact
from compress.errors import Unsuitable
from compress.progress import SILENT, Observer, task
from compress.target import Artifact, File, Runner, Target, sha256

if TYPE_CHECKING:
    from compress.model import Model
    from export.tensorrt_engine import Parsed
    from export.tensorrt_record import Record


_FACTS = ("version", "compute_capability", "profile", "products", "attentions", "build_seconds", "warnings")
"""Those entries of engine.json that an artifact repeats as its facts."""


class TensorRT(Target):
    """TensorRT engines. Inputs and outputs keep the types of the module; what is inside has the `precision`.

    The rtx edition builds for the GPUs named by `compute_capability` and needs no GPU for it; the datacenter
    edition builds for the GPU of the machine that it runs on. A causal language model becomes one graph over
    its whole input, without a key-value cache.
    """

    use: Literal["tensorrt"] = "tensorrt"
    edition: Literal["rtx", "datacenter"] = "rtx"
    precision: Literal["float32", "float16", "int8"] = "int8"
    """int8 takes a model that `quantize` has been applied to, and computes the rest of it in float16."""
    compute_capability: tuple[str, ...] = ()
    """GPUs that the rtx edition builds for, such as "8.6" and "8.9": one engine file runs on all of them."""
    shapes: dict[str, tuple[int, int, int]] = Field(default={})
    """Smallest, usual and largest size of every dynamic dimension, such as {batch: [1, 8, 32]}."""

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _accept_numbers(cls, value: Any) -> Any:
        """Read 8.6, which YAML takes for a number, as "8.6"."""
        if not isinstance(value, list | tuple):
            return value
        return tuple(str(one) if isinstance(one, float) else one for one in value)

    @field_validator("compute_capability")
    @classmethod
    def _require_form(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if not re.fullmatch(r"\d+\.\d", one):
                raise ValueError(f'"{one}" is no compute capability; they look like "8.6" or "12.0"')
        if len(set(value)) < len(value):
            raise ValueError(f"a compute capability is given twice in {', '.join(value)}")
        return value

    @field_validator("shapes")
    @classmethod
    def _require_order(cls, value: dict[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        for name, (low, usual, high) in value.items():
            if not 1 <= low <= usual <= high:
                raise ValueError(f"`{name}` is [{low}, {usual}, {high}], but must be 1 <= min <= opt <= max")
        return value

    @model_validator(mode="after")
    def _require_capability(self) -> TensorRT:
        if self.edition == "rtx" and not self.compute_capability:
            raise ValueError('edition rtx needs compute_capability, for example ["8.6", "8.9"]')
        if self.edition == "datacenter" and self.compute_capability:
            raise ValueError(
                "edition datacenter builds for the GPU of this machine: leave compute_capability out"
            )
        return self

    def check(self, model: Model) -> None:
        """Raise `MissingPackage`, `UsageError` or `Unsuitable` for what can be known before any work is
        done.
        """
        from export.tensorrt_edition import gpu_capability, import_edition, require_offered

        del model
        trt = import_edition(self.edition)
        if self.edition == "rtx":
            require_offered(trt, self.compute_capability)
        elif gpu_capability() is None:
            raise Unsuitable(
                "The datacenter edition of TensorRT builds for the GPU of this machine, which has none.",
                "Export where that GPU is, or use edition: rtx with compute_capability, which needs no GPU.",
            )

    def baseline(self) -> TensorRT:
        """The same engine without the quantization: int8 engines compute their float parts in float16."""
        return self.model_copy(update={"precision": "float16"}) if self.precision == "int8" else self

    def write(self, model: Model, into: Path, observer: Observer = SILENT) -> Artifact:
        """Write `model.engine`, `engine.json` and the proved graph `onnx/model.onnx` into `into`, an empty or new
        folder.

        Raises `Unsuitable` if the precision does not fit the model or TensorRT cannot read the graph,
        `UsageError` if the shapes do not fit it, and `Unproved` if the graph is wrong or TensorRT does not
        see int8 where it must.
        """
        from export.tensorrt_engine import parse
        from export.tensorrt_network import products, require_int8
        from export.tensorrt_source import FILE, quantized_products, write_source

        self.check(model)
        self._require_fitting_precision(model)
        into = Path(into)
        into.mkdir(parents=True, exist_ok=True)
        source = write_source(model, into / "onnx", self.precision, self.shapes, observer)
        with task(observer, "Building the TensorRT engine"):
            parsed = parse(self.edition, source.folder / FILE)
            require_int8(products(parsed.trt, parsed.network), quantized_products(model.module))
            record = self._build(model, parsed, source, into)
        return self._artifact(record, source, into)

    def load(self, artifact: Artifact) -> Runner:
        """Open the engine on this machine's GPU. Raises `Unsuitable` if it is none that the engine was
        built for.
        """
        from export.tensorrt_run import Engine

        return Engine(artifact.folder)

    def _require_fitting_precision(self, model: Model) -> None:
        from compress.layers.quantized import is_quantized

        if self.precision == "int8" and not is_quantized(model.module):
            raise Unsuitable(
                "precision: int8 needs a quantized model, and this one has no quantized layer.",
                "Apply the quantize pass first, or export with precision: float16.",
            )
        if self.precision != "int8" and is_quantized(model.module):
            raise Unsuitable(
                f"precision: {self.precision} is for models in float, and this one is quantized.",
                "Export it with precision: int8, or export the model that it was made from.",
            )

    def _build(self, model: Model, parsed: Parsed, source: Artifact, into: Path) -> Record:
        """Write the engine, and engine.json beside it."""
        from export.tensorrt_edition import gpu_capability
        from export.tensorrt_engine import build, profile_of
        from export.tensorrt_network import attentions, products
        from export.tensorrt_record import (
            ENGINE,
            Record,
            count_products,
            describe_profile,
            source_of,
            write_record,
        )

        profile = profile_of(source.inputs, self.shapes)
        started = time.perf_counter()
        plan = build(parsed, profile, self.compute_capability)
        seconds = time.perf_counter() - started
        (into / ENGINE).write_bytes(plan)
        record = Record(
            engine=file_of(into / ENGINE),
            edition=self.edition,
            version=parsed.trt.__version__,
            compute_capability=self.compute_capability or (str(gpu_capability()),),
            precision=self.precision,
            profile=describe_profile(profile),
            inputs=source.inputs,
            outputs=source.outputs,
            products=count_products(products(parsed.trt, parsed.network)),
            attentions=attentions(parsed.network),
            parity=source.parity,
            source=source_of(model, source, into),
            build_seconds=round(seconds, 3),
            warnings=tuple(parsed.log.warnings),
        )
        write_record(record, into)
        return record

    def _artifact(self, record: Record, source: Artifact, into: Path) -> Artifact:
        from dataclasses import asdict

        from export.tensorrt_record import RECORD

        artifact = Artifact(
            folder=into,
            target=self.use,
            settings=self.model_dump(mode="json"),
            files=(record.engine, file_of(into / RECORD)),
            inputs=record.inputs,
            outputs=record.outputs,
            parity=record.parity,
            facts={name: value for name, value in asdict(record).items() if name in _FACTS},
            source=source,
        )
        save_artifact(artifact)
        return artifact


def file_of(path: Path) -> File:
    """A written file by its name, with its size and sha256."""
    return File(path.name, path.stat().st_size, sha256(path))
