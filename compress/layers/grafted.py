"""A linear map into which the weights of others are grafted while it trains; folded to a plain one afterwards.

After FuseGPT (arXiv 2411.14507): W + B A + sum_f (P_f Q_f) * W_f, where W (out, in) and the removed W_f stay as
they are, and B, A, P_f, Q_f of low rank are trained. B and P_f begin at zero, so that training begins at W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.layers.linear import matrix


class LowRank(nn.Module):
    """A matrix (out, in) of low rank that begins at zero: zeros (out, rank) times random values (rank, in)."""

    def __init__(self, shape: torch.Size, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, *shape)
        bound = 1 / math.sqrt(shape[1])
        self.left = nn.Parameter(torch.zeros(shape[0], rank))
        self.right = nn.Parameter((2 * torch.rand(rank, shape[1], generator=generator) - 1) * bound)

    def forward(self) -> Tensor:
        return self.left @ self.right


class GraftedLinear(nn.Module):
    """`layer`, an `nn.Linear` or a `Conv1D`, with the weights of `removed` layers of its shape grafted in.

    base      the layer's weight (out, in), not trained
    others    the removed weights (out, in), not trained
    update    `LowRank` that is added to the weight
    shares    one `LowRank` of coefficients for each removed weight
    biases    coefficients (out,) of each removed bias, from zero
    """

    def __init__(
        self,
        layer: nn.Module,
        removed: Sequence[nn.Module],
        rank: int,
        update: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        weight = matrix(layer)
        self.base = weight.float()
        self.others = [matrix(one).float() for one in removed]
        self.base_bias = None if layer.bias is None else layer.bias.detach().float()
        self.other_biases = [one.bias.detach().float() for one in removed if one.bias is not None]
        self.update = LowRank(weight.shape, update, generator).to(weight.device)
        self.shares = nn.ModuleList(LowRank(weight.shape, rank, generator) for _ in removed).to(weight.device)
        self.biases = nn.ParameterList(torch.zeros_like(one) for one in self.other_biases)

    def weight(self) -> Tensor:
        """The weight (out, in) that the layer has now, in float32."""
        shares = (share() * other for share, other in zip(self.shares, self.others, strict=True))
        return sum(shares, self.base + self.update())

    def bias(self) -> Tensor | None:
        """The bias (out,) that the layer has now."""
        if self.base_bias is None:
            return None
        grafted = (share * other for share, other in zip(self.biases, self.other_biases, strict=True))
        return sum(grafted, self.base_bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias()
        return functional.linear(x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def fold(self, layer: nn.Module) -> None:
        """Write the weight and bias into `layer`, in place and in its type."""
        with torch.no_grad():
            matrix(layer).copy_(self.weight())
            if (bias := self.bias()) is not None:
                layer.bias.copy_(bias)
