"""Linear maps and convolutions, both as one matrix that multiplies rows.

A convolution multiplies patches: all channels of the first place of its kernel, then all of the next. In this order
neighbours among the inputs are channels, which is the dimension that kernels for sparse weights sum over.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from compress.layers.linear import matrix
from compress.plain import require_plain


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear map or an `nn.Conv2d` without groups as (out, in), without gradient; it may be a view."""
    if not isinstance(layer, nn.Conv2d):
        return matrix(layer)
    require_plain(layer, "")
    return layer.weight.detach().permute(0, 2, 3, 1).flatten(1)


def write_matrix(layer: nn.Module, weight: Tensor) -> None:
    """Write `weight` (out, in) in the form of `weight_matrix` into `layer`."""
    if isinstance(layer, nn.Conv2d):
        own = layer.weight.detach().permute(0, 2, 3, 1)
        own.copy_(weight.reshape(own.shape))
    else:
        matrix(layer).copy_(weight)


def neighbours(layer: nn.Module) -> int:
    """How many inputs of `weight_matrix` follow each other before the next place of a kernel begins."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else matrix(layer).shape[1]


def rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What the weight of `layer` multiplies for the input `x`, (rows, in): a row for each place of its output."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    if x.dim() == 3:
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(padded, layer.kernel_size, layer.dilation, stride=layer.stride)
    # unfold has the places of the kernel last: (batch, channels x places, positions).
    return patches.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1).flatten(2).flatten(0, 1)
