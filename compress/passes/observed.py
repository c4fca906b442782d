"""The range of every watched input, from one or two runs over the calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from compress.errors import DataError
from compress.passes.base import Context
from compress.passes.calibration import Watch, watch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.numerics.ranges import Range


@dataclass(frozen=True)
class Input:
    """One positional input of a module. Inputs of the same `group` hold the same values, and share a range.

    `sequence` is the dimension that runs over the sequence, or None.
    """

    path: str
    index: int
    group: str
    sequence: int | None


Narrow = Callable[["Tensor", "Range"], "Range"]
"""From the counts of a histogram and the full range that it covers to the range to use."""


def observed(
    module: nn.Module, context: Context, inputs: Sequence[Input], narrow: Narrow | None
) -> dict[Input, Range]:
    """The range of each of `inputs` that calibration reaches; the others have no key.

    Without `narrow` the full range; with it, a second run fills histograms over the full ranges, so that
    memory stays bounded. Raises what `watch` raises, and `DataError` if an input is zero throughout.
    """
    full: dict[Input, Range] = {}
    _run(module, context, inputs, "quantize: ranges", partial(_widen, full))
    shared = _shared(full)
    if narrow is None:
        return {one: shared[one.group] for one in full}
    first = {one.group: one for one in reversed(full)}
    counts: dict[Input, Tensor] = {}
    _run(module, context, list(first.values()), "quantize: histograms", partial(_count, counts, shared))
    narrowed = {group: narrow(counts[one], shared[group]) for group, one in first.items()}
    return {one: narrowed[one.group] for one in full}


def _run(
    module: nn.Module,
    context: Context,
    inputs: Sequence[Input],
    what: str,
    see: Callable[[Input, Tensor], None],
) -> None:
    """Show `see` the values of `inputs`, batch by batch, as the layers' weights meet them."""
    from compress.layers.linear import prescaled

    known: dict[str, dict[int, Input]] = {}
    for one in inputs:
        known.setdefault(one.path, {})[one.index] = one

    def dispatch(path: str, index: int, values: Tensor) -> None:
        if index in known[path]:
            see(known[path][index], prescaled(module.get_submodule(path), values))

    watches = {
        path: Watch(partial(dispatch, path), next(iter(of_path.values())).sequence)
        for path, of_path in known.items()
    }
    watch(module, context, watches, what)


def _widen(full: dict[Input, Range], one: Input, values: Tensor) -> None:
    from compress.numerics.ranges import minmax

    seen = minmax(values)
    full[one] = full[one].union(seen) if one in full else seen


def _count(counts: dict[Input, Tensor], shared: Mapping[str, Range], one: Input, values: Tensor) -> None:
    from compress.numerics.ranges import histogram

    seen = histogram(values, shared[one.group])
    counts[one] = counts[one] + seen if one in counts else seen


def _shared(full: Mapping[Input, Range]) -> dict[str, Range]:
    """The union of the ranges of each group."""
    shared: dict[str, Range] = {}
    for one, seen in full.items():
        shared[one.group] = shared[one.group].union(seen) if one.group in shared else seen
        if shared[one.group].low == shared[one.group].high == 0:
            raise DataError(
                f"The input of `{one.path}` is zero in every calibration batch, so that it has no range.",
                f'Give data that reaches it, or leave it out: `scope: {{exclude: ["{one.path}"]}}`.',
            )
    return shared
