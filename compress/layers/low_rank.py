"""A linear map as two thin ones."""

from __future__ import annotations

from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`expand(reduce(x))`: input (..., in), output (..., out), through `rank` features.

    reduce   linear map (rank, in) without bias
    expand   linear map (out, rank), with the bias if there is one
    """

    def __init__(self, expand: Tensor, reduce: Tensor, bias: Tensor | None) -> None:
        """From factors (out, rank) and (rank, in)."""
        super().__init__()
        self.reduce = _linear(reduce, None)
        self.expand = _linear(expand, bias)

    @property
    def weight(self) -> Tensor:
        """The product (out, in): some models look at the type of a layer's weight."""
        return self.expand.weight @ self.reduce.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (out,), if there is one."""
        return self.expand.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
