"""Graft a removed block into its group: the work of `fuse_layers` on one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.depth import remove_blocks
from compress.layers.grafted import GraftedLinear
from compress.layers.linear import is_linear
from compress.layers.quantized import swap
from compress.model import Inputs
from compress.numerics.relations import relative_error
from compress.passes.base import Context
from compress.passes.blocks import Call, run_stack
from compress.passes.calibration import tokens_of
from compress.passes.drop_layers import place_in_container
from compress.progress import track
from compress.training import Trained, autocast, train

if TYPE_CHECKING:
    from compress.passes.fuse_layers import FuseLayers

Grafts = dict[GraftedLinear, nn.Module]
"""The grafted layers of a block, and the layers that they stand in for."""


def fuse(
    module: nn.Module,
    path: str,
    blocks: Sequence[str],
    place: int,
    settings: FuseLayers,
    batches: Sequence[Inputs],
    context: Context,
) -> Trained:
    """Remove the block number `place` of `blocks`, those of the stack `path`, grafted into its group, in place."""
    group = group_around(place, len(blocks), settings.group)
    members = blocks[group.start : group.stop]
    seen = batches[: settings.steps * settings.accumulate]
    with autocast(settings, context):
        lessons = [
            _lesson(module, members, place - group.start, batch, number)
            for number, batch in enumerate(track(context.observer, "fuse_layers: what the group gives", seen))
        ]
    survivors = [module.get_submodule(blocks[at]) for at in group if at != place]
    grafts = _graft(survivors, module.get_submodule(blocks[place]), settings, context.seed)
    log = train(
        nn.ModuleList(survivors),
        [one.batch for one in lessons],
        partial(_group_error, lessons),
        settings,
        context,
        f"fuse_layers: graft {blocks[place]}",
    )
    for block, layers in zip(survivors, grafts, strict=True):
        _fold(block, layers)
    remove_blocks(module, path, [place_in_container(blocks[place])])
    return log


def group_around(place: int, count: int, size: int) -> range:
    """The numbers of `size` neighbours among `count` blocks, with `place` as near to the middle as it can be."""
    size = min(size, count)
    start = min(max(place - size // 2, 0), count - size)
    return range(start, start + size)


def _graft(
    survivors: Sequence[nn.Module], removed: nn.Module, settings: FuseLayers, seed: int
) -> list[Grafts]:
    """Graft the linear maps of `removed` into those of each survivor; of the rest only vectors are trained."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for block in survivors:
        for parameter in block.parameters():
            parameter.requires_grad_(parameter.dim() == 1)
        linears = {path: layer for path, layer in block.named_modules() if is_linear(layer)}
        layers = {
            GraftedLinear(
                layer, [removed.get_submodule(path)], settings.rank, settings.update_rank, generator
            ): layer
            for path, layer in linears.items()
        }
        swap(block, {layer: grafted for grafted, layer in layers.items()})
        found.append(layers)
    return found


def _fold(block: nn.Module, layers: Grafts) -> None:
    """Write what was trained into the block's own layers, and put them back."""
    for grafted, layer in layers.items():
        grafted.fold(layer)
    swap(block, dict[nn.Module, nn.Module](layers))
    block.requires_grad_(True)


@dataclass(frozen=True)
class _Lesson:
    """One batch for a group: `batch` holds the hidden states before it, what the group gives with the removed block,
    and the number of this lesson; `calls` are the other arguments of the survivors.
    """

    batch: dict[str, Tensor]
    calls: tuple[Call, ...]


def _lesson(module: nn.Module, blocks: Sequence[str], place: int, batch: Inputs, number: int) -> _Lesson:
    """What `blocks`, a whole group, give for one batch; the one at `place` is left out of the calls."""
    run = run_stack(module, blocks, batch, number + 1)
    given = {"hidden": run.hidden[0], "wanted": run.last, "number": torch.tensor(number)}
    if (tokens := tokens_of(batch, run.last.shape[:-1])) is not None:
        given["tokens"] = tokens
    return _Lesson(given, tuple(call.bare() for at, call in enumerate(run.calls) if at != place))


def _group_error(lessons: Sequence[_Lesson], group: nn.Module, batch: Inputs) -> Tensor:
    """The squared error of what the group gives, relative to the wanted energy of each token; a scalar."""
    hidden = batch["hidden"]
    for block, call in zip(group.children(), lessons[int(batch["number"])].calls, strict=True):
        hidden = call.run(block, hidden)
    return relative_error(batch["wanted"], hidden, batch.get("tokens"))
