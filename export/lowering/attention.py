"""The inputs of ONNX's operator `Attention`."""

from __future__ import annotations

import onnx_ir as ir

QUERIES, KEYS, VALUES, MASK = range(4)


def mask_of(attention: ir.Node) -> ir.Value | None:
    """What keeps or biases the scores, or None where nothing does."""
    return attention.inputs[MASK] if len(attention.inputs) > MASK else None


def has_cache(attention: ir.Node) -> bool:
    """Whether it takes keys and values of earlier calls, or gives more than its mixture."""
    return len(attention.outputs) > 1 or any(past is not None for past in attention.inputs[MASK + 1 :])
