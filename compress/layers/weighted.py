"""Linear maps, convolutions and batch norms of any layout, as one kind of weight with a bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from compress.layers.linear import is_linear
from compress.plain import computed_in

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_PLAIN = {kind.forward for kind in (*_CONVOLUTIONS, _BatchNorm)}
"""Forwards that add the bias if there is one."""


def unwritable(layer: nn.Module) -> str:
    """What keeps the weight and the bias of `layer` from being written to, as "is a Foo", or "".

    It must be a linear map, a convolution, transposed or not, or a batch norm with a weight, and use its bias.
    """
    kind = type(layer).__name__
    if computed := computed_in(layer):
        return f"has a {computed[0]} that is computed from others"
    if isinstance(layer, _BatchNorm):
        if type(layer).forward not in _PLAIN:
            return f"is a {kind}, which may not use its bias"
        return "" if layer.affine else f"is a {kind} without weight"
    if is_linear(layer):
        return ""
    if not isinstance(layer, _ConvNd):
        return f"is a {kind}, and no linear map or convolution"
    can_add = layer.bias is not None or type(layer).forward in _PLAIN
    return "" if can_add else f"is a {kind}, which may not use a bias"


def outputs(layer: nn.Module) -> int:
    """Number of output features of a writable layer."""
    groups, out = matrices(layer).shape[:2]
    return groups * out


def matrices(layer: nn.Module) -> Tensor:
    """The weight of a writable layer as (groups, out, in, taps) in float64; a batch norm has a group a feature."""
    weight = layer.get_parameter("weight").detach().double()
    if isinstance(layer, _BatchNorm):
        return weight.reshape(-1, 1, 1, 1)
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    stacked = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return stacked.transpose(1, 2) if _inputs_first(layer) else stacked


def write(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Write a weight in the form of `matrices`, and a bias (outputs,) or None, in the types that `layer` has."""
    own = layer.get_parameter("weight")
    stored = weight.transpose(1, 2) if _inputs_first(layer) else weight
    own.data.copy_(stored.reshape(own.shape))
    if bias is not None:
        add_bias(layer)
        layer.get_parameter("bias").data.copy_(bias)


def add_bias(layer: nn.Module) -> None:
    """Give a writable layer a bias of zeros if it has none."""
    if layer.bias is None:
        weight = layer.get_parameter("weight")
        layer.bias = nn.Parameter(weight.new_zeros(outputs(layer)), weight.requires_grad)


def fits(layer: nn.Module, *values: Tensor | None) -> bool:
    """Whether `values` stay finite in the type of the layer's weight."""
    kind = layer.get_parameter("weight").dtype
    return all(value is None or bool(torch.isfinite(value.to(kind)).all()) for value in values)


def _inputs_first(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvTransposeNd | Conv1D)
