"""Passes that train against a teacher: their settings, and the lesson that they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.data import spread, without_labels
from compress.errors import Unproved, Unsuitable
from compress.passes.base import Context, Needs, Pass
from compress.report import Change, Effect, Skip
from compress.scope import Scope
from compress.training import Training, train, training_batches, training_only

if TYPE_CHECKING:
    from torch import nn

    from compress.model import Inputs, Model
    from compress.training import Loss

EVERYTHING = Scope()
AGREED = 1e-8
"""A loss below this is rounding: there is nothing to learn from the teacher."""
MEASURED = 8
"""So many of the batches, evenly spread, say what the loss was before and is after."""
SEEN = 64
"""Without calibration data, so many of the training batches, evenly spread, say what the loss depends on."""


class Taught(Training, Pass):
    """A pass that trains the model to answer as its teacher does: the model that the run began with."""

    effect: ClassVar[Effect] = "lossy"
    needs: ClassVar[Needs] = "training"

    loss: Literal["auto", "logits", "hidden", "both", "minilm"] = "auto"
    """What is compared: the distributions over classes or words; the states between blocks; the sum of `both` (the
    states alone, of a model without logits); the relations between tokens in the last attention. `auto`: `logits` where
    the model has them, else `hidden`."""
    temperature: float = Field(default=1.0, gt=0)
    """Of `logits`: distributions are softened by it."""
    task: float = Field(default=0.0, ge=0)
    """What the model's own loss counts beside the teacher's, with the `labels` of the training batches."""
    relation_heads: int | None = Field(default=None, ge=1)
    """Of `minilm`: cut queries, keys and values into so many heads and relate each with itself, so that teacher and
    student may have different heads. Without it, their own heads: attentions and value relations."""

    def learns_labels(self) -> bool:
        """With `task` it does."""
        return self.task > 0


@dataclass(frozen=True)
class Lesson:
    """A teacher's question, the batches that it is asked about, and how the pass `settings` learns from it."""

    settings: Taught
    context: Context
    batches: Sequence[Inputs]
    kind: str
    """What is compared, in the words of `Taught.loss`."""
    loss: Loss

    def mean_loss(self, module: nn.Module) -> float:
        """The loss of `module` on a few batches, evenly spread."""
        import torch

        seen = spread(self.batches, MEASURED)
        with torch.no_grad():
            return sum(float(self.loss(module, batch)) for batch in seen) / len(seen)

    def reached(self, module: nn.Module, names: Sequence[str]) -> list[str]:
        """Those of the parameters called `names` that the loss depends on. Raises `Unsuitable` if there are none."""
        import torch

        with torch.enable_grad(), training_only(module, names):
            value = self.loss(module, self.batches[0])
            wanted = [module.get_parameter(name) for name in names]
            if not value.requires_grad:
                raise Unsuitable(
                    f"The loss of `{self.settings.use}` depends on no parameter in its scope.",
                    "Widen the scope.",
                )
            found = torch.autograd.grad(value, wanted, allow_unused=True)
        return [name for name, one in zip(names, found, strict=True) if one is not None]

    def learn(
        self,
        module: nn.Module,
        names: Sequence[str],
        before_step: Callable[[int], None] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """Train the parameters called `names`; see `compress.training.train`."""
        what = f"{self.settings.use}: {self.kind}"
        with training_only(module, names):
            train(module, self.batches, self.loss, self.settings, self.context, what, rates, before_step)


@contextmanager
def lessons(settings: Taught, model: Model, context: Context) -> Iterator[Lesson]:
    """The lesson that `settings` asks for, with the teacher on the context's device inside the block.

    `model` has the form in which it will be taught. Raises `DataError` without training data, `UsageError` without
    a teacher, and `Unsuitable` where teacher and student cannot be compared so.
    """
    from compress.passes.teaching import objective, require_teacher

    batches = training_batches(context, settings.use)
    with require_teacher(context, settings.use).on(context.device) as teacher:
        kind, loss = objective(settings, model, teacher)
        yield Lesson(settings, context, batches, kind, loss)


def calibrated(context: Context, lesson: Lesson) -> Context:
    """`context` with calibration data: some of the training batches, without their labels, if it has none."""
    if context.calibration is not None:
        return context
    seen = [without_labels(batch) for batch in spread(lesson.batches, SEEN)]
    return replace(context, calibration=seen)


def require_fall(use: str, before: float, after: float) -> None:
    """Raise `Unproved` unless the pass `use` lowered its loss."""
    if not after < before:
        raise Unproved(
            f"`{use}` did not lower its loss: {before:.4g} before and {after:.4g} after.",
            "Lower the learning rate, take more steps, or give more data.",
        )


def agrees_already(use: str) -> Skip:
    """What the pass `use` says where its loss is below `AGREED` before it has done anything."""
    return Skip(
        "the model", f"it answers as its teacher does already; put `{use}` after the passes that compress"
    )


def trainable(model: Model, scope: Scope = EVERYTHING, embeddings: bool = False) -> list[str]:
    """The names of the parameters in `scope` that may train: those of `embeddings`, and tied heads, only if asked."""
    frozen = set() if embeddings else _embedded(model)
    return [
        name
        for name, parameter in model.module.named_parameters()
        if name.rpartition(".")[0] in scope and parameter.requires_grad and parameter not in frozen
    ]


def trained(
    settings: Taught, module: nn.Module, names: Sequence[str], what: str, before: float, after: float
) -> Change:
    """The change by training the parameters called `names` of `module` on `what`."""
    count = sum(module.get_parameter(name).numel() for name in names)
    trained = f"{count} parameters in {len(names)} tensors, {settings.steps} steps"
    return Change("the model", f"trained on {what}", f"loss {before:.4g}", f"loss {after:.4g} ({trained})")


def _embedded(model: Model) -> set[nn.Parameter]:
    """The parameters of embeddings, and so of heads that are tied to one."""
    paths = [weight.path for weight in model.graph.weights if weight.role == "embedding"]
    return {parameter for path in paths for parameter in model.module.get_submodule(path).parameters(False)}
