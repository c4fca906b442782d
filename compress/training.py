"""How passes train: one loop for all of them, on `transformers.Trainer` and accelerate (see `compress.trainer`).

`train` is deterministic under the context's seed, goes on from where it was interrupted if the context has a scratch
folder, and shares its batches between the processes of a launcher, with the same result as one process up to the
rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress import processes
from compress.devices import kept
from compress.errors import DataError, Unsuitable, UsageError
from compress.passes.base import Context

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from compress.model import Inputs

Loss = Callable[["nn.Module", "Inputs"], "Tensor"]
"""Gives a scalar for a module and a batch, both on one device."""


class Training(BaseModel):
    """How a pass trains: AdamW, with a learning rate that warms up and then falls as a cosine to zero."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(ge=1)
    """Steps of the optimizer."""
    learning_rate: float = Field(gt=0)
    """The largest learning rate."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """The share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decay of matrices; vectors such as biases and norms never decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay of the means of gradients and of their squares."""
    clip: float = Field(default=1.0, gt=0)
    """The largest norm of the gradient."""
    accumulate: int = Field(default=1, ge=1)
    """Batches a step, over all processes together."""
    precision: Literal["float32", "bfloat16", "auto"] = "float32"
    """`bfloat16`: matrix products in bfloat16, weights and sums as they are (autocast). `auto`: where the device has
    instructions for it."""

    def in_bfloat16(self, device: str | torch.device) -> bool:
        """Whether matrix products on `device` are computed in bfloat16."""
        return self.precision == "bfloat16" or (self.precision == "auto" and multiplies_bfloat16(device))


@dataclass(frozen=True)
class Trained:
    """What a run of training was. Losses are means over the first and the last tenth of the steps (at least one)."""

    steps: int
    first_loss: float
    last_loss: float
    seconds: float


def train(
    module: nn.Module,
    batches: Sequence[Inputs],
    loss: Loss,
    settings: Training,
    context: Context,
    what: str,
    rates: Mapping[str, float] | None = None,
    before_step: Callable[[int], None] | None = None,
) -> Trained:
    """Train the parameters of `module` that ask for gradients, in place, to make `loss` small over `batches`.

    The module stays in evaluation mode, so that there is no dropout and no batch norm moves: what is trained is what
    is exported. It comes back on the device that it was on. Batches are mappings of tensors, batch dimension first,
    gone through in an order shuffled by the seed, again and again. `rates` gives parameters learning rates of their
    own, by name. `before_step` is told the number of each step, from 0, before its first batch: for what changes in
    training by plan. With `context.scratch` the state is kept there every tenth of the steps, and a run of the same
    `what`, settings and weights goes on from it.

    Raises `DataError` without a batch, `Unsuitable` if nothing trains, `UsageError` if the processes cannot share
    the batches of a step evenly, and `Unproved` for a loss that is not finite.
    """
    from compress.trainer import fit

    _require(module, batches, settings, what)
    unknown = set(rates or ()) - {name for name, _ in module.named_parameters()}
    if unknown:
        raise UsageError(
            f"{what}: there are no parameters {', '.join(sorted(unknown))} to give learning rates to.",
            "Name parameters as `named_parameters` of the module does.",
        )
    return fit(module, batches, loss, settings, context, what, rates or {}, before_step)


def training_batches(context: Context, what: str) -> Sequence[Inputs]:
    """The training batches of `context`. Raises `DataError` if the recipe names no data for them, or there are none."""
    if context.training is None:
        raise DataError(
            f"{what} needs training data, and there is none.",
            "Name a file: `data: {training: {text: FILE}}` in the recipe, or `training=` in Python.",
        )
    batches = kept(context.training)
    _require_batches(batches, what)
    return batches


def autocast(settings: Training, context: Context) -> AbstractContextManager[None]:
    """The precision of `settings`, for what is computed beside the training."""
    import torch

    device = torch.device(context.device)
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.in_bfloat16(device))


def multiplies_bfloat16(device: str | torch.device) -> bool:
    """Whether `device` has instructions for products in bfloat16; without them it is slower than float32."""
    import torch

    from compress.versions import processor

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(processor()["flags"])


@contextmanager
def training_only(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside the block only the parameters called `names` ask for gradients; after it those that did before."""
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    chosen = {module.get_parameter(name) for name in names}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _require(module: nn.Module, batches: Sequence[Inputs], settings: Training, what: str) -> None:
    _require_batches(batches, what)
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise Unsuitable(
            f"{what}: no parameter of {type(module).__name__} asks for gradients, so nothing trains.",
            "Widen the scope, or give a model with float weights.",
        )
    if settings.accumulate % processes.count():
        raise UsageError(
            f"{what}: the {settings.accumulate} batches of a step cannot be shared evenly by "
            f"{processes.count()} processes.",
            f"Set `accumulate` to a multiple of {processes.count()}, or start fewer processes.",
        )


def _require_batches(batches: Sequence[Inputs], what: str) -> None:
    if not len(batches):
        raise DataError(
            f"{what}: the training data gives no batches.",
            "Check that the file of `data: {training: ...}` is not empty and `samples` is at least 1.",
        )
