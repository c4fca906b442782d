"""Where a model's activations are watched for outliers, and what is seen there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from compress.calls import states
from compress.numerics.outliers import Spread
from compress.passes.calibration import run_batch, unpadded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.graph.structure import Graph
    from compress.model import Inputs

What = Literal["residual", "attention output", "feed-forward output", "norm output", "linear input"]


@dataclass(frozen=True)
class Place:
    """An activation: what the module at `path` is given (of `linear input`) or gives."""

    path: str
    what: What


def places(graph: Graph) -> tuple[Place, ...]:
    """Everything that is worth watching, kind by kind, in the order of execution.

    `residual` is the state after a block. A `linear input` is what `quantize` rounds, once if several modules read it.
    """
    found = [Place(block, "residual") for stack in graph.stacks for block in stack.blocks]
    found += [Place(one.output.path, "attention output") for one in graph.attentions if one.output]
    found += [Place(one.down.path, "feed-forward output") for one in graph.mlps]
    found += [Place(one.path, "norm output") for one in graph.norms if one.kind in ("layer", "rms")]
    return tuple(dict.fromkeys((*found, *linear_inputs(graph))))


def linear_inputs(graph: Graph) -> tuple[Place, ...]:
    """What linear maps and convolutions in the body of the model read: the activations that `quantize` rounds."""
    readers = {one.reads: one.path for one in reversed(graph.weights) if one.role == "body"}
    return tuple(Place(path, "linear input") for path in reversed(readers.values()))


@contextmanager
def heard(
    module: nn.Module, wanted: Sequence[Place], hear: Callable[[Place, Tensor], None]
) -> Iterator[None]:
    """Inside the block `hear` is given the activation at each of `wanted` whenever the module runs."""
    with ExitStack() as hooks:
        for place in wanted:
            layer = module.get_submodule(place.path)
            if place.what == "linear input":
                handle = layer.register_forward_pre_hook(_before(place, hear), with_kwargs=True)
            else:
                handle = layer.register_forward_hook(_behind(place, hear))
            hooks.callback(handle.remove)
        yield


def spreads(module: nn.Module, wanted: Sequence[Place], batches: Iterable[Inputs]) -> dict[Place, Spread]:
    """What is seen at each of `wanted` over `batches`, padding left out; places that do not run have no key.

    `module` must be in evaluation mode. Raises `DataError` for batches that it cannot take.
    """
    found: dict[Place, Spread] = {}
    present: Mapping[str, Tensor] = {}

    def hear(place: Place, values: Tensor) -> None:
        kept = unpadded(values, present, 1)
        if kept.numel():
            found.setdefault(place, Spread()).see(kept)

    with torch.no_grad(), heard(module, wanted, hear):
        for number, batch in enumerate(batches, start=1):
            present = batch
            run_batch(module, batch, number)
    return {place: found[place] for place in wanted if place in found}


def _before(place: Place, hear: Callable[[Place, Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hear(place, next(iter((*args, *named.values()))))

    return hook


def _behind(place: Place, hear: Callable[[Place, Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        hear(place, states(output))

    return hook
