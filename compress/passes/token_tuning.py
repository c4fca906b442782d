"""Which of several layouts of reducers changes a model's answers least, measured on calibration data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from compress.layers.tokens import How, Layout, install, watched
from compress.outputs import forward
from compress.passes.calibration import numbered, tokens_of
from compress.progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.passes.base import Context

BATCHES = 8
"""So many batches of calibration data are looked at."""


def best(module: nn.Module, layouts: Sequence[Layout], how: How, context: Context) -> Layout:
    """The one of `layouts` under which the outputs of `module` on the calibration data are nearest to what they are.

    By the squared error relative to the square, the mean over outputs; padding does not count.
    """
    if len(layouts) == 1:
        return layouts[0]
    batches = [batch for _, batch in islice(numbered(context, "`merge_tokens`"), BATCHES)]
    wanted = [forward(module, batch) for batch in batches]
    errors = []
    for layout in track(context.observer, "schedules", list(layouts)):
        reduced = copy.deepcopy(module)
        install(reduced, layout, how)
        found = (forward(reduced, batch) for batch in batches)
        errors.append(sum(map(_error, wanted, found, batches)))
    return layouts[errors.index(min(errors))]


def drawn(module: nn.Module, layout: Layout, how: How, context: Context) -> dict[int, list[int]]:
    """How many tokens count behind each reduction of `layout`, by its block's number, on the calibration data."""
    reduced = copy.deepcopy(module)
    install(reduced, layout, how)
    counts: dict[int, list[int]] = {}
    for _, batch in islice(numbered(context, "`merge_tokens`"), BATCHES):
        with watched(reduced) as maps:
            forward(reduced, batch)
        for one in maps:
            counts.setdefault(one.number, []).extend(one.alive.sum(1).tolist())
    return counts


def _error(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> float:
    return sum(_relative(value, given[name], batch) for name, value in wanted.items()) / len(wanted)


def _relative(wanted: Tensor, given: Tensor, batch: Mapping[str, Tensor]) -> float:
    kept = tokens_of(batch, wanted.shape[:2]) if wanted.dim() > 2 else None
    if kept is not None:
        wanted, given = wanted[kept], given[kept]
    return float((given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12))
