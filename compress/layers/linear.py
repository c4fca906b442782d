"""Linear maps as the model has them, seen as one matrix."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.layers.sparse import SparseConv1D, SparseLinear, is_sparse, kept
from compress.plain import require_plain

_PLAIN = {kind.forward for kind in (nn.Linear, Conv1D, SparseLinear, SparseConv1D)}
"""Forwards that compute a linear map and nothing else."""


class Scaling(nn.Module):
    """Multiplies each channel of its input (..., channels) by a constant.

    scale   buffer (channels,)
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledLinear(nn.Linear):
    """A linear map whose input is multiplied by a constant of each channel first: `W (x * scale) + b`.

    With `sparse`, the zeros of W stay zeros when it trains.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scaling: Scaling, sparse: bool = False) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.weight = nn.Parameter(weight.detach().contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        # A module of its own, so that a trace tells the multiplication from the linear map.
        self.scaling = scaling
        self.sparse = sparse

    def forward(self, input: Tensor) -> Tensor:
        weight = kept(self.weight) if self.sparse else self.weight
        return nn.functional.linear(self.scaling(input), weight, self.bias)


def prescaled(layer: nn.Module, x: Tensor) -> Tensor:
    """`x` (..., in) as the weight of `layer` meets it: multiplied by a scale, if the layer has one."""
    scaling = getattr(layer, "scaling", None)
    return scaling(x) if isinstance(scaling, Scaling) else x


def is_linear(layer: nn.Module) -> bool:
    """Whether `layer` is an `nn.Linear` or a transformers `Conv1D`, sparse or not, that computes nothing else."""
    return type(layer).forward in _PLAIN


def is_conv(layer: nn.Module) -> bool:
    """Whether `layer` is an `nn.Conv2d`, sparse or not, that computes nothing else."""
    if not isinstance(layer, nn.Conv2d):
        return False
    kind = type(layer)
    return kind.forward is nn.Conv2d.forward and (
        is_sparse(layer) or kind._conv_forward is nn.Conv2d._conv_forward
    )


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear map as (out, in): a view without gradient, so that writing to it changes the layer.

    Raises `Unsuitable` if the weight is computed from others (see `compress.plain`): it has nothing to write to.
    """
    require_plain(layer, "")
    weight = layer.get_parameter("weight").detach()
    return weight.T if isinstance(layer, Conv1D) else weight
