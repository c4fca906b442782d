"""What is known of the sizes of tensors in an ONNX graph."""

from __future__ import annotations

import onnx_ir as ir


def rank(value: ir.Value | None) -> int:
    """The number of axes, or -1 where it is not known."""
    return -1 if value is None or value.shape is None else len(value.shape)


def size(value: ir.Value | None, axis: int) -> int | str | None:
    """The size along `axis`: a number, the name of one that differs between calls, or None where it is not known."""
    if value is None or value.shape is None:
        return None
    found = value.shape[axis]
    return found if isinstance(found, int) else found.value


def same_shape(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether two tensors have the same sizes, all of them known."""
    axes = range(rank(left))
    return rank(left) == rank(right) >= 0 and all(
        (found := size(left, axis)) is not None and found == size(right, axis) for axis in axes
    )
