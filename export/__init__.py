"""Targets: ONNX files and TensorRT engines."""

from __future__ import annotations

from pathlib import Path

from compress.artifacts import read_artifact
from compress.catalog import find
from compress.target import Runner
from export.to_onnx import Onnx
from export.to_tensorrt import TensorRT

__all__ = ["Onnx", "TensorRT", "load"]


def load(folder: str | Path) -> Runner:
    """Open the exported model in `folder`: a function of the model's forward keyword arguments.

    An ONNX artifact gives an `export.runners.OnnxRunner`, which generates text too. Raises `ModelError` if
    the folder holds no artifact, and `Unsuitable` if what it holds cannot run on this machine.
    """
    artifact = read_artifact(folder)
    target = find("compress.targets", artifact.target)
    return target.model_validate(artifact.settings).load(artifact)
