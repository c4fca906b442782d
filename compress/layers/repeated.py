"""A linear map that makes some of its features several times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Pieces = tuple[tuple[int, int], ...]
"""Half-open runs of the features that there are, in the order in which they come out."""


class RepeatedLinear(nn.Module):
    """`distinct(x)`, its features in another order and some of them repeated: input (..., in), output (..., out).

    distinct   linear map (fewer than out, in), with the bias if there is one
    pieces     half-open runs of its features, one behind the other in the output
    """

    def __init__(self, distinct: nn.Linear, pieces: Pieces) -> None:
        super().__init__()
        self.distinct = distinct
        self.pieces = pieces

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) with its repeated rows: some models look at the type of a layer's weight."""
        return torch.cat([self.distinct.weight[start:stop] for start, stop in self.pieces])

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,) with its repeated values, if there is one."""
        bias = self.distinct.bias
        return None if bias is None else torch.cat([bias[start:stop] for start, stop in self.pieces])

    def forward(self, x: Tensor) -> Tensor:
        features = self.distinct(x)
        # Slices, not a gather: a traced graph shows where each feature comes from.
        return torch.cat([features[..., start:stop] for start, stop in self.pieces], -1)

    def extra_repr(self) -> str:
        return f"{len(self.pieces)} pieces"
