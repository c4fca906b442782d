"""Quantized layers: integer weights, and activation ranges that each target lowers to its own scheme."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Scheme = Literal["asymmetric", "symmetric"]
"""asymmetric: uint8 with a zero point (ONNX Runtime on x86). symmetric: int8, zero point 0 (TensorRT, ARM)."""


class Activation(nn.Module):
    """Fake quantization of one tensor over the calibrated range [`low`, `high`], lowered by `scheme`.

    The range is plain Python floats, kept in the pass's record; `scheme` is set for one export by `lowered`.
    """

    def __init__(self, low: float, high: float, scheme: Scheme = "asymmetric") -> None:
        super().__init__()
        self.low = low
        self.high = high
        self.scheme: Scheme = scheme


@contextmanager
def lowered(module: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Set every `Activation` of `module` to `scheme` inside the block, and back after it."""
    layers = [layer for layer in module.modules() if isinstance(layer, Activation)]
    before = [layer.scheme for layer in layers]
    for layer in layers:
        layer.scheme = scheme
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.scheme = old


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` holds any quantized layer."""
    return any(isinstance(layer, Activation) for layer in module.modules())


