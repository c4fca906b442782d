"""Quantized layers: integer weights, and activation ranges that each target lowers to its own scheme.

The layers call the operators of PyTorch's `quantized_decomposed` library, which exporters turn into
`QuantizeLinear` and `DequantizeLinear`. In PyTorch they compute in float on values rounded to the integer
grid, so that what they return is what the integer kernels of a runtime return, up to the rounding of the
sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import Tensor, nn

from compress.layers.linear import ScaledLinear, is_conv, is_linear, matrix, prescaled
from compress.numerics.affine import Affine, Scheme, affine, weight_scales

__all__ = [
    "Activation",
    "QuantizedConv2d",
    "QuantizedLinear",
    "Scheme",
    "is_quantized",
    "lowered",
    "quantizable",
    "quantized",
    "swap",
]

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)
"""Where torch keeps what runs before and behind a module, by numbers that are never given twice."""


class Activation(nn.Module):
    """Fake quantization of one tensor over the calibrated range [`low`, `high`], lowered by `scheme`.

    The range is plain Python floats, kept in the pass's record; `scheme` is set for one export by `lowered`.
    A tensor of any shape and float dtype gives one of the same shape and dtype; gradients pass straight
    through (Bengio et al. 2013, arXiv 1308.3432).
    """

    def __init__(self, low: float, high: float, scheme: Scheme = "asymmetric") -> None:
        super().__init__()
        self.low = low
        self.high = high
        self.scheme: Scheme = scheme

    def forward(self, x: Tensor) -> Tensor:
        # An exported graph has no backward pass, and must hold the two operators and nothing else.
        if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_exporting():
            return x + (self.rounded(x.detach()) - x).detach()
        return self.rounded(x)

    def rounded(self, x: Tensor) -> Tensor:
        """`x` on the integer grid, with no gradient."""
        grid = self.grid()
        operators = torch.ops.quantized_decomposed
        integers = operators.quantize_per_tensor(x.float(), *grid, grid_dtype(grid))
        return operators.dequantize_per_tensor(integers, *grid, grid_dtype(grid)).to(x.dtype)

    def grid(self) -> Affine:
        """Scale, zero point, and the smallest and the largest integer, for the scheme that is set now."""
        return affine(self.low, self.high, self.scheme)

    def extra_repr(self) -> str:
        return f"{self.low:.4g} to {self.high:.4g}, {self.scheme}"


def grid_dtype(grid: Affine) -> torch.dtype:
    """The integer type of a grid: int8 if it has negative integers, else uint8."""
    return torch.int8 if grid.lowest < 0 else torch.uint8


class QuantizedWeight(nn.Module):
    """What the quantized layers share: an int8 weight with a scale per output channel, and the input's range.

    integers      int8 buffer, (out, ...), in [-127, 127]
    weight_scale  float32 buffer, (out,)
    bias          float parameter (out,), or None
    input         `Activation` of the layer's input
    """

    integers: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, input: Activation) -> None:
        super().__init__()
        self.dtype = weight.dtype
        scale = weight_scales(weight)
        rows = scale.view(-1, *[1] * (weight.dim() - 1))
        integers = torch.clamp(torch.round(weight.detach().float() / rows), -127, 127)
        self.register_buffer("integers", integers.to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self.input = input

    @property
    def weight(self) -> Tensor:
        """The weight in float, of the type it had: models cast what they feed a layer to that of its weight."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight as the float tensor that its integers stand for."""
        operator = torch.ops.quantized_decomposed.dequantize_per_channel
        return operator(self.integers, self.weight_scale, None, 0, -127, 127, torch.int8).to(dtype)


class QuantizedLinear(QuantizedWeight):
    """A linear map with integer operands: input (..., in), weight (out, in), output (..., out).

    scaling   `Scaling` of the input before it is rounded, or None
    """

    def __init__(self, linear: nn.Module, input: Activation) -> None:
        """From `nn.Linear` or `ScaledLinear`, weight (out, in), or transformers' `Conv1D`, weight (in, out)."""
        super().__init__(matrix(linear), linear.bias, input)
        self.scaling = linear.scaling if isinstance(linear, ScaledLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.input(prescaled(self, x)), self.dequantized(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.integers.shape[1]}, out_features={self.integers.shape[0]}"


class QuantizedConv2d(QuantizedWeight):
    """A convolution with integer operands: input (batch, in, height, width), weight (out, in / groups, kh,
    kw).

    Zeros are exact in every grid, so that padding after quantization pads with zeros.
    """

    def __init__(self, conv: nn.Conv2d, input: Activation) -> None:
        super().__init__(conv.weight, conv.bias, input)
        self.stride = conv.stride
        self.padding = conv.padding
        self.dilation = conv.dilation
        self.groups = conv.groups
        self.padding_mode = conv.padding_mode
        self.edges = tuple(conv._reversed_padding_repeated_twice)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        weight, padding = self.dequantized(x.dtype), self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self.edges, mode=self.padding_mode), 0
        return nn.functional.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{tuple(self.integers.shape)}, stride={self.stride}, padding={self.padding}, groups={self.groups}"


def quantizable(layer: nn.Module) -> bool:
    """Whether `layer` has a quantized form: a linear map, a `Conv1D` or a `Conv2d` that computes nothing
    else."""
    return is_linear(layer) or is_conv(layer) or isinstance(layer, ScaledLinear)


def quantized(layer: nn.Module, input: Activation) -> QuantizedWeight:
    """The quantized form of a `quantizable` layer, for inputs in the range of `input`."""
    if isinstance(layer, nn.Conv2d):
        return QuantizedConv2d(layer, input)
    return QuantizedLinear(layer, input)


def swap(module: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> None:
    """Put new layers in the place of old ones, wherever `module` holds them, with the hooks that those had."""
    for old, new in layers.items():
        for hooks in HOOKS:
            getattr(new, hooks).update(getattr(old, hooks))
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child in layers:
                setattr(parent, name, layers[child])


@contextmanager
def lowered(module: nn.Module, scheme: Scheme) -> Iterator[None]:
    """Set every `Activation` of `module` to `scheme` inside the block, and back after it."""
    layers = [layer for layer in module.modules() if isinstance(layer, Activation)]
    before: list[Scheme] = [layer.scheme for layer in layers]
    for layer in layers:
        layer.scheme = scheme
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.scheme = old


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` holds any quantized layer."""
    return any(isinstance(layer, Activation) for layer in module.modules())
