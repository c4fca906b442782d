"""Layers with zeros in their weights that stay zeros when they train.

The weight is its own mask: where it is zero it gets no gradient, and an optimizer such as AdamW, which moves nothing
whose gradients were all zero, leaves it there. In every other respect they are the layers that they derive from: the
same parameters, the same outputs to the bit, and nothing more in an exported graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def kept(weight: Tensor) -> Tensor:
    """`weight`, with no gradient where it is zero."""
    # An exported graph has no backward pass, and should not hold the mask.
    if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_exporting():
        return weight * (weight != 0)
    return weight


class SparseLinear(nn.Linear):
    """An `nn.Linear` whose zeros stay."""

    def __init__(self, linear: nn.Linear) -> None:
        """With the parameters of `linear`."""
        out, width = linear.weight.shape
        super().__init__(width, out, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, kept(self.weight), self.bias)


class SparseConv1D(Conv1D):
    """A transformers `Conv1D`, with its weight (in, out), whose zeros stay."""

    def __init__(self, layer: Conv1D) -> None:
        """With the parameters of `layer`."""
        width, out = layer.weight.shape
        with torch.device("meta"):
            super().__init__(out, width)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.view(-1, x.size(-1)), kept(self.weight))
        return rows.view((*x.size()[:-1], self.nf))


class SparseConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose zeros stay."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """With the parameters and settings of `conv`."""
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, kept(weight), bias)


Sparse = SparseLinear | SparseConv1D | SparseConv2d


def is_sparse(layer: nn.Module) -> bool:
    """Whether the zeros of `layer` stay when it trains."""
    return isinstance(layer, Sparse)


def sparse(layer: nn.Module) -> nn.Module:
    """`layer`, an `nn.Linear`, a transformers `Conv1D` or an `nn.Conv2d`, as one whose zeros stay."""
    if is_sparse(layer):
        return layer
    if isinstance(layer, nn.Conv2d):
        made: nn.Module = SparseConv2d(layer)
    elif isinstance(layer, Conv1D):
        made = SparseConv1D(layer)
    else:
        assert isinstance(layer, nn.Linear)
        made = SparseLinear(layer)
    return made.train(layer.training)
