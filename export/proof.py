"""The proof of a written graph: it computes what the module computes, at the example's shape and at another.

A graph in float must agree with its module to a fixed bound. A quantized one cannot be held to one: where a
value lies between two integers, the last bit of a sum decides, and one layer's flipped integers flip those of
the next. So it is proved twice:

1. with the rounding of activations taken out of both, to the fixed bound: the same weights, scales and zero
   points, in the same places;
2. with the rounding, to a small multiple of what the module differs from itself by when the last bits of what
   it rounds are noise.

The choice of tokens in a module that reduces them is such a rounding too: where two merges cost nearly the same, the
last bit decides. To the fixed bound is added what the module differs from itself by when the last bits of the states
between its blocks are noise.

Padding is left out: a runtime may give any value there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.calls import given, placed
from compress.compare import forward, parity, require_finite, worst
from compress.errors import Unproved
from compress.layers.quantized import Activation, Scheme, is_quantized, lowered
from compress.layers.tokens import TokenReducer, is_reduced
from compress.model import Inputs
from compress.report import Parity
from compress.target import TensorSpec
from export.graph import with_padding
from export.lowering.unrounded import remove_rounding

Floats = Literal["float32", "float16"]
Call = Callable[[Inputs], Mapping[str, Tensor]]
"""One way to run a graph: inputs by name to outputs by name."""
Opener = Callable[[Path], Sequence[Call]]
"""Opens an ONNX file in the runtime that the proof is made on, and gives the ways to run it."""
Rounding = Callable[[Tensor, Activation], Tensor]

TOLERANCE: Mapping[Floats, float] = {"float32": 1e-4, "float16": 0.02}
"""Largest `Parity.relative` of a graph without rounding to integers, by the type of its float tensors."""

LAST_BIT: Mapping[Floats, float] = {"float32": 2.0**-22, "float16": 2.0**-10}
"""Noise on what is rounded to integers, relative to the tensor's largest value: the last bits of a sum."""

ROUNDING_TOLERANCE = 0.02
"""Added to the noise of a quantized module: in a small one, no integer may have flipped under the noise."""

NOISE_FACTOR = 2.0
"""How many times the module's own distance under noise a quantized graph may be off."""


@dataclass(frozen=True)
class Proof:
    """How far the graph is from the module, and for a quantized one the two figures of this page's top."""

    floats: Floats
    parity: Parity
    without_rounding: Parity | None = None
    noise: Parity | None = None


def prove(
    onnx: Path, module: nn.Module, cases: Sequence[Inputs], scheme: Scheme, floats: Floats, opener: Opener
) -> Proof:
    """Compare the graph in the file `onnx` with `module` under `scheme`, on every one of `cases`.

    Raises `Unproved` for a shape that differs, a value that is not finite, and with the distance and the bound
    for a graph that is too far off.
    """
    with lowered(module, scheme):
        references = [forward(module, inputs) for inputs in cases]
        for reference in references:
            require_finite(reference, "module")
        if not is_quantized(module):
            found = _distance(opener(onnx), cases, references)
            _require(found, TOLERANCE[floats] + _choices(module, cases, references, floats), "")
            return Proof(floats, found)
        plain, bound = _without_rounding(onnx, module, cases, opener, floats)
        _require(plain, bound, ", both without the rounding to integers")
        found = _distance(opener(onnx), cases, references)
        noise = _noise(module, cases, references, LAST_BIT[floats])
        _require(found, ROUNDING_TOLERANCE + NOISE_FACTOR * noise.relative, "")
        return Proof(floats, found, plain, noise)


def _require(found: Parity, bound: float, where: str) -> None:
    if found.relative > bound:
        raise Unproved(
            f"The ONNX graph is {found.relative:.2g} of the largest value off its module{where}; "
            f"allowed is {bound:.2g}.",
            "Export in a plainer form, which shows the cause: for onnx `runtime: standard`, for tensorrt `precision: "
            "float32`.",
        )


def _distance(
    calls: Sequence[Call], cases: Sequence[Inputs], references: Sequence[Mapping[str, Tensor]]
) -> Parity:
    return worst(
        parity(attended(reference, inputs), attended(call(inputs), inputs), "ONNX graph")
        for call in calls
        for inputs, reference in zip(cases, references, strict=True)
    )


def _without_rounding(
    onnx: Path, module: nn.Module, cases: Sequence[Inputs], opener: Opener, floats: Floats
) -> tuple[Parity, float]:
    """The distance of graph and module when activations are rounded in neither, and its bound; weights stay ints."""
    unrounded = onnx.with_stem(f"{onnx.stem}-unrounded")
    model = ir.load(onnx)
    remove_rounding(model)
    ir.save(model, unrounded)  # shares the weights' file with `onnx`
    try:
        with _activations(module, lambda x, _: x):
            references = [forward(module, inputs) for inputs in cases]
            found = _distance(opener(unrounded), cases, references)
            return found, TOLERANCE[floats] + _choices(module, cases, references, floats)
    finally:
        unrounded.unlink()


def _noise(
    module: nn.Module, cases: Sequence[Inputs], references: Sequence[Mapping[str, Tensor]], size: float
) -> Parity:
    """How far `module` is from itself with noise, `size` of the largest value, on everything that it rounds."""
    shake = _shaker(size)
    with _activations(module, lambda x, layer: layer.rounded(shake(x))), _states(module, shake):
        return _distance([lambda inputs: forward(module, inputs)], cases, references)


def _choices(
    module: nn.Module, cases: Sequence[Inputs], references: Sequence[Mapping[str, Tensor]], floats: Floats
) -> float:
    """How far a graph may be off because `module` chooses tokens by the last bits of what it compares."""
    if not is_reduced(module):
        return 0.0
    with _states(module, _shaker(LAST_BIT[floats])):
        return NOISE_FACTOR * _distance([lambda inputs: forward(module, inputs)], cases, references).relative


def _shaker(size: float) -> Callable[[Tensor], Tensor]:
    """Adds noise, `size` of the largest value, to a tensor; another for each call, and the same for each shaker."""
    generator = torch.Generator().manual_seed(0)

    def shake(x: Tensor) -> Tensor:
        return x + size * x.abs().max() * torch.randn(x.shape, generator=generator).to(x.dtype)

    return shake


@contextmanager
def _states(module: nn.Module, shake: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let every block that reduces tokens be given what `shake` makes of its states, inside the block of code."""

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        slot = block.token_reducer.slot
        return placed(slot, args, kwargs, shake(given(slot, args, kwargs)))

    with ExitStack() as stack:
        for block in module.modules():
            if isinstance(getattr(block, "token_reducer", None), TokenReducer):
                hook = block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
                stack.callback(hook.remove)
        yield


@contextmanager
def _activations(module: nn.Module, replace: Rounding) -> Iterator[None]:
    """Let every `Activation` of `module` give `replace(input, layer)` inside the block."""
    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, Activation):
                hook = layer.register_forward_hook(lambda layer, inputs, _: replace(inputs[0], layer))
                stack.callback(hook.remove)
        yield


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


def cases_of(example: Inputs, specs: tuple[TensorSpec, ...]) -> tuple[Inputs, Inputs]:
    """`example`, and what `other_sizes` makes of it, with padding."""
    return dict(example), with_padding(other_sizes(example, specs))


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
