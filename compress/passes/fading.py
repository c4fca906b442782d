"""Norms that fade into batch norms while a model is taught, and the statistics that these have in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress import processes
from compress.data import spread
from compress.layers.progressive_norm import Fading, ProgressiveNorm, RepBatchNorm
from compress.layers.quantized import swap
from compress.model import Inputs
from compress.numerics.batch_moments import Moments, pooled
from compress.passes.base import Context
from compress.passes.calibration import tokens_of
from compress.passes.taught import Lesson
from compress.progress import track


@contextmanager
def fading_norms(module: nn.Module, norms: Mapping[str, int], alpha: float) -> Iterator[Fading]:
    """`ProgressiveNorm`s in the place of `norms`, which are paths and their features.

    Inside the block they know which positions of a batch are padding. They stay after it: see `settle`.
    """
    fading = Fading(1.0, partial(tokens_of, {}))

    def listen(_: nn.Module, __: tuple[Any, ...], batch: dict[str, Any]) -> None:
        fading.tokens = partial(tokens_of, batch)

    layers: dict[nn.Module, nn.Module] = {}
    home = next(module.parameters())
    for path, features in norms.items():
        norm = module.get_submodule(path)
        batch = RepBatchNorm(features, alpha).to(home)
        layers[norm] = ProgressiveNorm(norm, batch, fading).train(norm.training)
    swap(module, layers)
    hook = module.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield fading
    finally:
        hook.remove()


class Learnt(NamedTuple):
    """`before`, the loss of batch norms that were fitted and not trained; `names` of the parameters that trained; and
    the paths of norms that the loss does not depend on, which are there as before.
    """

    before: float
    names: list[str]
    unreached: list[str]


def teach(module: nn.Module, fading: Fading, lesson: Lesson, decay: float, statistics: int) -> Learnt:
    """Train the whole `module` while its norms fade, and put settled batch norms in their place."""
    steps = lesson.settings.steps
    _fit(module, lesson.batches[0])
    fading.share = 0.0
    before = lesson.mean_loss(module)
    fading.share = 0.5  # the loss depends on the norms that go and on those that come
    names = lesson.reached(module, [name for name, one in module.named_parameters() if one.requires_grad])
    idle = {path: norm for path, norm in _fading(module).items() if f"{path}.batch.weight" not in names}
    swap(module, {norm: norm.norm for norm in idle.values()})
    if _fading(module):

        def fade(step: int) -> None:
            fading.share = max(0.0, 1 - step / (decay * steps)) if decay else 0.0

        lesson.learn(module, names, before_step=fade)
        fading.share = 0.0
        settle(module, lesson.batches, spread(range(len(lesson.batches)), statistics), lesson.context)
    return Learnt(before, names, list(idle))


def settle(module: nn.Module, batches: Sequence[Inputs], chosen: Sequence[int], context: Context) -> None:
    """Put batch norms in the place of norms that have faded, with the statistics of the `chosen` batches together.

    While these are measured, each norm takes those of its batch, as in training. Several processes share the batches,
    and all get the same statistics.
    """
    own: dict[str, dict[int, Moments]] = {path: {} for path in _fading(module)}

    def see(number: int, path: str, norm: ProgressiveNorm, x: Tensor) -> None:
        own[path][number] = Moments(*(value.cpu().double() for value in norm.moments(x)))

    mine = list(chosen)[processes.rank() :: processes.count()]
    for number in track(context.observer, "statistics of the batch norms", mine):
        _run(module, batches[number], partial(see, number))
    gathered = processes.gathered(own)
    layers: dict[nn.Module, nn.Module] = {}
    for path, norm in _fading(module).items():
        parts = {number: found for some in gathered for number, found in some[path].items()}
        with torch.no_grad():
            settled = norm.settle(pooled([parts[number] for number in sorted(parts)]))
        layers[norm] = settled.train(norm.training)
    swap(module, layers)


def _fading(module: nn.Module) -> dict[str, ProgressiveNorm]:
    return {path: part for path, part in module.named_modules() if isinstance(part, ProgressiveNorm)}


def _fit(module: nn.Module, batch: Inputs) -> None:
    """Fit the batch norms to the norms that are there, by what these do to one batch."""
    _run(module, batch, lambda _, norm, x: norm.fit(x))


def _run(module: nn.Module, batch: Inputs, see: Callable[[str, ProgressiveNorm, Tensor], None]) -> None:
    """Run `module` and show each fading norm, with its path, what it reads."""

    def hook(path: str, norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, ProgressiveNorm)
        see(path, norm, args[0])

    with ExitStack() as hooks, torch.no_grad():
        for path, norm in _fading(module).items():
            hooks.callback(norm.register_forward_pre_hook(partial(hook, path)).remove)
        module(**batch)
