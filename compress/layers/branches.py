"""Branches beside a linear map or a 1x1 convolution while it trains, merged into it afterwards.

After the convolutional multigroup re-parameterization of FMViT (arXiv 2311.05707), which has published no code; the
form is ours: y = W x + b + sum_g BN_g(W_g x) + BN(x), where W_g is block diagonal with g blocks (a grouped 1x1
convolution), and the last term is there where inputs and outputs are equally many. The batch norms have fixed
statistics, so that all of it is one affine map at any time: that map is what is computed, and what is merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compress.layers.linear import is_linear, matrix

EPS = 1e-5
"""Added to variances."""


class Branch(nn.Module):
    """A block diagonal matrix and a batch norm with fixed statistics behind it; begins at zero.

    weight     (out, in / groups), the blocks on top of each other; None for the identity
    scale      (out,), from zero
    shift      (out,), from zero; None beside a layer without bias, and then no mean is subtracted
    mean       (out,), of what the matrix gives
    variance   (out,), of the same; about zero where no mean is subtracted
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, whole: Tensor, groups: int, biased: bool) -> None:
        """With the diagonal blocks of `whole` (out, in); `groups` of 0 stands for the identity."""
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(_diagonal_blocks(whole, groups)) if groups else None
        self.scale = nn.Parameter(whole.new_zeros(len(whole)))
        self.shift = nn.Parameter(whole.new_zeros(len(whole))) if biased else None
        self.register_buffer("mean", whole.new_zeros(len(whole)))
        self.register_buffer("variance", whole.new_ones(len(whole)))

    def matrix(self) -> Tensor:
        """The whole matrix (out, in), before the batch norm."""
        if self.weight is None:
            return torch.eye(len(self.scale), dtype=self.scale.dtype, device=self.scale.device)
        return torch.block_diag(*self.weight.chunk(self.groups)) if self.groups > 1 else self.weight

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Matrix (out, in) and shift (out,) of the branch with its batch norm."""
        factor = self.scale / (self.variance + EPS).sqrt()
        shift = None if self.shift is None else self.shift - factor * self.mean
        return factor[:, None] * self.matrix(), shift


class Branched(nn.Module):
    """`plain`, a linear map, a transformers `Conv1D` or a 1x1 convolution, with branches beside it.

    Takes and gives what `plain` does. New, it computes what `plain` does, to the bit.
    """

    def __init__(self, plain: nn.Module, groups: Sequence[int]) -> None:
        """`groups` are those of `groups_for`."""
        super().__init__()
        self.plain = plain
        weight = weight_of(plain)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        self.branches = nn.ModuleList(Branch(weight, count, plain.bias is not None) for count in groups)

    @property
    def weight(self) -> Tensor:
        """The weight of the one affine map that this is, in the shape and type of the plain layer's."""
        own = self.plain.get_parameter("weight")
        whole = weight_of(self.plain, own)
        for branch in self._branches():
            whole = whole + branch.merged()[0]
        return (whole.T if isinstance(self.plain, Conv1D) else whole).reshape(own.shape).to(own.dtype)

    @property
    def bias(self) -> Tensor | None:
        """Its bias (out,), if the plain layer has one."""
        if self.plain.bias is None:
            return None
        own = self.plain.get_parameter("bias")
        whole: Tensor = own
        for branch in self._branches():
            _, shift = branch.merged()
            whole = whole if shift is None else whole + shift
        return whole.to(own.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.plain, nn.Conv2d):
            return functional.conv2d(x, self.weight, self.bias, self.plain.stride)
        weight = self.weight
        return functional.linear(x, weight.T if isinstance(self.plain, Conv1D) else weight, self.bias)

    def measure(self, means: Sequence[Tensor], squares: Sequence[Tensor]) -> None:
        """Set the statistics from the mean (out,) and mean square (out,) of what each branch's matrix gives."""
        for branch, mean, square in zip(self._branches(), means, squares, strict=True):
            if branch.shift is not None:
                branch.mean.copy_(mean)
                square = square - mean.square()
            branch.variance.copy_(square.clamp(min=0))

    def rows(self, x: Tensor) -> Tensor:
        """An input of the layer as (places, in)."""
        return (x.movedim(1, -1) if isinstance(self.plain, nn.Conv2d) else x).flatten(0, -2)

    def merge(self) -> nn.Module:
        """The plain layer, with the branches in its weight and bias."""
        with torch.no_grad():
            weight, bias = self.weight, self.bias
            self.plain.get_parameter("weight").copy_(weight)
            if bias is not None:
                self.plain.get_parameter("bias").copy_(bias)
        return self.plain

    def _branches(self) -> list[Branch]:
        return [branch for branch in self.branches if isinstance(branch, Branch)]


def can_branch(layer: nn.Module) -> bool:
    """Whether `layer` is a linear map or a 1x1 convolution of all channels that computes nothing else."""
    if not isinstance(layer, nn.Conv2d):
        return is_linear(layer)
    plain = type(layer).forward is nn.Conv2d.forward and type(layer)._conv_forward is nn.Conv2d._conv_forward
    return plain and (layer.kernel_size, layer.groups, layer.padding) == ((1, 1), 1, (0, 0))


def groups_for(layer: nn.Module, groups: Sequence[int]) -> tuple[int, ...]:
    """Those of `groups` that cut both sides of `layer` evenly, and 0, the identity, where these are equal."""
    out, width = weight_of(layer).shape
    identity = (0,) if out == width else ()
    return (*(count for count in groups if out % count == width % count == 0), *identity)


def weight_of(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """The weight of a layer that can branch as (out, in); `weight` in its place, in the layer's own shape."""
    if weight is None:
        return layer.get_parameter("weight").detach().flatten(1) if _is_conv(layer) else matrix(layer)
    return weight.flatten(1) if _is_conv(layer) else weight.T if isinstance(layer, Conv1D) else weight


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _diagonal_blocks(whole: Tensor, groups: int) -> Tensor:
    """The `groups` diagonal blocks of `whole` (out, in), on top of each other: (out, in / groups)."""
    rows = whole.chunk(groups)
    return torch.cat([row.chunk(groups, 1)[number] for number, row in enumerate(rows)])
