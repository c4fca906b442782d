"""engine.json: what an engine is, beside the engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.model import Model
from compress.report import Parity
from compress.target import Artifact, File, TensorSpec
from export.tensorrt_edition import Edition
from export.tensorrt_engine import Profile
from export.tensorrt_network import Product

ENGINE = "model.engine"
RECORD = "engine.json"


@dataclass(frozen=True)
class Source:
    """The model, and the files of the ONNX graph that the engine was built from, by their paths from its
    folder.
    """

    model: str
    files: tuple[File, ...]


@dataclass(frozen=True)
class Record:
    """The content of engine.json.

    `compute_capability` lists the GPUs that this one engine file runs on. `profile` gives the smallest, usual
    and largest shape of each dynamic input. `products` counts matrix products and convolutions by what
    TensorRT's parsed network feeds them ("int8": both operands are integers; "float16 x int8": the left one
    is not). `parity` is the ONNX graph, in the engine's precision, against the module.
    """

    engine: File
    edition: Edition
    version: str
    compute_capability: tuple[str, ...]
    precision: str
    profile: dict[str, dict[str, tuple[int, ...]]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    products: dict[str, int]
    attentions: int
    parity: Parity
    source: Source
    build_seconds: float
    warnings: tuple[str, ...]


def write_record(record: Record, folder: Path) -> None:
    """Write engine.json into `folder`."""
    (folder / RECORD).write_text(json.dumps(asdict(record), indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The content of engine.json in `folder`. Raises `ModelError` if there is none, or it is not JSON."""
    path = folder / RECORD
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Export the engine again.") from error


def count_products(products: tuple[Product, ...]) -> dict[str, int]:
    """How many products take which operands, the most frequent first."""
    kinds = [one.left if one.left == one.right else f"{one.left} x {one.right}" for one in products]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds), key=lambda kind: -kinds.count(kind))}


def describe_profile(profile: Profile) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each dynamic input by `min`, `opt` and `max`."""
    return {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in profile.items()}


def source_of(model: Model, graph: Artifact, folder: Path) -> Source:
    """The model's name, and the files of its ONNX graph by their paths from `folder`."""
    below = graph.folder.relative_to(folder)
    files = tuple(replace(file, name=str(below / file.name)) for file in graph.files)
    return Source(model.source or type(model.module).__name__, files)
