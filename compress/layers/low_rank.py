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
        self.reduce = plain_linear(reduce, None)
        self.expand = plain_linear(expand, bias)

    @property
    def weight(self) -> Tensor:
        """The product (out, in): some models look at the type of a layer's weight."""
        return self.expand.weight @ self.reduce.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (out,), if there is one."""
        return self.expand.bias

    @property
    def rank(self) -> int:
        """The number of features between the two."""
        return len(self.reduce.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x))

    def cut(self, rank: int) -> LowRankLinear:
        """A plain one with the first `rank` of the features, which are copied."""
        return LowRankLinear(
            self.expand.weight[:, :rank].clone(), self.reduce.weight[:rank].clone(), self.bias
        )

    def dense(self) -> nn.Linear:
        """The product as one linear map."""
        return plain_linear(self.weight, self.bias)


class OrderedLowRank(LowRankLinear):
    """A linear map as two thin ones that trains with fewer features: the first `active` of them take part."""

    def __init__(self, expand: Tensor, reduce: Tensor, bias: Tensor | None) -> None:
        super().__init__(expand, reduce, bias)
        self.active = len(reduce)

    def forward(self, x: Tensor) -> Tensor:
        narrow = nn.functional.linear(x, self.reduce.weight[: self.active])
        return nn.functional.linear(narrow, self.expand.weight[:, : self.active], self.expand.bias)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with the values of `weight` (out, in) and `bias` (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer
