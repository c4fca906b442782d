"""The proof of a written graph: it computes what the module computes, at the example's shape and at another.

A float graph must agree to 1e-3 of the largest value. A quantized one is chaotic by nature: a sum that lies
between two steps of a grid falls to the one or the other by its last bit, and the next layers amplify the
step. So its bound is measured: the module is run again with every activation disturbed by no more than the
rounding of a float32 sum, and the graph may be twice as far from the module as the module is from itself, and
one step more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.compare import flatten_outputs, forward, parity, require_finite, worst
from compress.errors import Unproved
from compress.layers.quantized import Activation, Scheme, is_quantized, lowered
from compress.model import Inputs, Model
from compress.report import Parity
from compress.target import TensorSpec
from export.runners import OnnxRunner

FLOAT_TOLERANCE = 1e-3
STEP = 2 / 255
"""What one activation that falls to the next step may do to a small model that the draws leave as it is."""
ROUNDING = 1e-6
"""The standard deviation of the disturbance, as a part of an activation's range: some units in the last place."""
DRAWS = 3


@dataclass(frozen=True)
class Bound:
    """The largest `Parity.relative` and the smallest `Parity.cosine` that a graph may show."""

    relative: float
    cosine: float


def prove(
    model: Model, runner: OnnxRunner, inputs: tuple[TensorSpec, ...], scheme: Scheme
) -> tuple[Parity, Bound]:
    """Compare `runner` with `model.module` under `scheme`. Returns the worst parity, and the bound that it keeps.

    Inputs are the example and `other_sizes` of it, and with a key-value cache also the example in two steps.
    Padding is left out. Raises `Unproved` for a shape that differs, a value that is not finite, and a
    distance beyond the bound.
    """
    found, bounds = [], []
    with lowered(model.module, scheme):
        for batch in (dict(model.example), other_sizes(model.example, inputs)):
            reference = forward(model.module, batch)
            require_finite(reference, "module")
            found.append(
                parity(attended(reference, batch), attended(_outputs(runner, batch), batch), "ONNX graph")
            )
            bounds.append(bound(model.module, batch))
        if runner.cached:
            found.append(_proved_steps(model, runner))
    widest = Bound(max(one.relative for one in bounds), min(one.cosine for one in bounds))
    _require(worst(found), widest)
    return worst(found), widest


def _require(found: Parity, allowed: Bound) -> None:
    if found.relative > allowed.relative or found.cosine < allowed.cosine:
        raise Unproved(
            f"The ONNX graph is {found.relative:.2g} of the largest value off the module, with a lowest cosine of "
            f"{found.cosine:.6f}; allowed are {allowed.relative:.2g} and {allowed.cosine:.6f}.",
            "Export with runtime: standard, which shows whether a rewrite for the CPU is the cause.",
        )


def _outputs(runner: OnnxRunner, inputs: Inputs) -> dict[str, Tensor]:
    return flatten_outputs(runner(**inputs))


def _proved_steps(model: Model, runner: OnnxRunner) -> Parity:
    """The last token's output after a first step without it, against the module over all tokens."""
    tokens = model.example["input_ids"]
    reference = forward(model.module, {"input_ids": tokens})
    first = runner(input_ids=tokens[:, :-1])
    last = flatten_outputs(runner(input_ids=tokens[:, -1:], past_key_values=first.past_key_values))
    return parity({name: reference[name][:, -1:] for name in last}, last, "ONNX graph with a cache")


def attended(outputs: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """`outputs` with zeros at padding, which means nothing: a runtime may give any value there."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(outputs)
    return {
        name: value.where(mask.bool().reshape(*mask.shape, *[1] * (value.dim() - 2)), 0.0)
        if value.dim() > 2 and value.shape[:2] == mask.shape
        else value
        for name, value in outputs.items()
    }


def bound(module: nn.Module, inputs: Inputs) -> Bound:
    """How far a correct graph may be from `module` on `inputs`, in the scheme that is set."""
    if not is_quantized(module):
        return Bound(FLOAT_TOLERANCE, 1 - FLOAT_TOLERANCE)
    noise = rounding_noise(module, inputs)
    return Bound(STEP + 2 * noise.relative, 1 - FLOAT_TOLERANCE - 2 * (1 - noise.cosine))


def rounding_noise(module: nn.Module, inputs: Inputs) -> Parity:
    """How far `module` is from itself when every quantized activation is disturbed by `ROUNDING` of its
    range.

    The worst of `DRAWS` draws from a fixed seed; padding is left out.
    """
    reference = attended(forward(module, inputs), inputs)
    with _disturbed(module):
        draws = [attended(forward(module, inputs), inputs) for _ in range(DRAWS)]
    return worst(parity(reference, draw, "disturbed module") for draw in draws)


@contextmanager
def _disturbed(module: nn.Module) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def disturb(layer: Activation, args: tuple[Tensor]) -> tuple[Tensor]:
        noise = torch.randn(args[0].shape, generator=generator, dtype=args[0].dtype)
        return (args[0] + noise * (ROUNDING * (layer.high - layer.low)),)

    layers = [layer for layer in module.modules() if isinstance(layer, Activation)]
    handles = [layer.register_forward_pre_hook(disturb) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def other_sizes(example: Inputs, specs: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
    """`example` with one row more, and, where a `sequence` is dynamic, a third fewer of its columns.

    Sequences keep the columns that most rows attend to, so that no row is left with padding alone. Heights
    and widths stay: not every model takes every image size that its graph would.
    """
    return {spec.name: _other_size(example, spec) for spec in specs if spec.name in example}


def _other_size(example: Inputs, spec: TensorSpec) -> Tensor:
    tensor = example[spec.name]
    if isinstance(spec.shape[0], str):
        tensor = torch.cat([tensor, tensor[:1]])
    if len(spec.shape) > 1 and str(spec.shape[1]).endswith("sequence"):
        tensor = tensor[:, _kept_columns(example.get("attention_mask"), tensor.shape[1])]
    return tensor.contiguous()


def _kept_columns(mask: Tensor | None, length: int) -> Tensor:
    kept = max(2, length - length // 3)
    if mask is None or mask.shape[1] != length:
        return torch.arange(min(kept, length))
    coverage = mask.sum(0)
    return coverage.argsort(descending=True, stable=True)[:kept].sort().values
