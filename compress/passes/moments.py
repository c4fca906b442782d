"""Second moments over the calibration data: of what linear maps read, and of the gradients at what they write.

The gradients are those of the Fisher matrix: of the log-likelihood of outputs that are drawn from the model
itself, so that no labels are needed. An output of scores over classes is a categorical distribution; any
other output is the mean of a normal one, whose deviation is the output's root mean square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compress.graph.structure import Weight
from compress.model import Model
from compress.outputs import float_outputs
from compress.passes.base import Context
from compress.passes.calibration import Watch, numbered, run_batch, unpadded, watch

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

CLASSES_LAST = frozenset(
    {
        "text-generation",
        "fill-mask",
        "text-classification",
        "token-classification",
        "image-classification",
        "text2text-generation",
        "automatic-speech-recognition",
        "audio-classification",
    }
)
"""Tasks whose output `logits` holds scores over classes in its last dimension."""


@dataclass
class Moments:
    """Sums over positions, float64: `inputs` (in, in) by what a weight `reads`, `gradients` (out, out) by its path.

    `absolutes` (in,) are the sums of the inputs' magnitudes, and `positions` counts what was summed.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    absolutes: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)

    def mean(self, reads: str) -> Tensor:
        """The mean of x xᵀ over the positions."""
        return self.inputs[reads] / self.positions[reads]

    def magnitudes(self, reads: str) -> Tensor:
        """The mean magnitude of each input channel, (in,)."""
        return self.absolutes[reads] / self.positions[reads]

    def see(self, reads: str, values: Tensor) -> None:
        """Add the rows of `values` (..., in)."""
        rows = values.detach().flatten(0, -2).float()
        _add(self.inputs, reads, rows.T @ rows)
        _add(self.absolutes, reads, rows.abs().sum(0))
        self.positions[reads] = self.positions.get(reads, 0) + len(rows)

    def see_gradient(self, path: str, values: Tensor) -> None:
        """Add the rows of the gradient `values` (..., out)."""
        rows = values.detach().flatten(0, -2).float()
        _add(self.gradients, path, rows.T @ rows)


def input_moments(model: Model, context: Context, weights: Sequence[Weight], what: str) -> Moments:
    """The second moments of what `weights` read, padding left out."""
    moments = Moments()

    def seer(reads: str) -> Callable[[int, Tensor], None]:
        return lambda _, values: moments.see(reads, values)

    watch(model.module, context, {one.path: Watch(seer(one.reads)) for one in _readers(weights)}, what)
    return moments


def fisher_moments(model: Model, context: Context, weights: Sequence[Weight], what: str) -> Moments:
    """The second moments of inputs and of gradients, padding left out. Deterministic under `context.seed`."""
    import torch

    moments, generator = Moments(), torch.Generator().manual_seed(context.seed)
    with torch.enable_grad(), _frozen(model.module):
        for number, batch in numbered(context, what):
            with _gradients_seen(model.module, weights, batch, moments):
                outputs = float_outputs(run_batch(model.module, batch, number))
                surprise(outputs, batch.get("attention_mask"), model.task, generator).backward()
    return moments


def surprise(outputs: Mapping[str, Tensor], mask: Tensor | None, task: str, generator: Generator) -> Tensor:
    """Minus the log-likelihood, a scalar, of outputs drawn from the model's own distribution; padding left out."""
    import torch

    if task in CLASSES_LAST and "logits" in outputs:
        logits = _kept(outputs["logits"], mask).float().flatten(0, -2)
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
    total = torch.zeros(())
    for value in (_kept(one, mask).float() for one in outputs.values() if one.requires_grad):
        noise = torch.randn(value.shape, generator=generator).to(value.device)
        deviation = value.detach().square().mean().sqrt().clamp(min=1e-12)
        total = total + (noise * value / deviation).sum()
    return total


def _kept(value: Tensor, mask: Tensor | None) -> Tensor:
    """The positions of an output (batch, sequence, ...) that `mask` keeps; all of any other output."""
    if mask is None or value.dim() < 3 or value.shape[:2] != mask.shape:
        return value
    return value[mask.bool()]


def _readers(weights: Sequence[Weight]) -> list[Weight]:
    """One weight of those that read the same tensor."""
    return list({one.reads: one for one in reversed(weights)}.values())


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients of parameters inside the block: those of activations are wanted, and theirs alone."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def _gradients_seen(
    module: nn.Module, weights: Sequence[Weight], batch: Mapping[str, Tensor], moments: Moments
) -> Iterator[None]:
    readers = {one.path for one in _readers(weights)}

    def hook(weight: Weight) -> Callable[..., Tensor]:
        def see(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if weight.path in readers:
                moments.see(weight.reads, unpadded(args[0], batch, 1))
            # Where the graph of gradients begins: nothing above it asks for one.
            output = output if output.requires_grad else output.requires_grad_().clone()
            output.register_hook(lambda gradient: moments.see_gradient(weight.path, gradient))
            return output

        return see

    with ExitStack() as hooks:
        for one in weights:
            hooks.callback(module.get_submodule(one.path).register_forward_hook(hook(one)).remove)
        yield


def _add(sums: dict[str, Tensor], key: str, product: Tensor) -> None:
    # What one batch gives is float32, which is fast; the sum over batches is float64.
    product = product.cpu()
    if key in sums:
        sums[key] += product
    else:
        sums[key] = product.double()
