"""What linear maps and convolutions read from the calibration data, a part of the model after the other.

A pass that changes weights as it goes sees what the changed part of the model gives: parts come in the order in which
the model runs them, and a run over the data ends at the last weight of its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from compress.graph.structure import Graph, Weight
from compress.passes.base import Context
from compress.passes.calibration import Enough, Watch, watch
from compress.passes.moments import Moments

if TYPE_CHECKING:
    from torch import Tensor, nn


def parts(graph: Graph, weights: Sequence[Weight]) -> list[list[Weight]]:
    """`weights`, in order, in parts: those of one block of a stack, and of the others those that read one tensor."""
    blocks = [f"{block}." for stack in graph.stacks for block in stack.blocks]
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        around = [block for block in blocks if weight.path.startswith(block)]
        found.setdefault(min(around, key=len, default=weight.reads), []).append(weight)
    return list(found.values())


def seen_moments(module: nn.Module, context: Context, part: Sequence[Weight], what: str) -> dict[str, Tensor]:
    """The mean of x xᵀ over all rows that each weight of `part` multiplies, (in, in), by path; padding left out.

    Weights that the data does not reach, or gives nothing but zeros, are missing.
    """
    from compress.layers.unfolded import rows

    moments, last = Moments(), part[-1]
    once = not any("|" in one.reads for one in part)
    keys = {one.path: one.reads if one.kind == "linear" else one.path for one in part}
    readers = {key: path for path, key in reversed(keys.items())}

    def see(weight: Weight, _: int, values: Tensor) -> None:
        key = keys[weight.path]
        if readers[key] == weight.path:
            moments.see(key, rows(module.get_submodule(weight.path), values))
        if once and weight is last:
            raise Enough

    watches = {one.path: Watch(partial(see, one), 1 if one.kind == "linear" else None) for one in part}
    watch(module, context, watches, what)
    reached = [path for path, key in keys.items() if key in moments.inputs and moments.inputs[key].any()]
    return {path: moments.mean(keys[path]) for path in reached}
