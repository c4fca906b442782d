"""Passes that train a model until its activations have fewer outliers: their settings, their loss, and their proof.

Student and teacher begin equal, so what is learned from the teacher is to stay where it is. What moves the student is
a second term: the noise that rounding to 8 bits would add to what linear maps read, which is what `quantize` rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import Field

from compress.data import spread
from compress.devices import kept
from compress.errors import Unproved, Unsuitable
from compress.passes.base import Context
from compress.passes.taught import MEASURED, Taught, lessons, trainable
from compress.report import Change
from compress.training import training_only

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.model import Inputs, Model
    from compress.passes.spreads import Place
    from compress.training import Loss


class Calmed(Taught):
    """A pass that gives attention a way to add nothing, and trains the model to have fewer outliers with it."""

    steps: int = Field(default=400, ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """The largest learning rate."""
    penalty: float = Field(default=0.1, ge=0)
    """What outliers count, in units of the loss: times the relative noise of rounding to 8 bits, summed over what
    linear maps read."""


@dataclass(frozen=True)
class Calm:
    """Outliers of what linear maps read: the largest magnitude, and the mean of the kurtosis over places."""

    largest: float
    kurtosis: float

    def __str__(self) -> str:
        return f"largest input of a linear map {self.largest:.4g}, mean kurtosis {self.kurtosis:.4g}"


def calm(module: nn.Module, wanted: Sequence[Place], batches: Iterable[Inputs]) -> Calm:
    """The outliers of `module` at `wanted`, over `batches`."""
    from compress.passes.spreads import spreads

    found = spreads(module, wanted, batches).values()
    return Calm(max(one.largest for one in found), fmean(one.kurtosis for one in found))


def train_calm(
    settings: Calmed,
    model: Model,
    context: Context,
    names: Sequence[str] | None = None,
    rates: Mapping[str, float] | None = None,
    before_step: Callable[[int], None] | None = None,
) -> Change:
    """Train the parameters called `names` (None: all that `trainable` says) of `model.module`, in place, and say how
    its outliers have changed.

    `model` still answers as its teacher does, and its graph is that of the module before anything was put into it.
    Raises `Unsuitable` if these parameters move no input of a linear map, and `Unproved` unless the mean kurtosis has
    fallen.
    """
    from compress.passes.spreads import linear_inputs

    names = trainable(model) if names is None else names
    with lessons(settings, model, context) as lesson:
        wanted = moved(model.module, linear_inputs(model.graph), names, lesson.batches[0])
        if not wanted:
            raise Unsuitable(
                f"What `{settings.use}` may train moves no input of a linear map, where outliers would be.",
                "Widen the scope.",
            )
        seen = spread(lesson.batches if context.calibration is None else kept(context.calibration), MEASURED)
        before = calm(model.module, wanted, seen)
        with penalised(model.module, lesson.loss, wanted, settings.penalty) as loss:
            replace(lesson, loss=loss).learn(model.module, names, before_step, rates)
        after, apart = calm(model.module, wanted, seen), lesson.mean_loss(model.module)
    require_calmer(settings.use, before, after)
    trained = f"{settings.steps} steps; {lesson.kind} loss against the teacher {apart:.4g}"
    return Change("the model", "trained for fewer outliers", str(before), f"{after} ({trained})")


@contextmanager
def penalised(module: nn.Module, loss: Loss, wanted: Sequence[Place], weight: float) -> Iterator[Loss]:
    """Inside the block: `loss` and, times `weight`, the noise of rounding at `wanted`, padding left out."""
    import torch

    from compress.numerics.outliers import rounding_noise
    from compress.passes.calibration import unpadded
    from compress.passes.spreads import heard

    found: list[Tensor] = []
    present: dict[str, Tensor] = {}

    def hear(place: Place, values: Tensor) -> None:
        del place  # a module may run several times, or on no token at all (an expert)
        kept = unpadded(values, present, 1)
        if kept.numel():
            found.append(rounding_noise(kept))

    def both(module: nn.Module, batch: Inputs) -> Tensor:
        found.clear()
        present.clear()
        present.update(batch)
        first = loss(module, batch)
        return first + weight * torch.stack(found).sum()

    with heard(module, wanted, hear):
        yield both


def moved(module: nn.Module, wanted: Sequence[Place], names: Sequence[str], batch: Inputs) -> list[Place]:
    """Those of `wanted` that the parameters called `names` can move: pixels, for one, are given."""
    import torch

    from compress.passes.spreads import heard

    found: dict[Place, bool] = {}

    def hear(place: Place, values: Tensor) -> None:
        found[place] = found.get(place, False) or values.requires_grad

    with torch.enable_grad(), training_only(module, names), heard(module, wanted, hear):
        module(**batch)
    return [place for place in wanted if found.get(place)]


def require_calmer(use: str, before: Calm, after: Calm) -> None:
    """Raise `Unproved` unless the pass `use` has lowered the mean kurtosis, which does not depend on scales."""
    if not after.kurtosis < before.kurtosis:
        raise Unproved(
            f"`{use}` did not make outliers fewer: {before} before, and {after} after.",
            "Raise `penalty`, take more steps, or give more data.",
        )
