"""Simplified linear attention on a grid of patches, put into a model as a child of its attention.

After SLAB (Guo et al. 2024, arXiv 2405.11582), whose form has no class token. Here the first tokens, which lie on no
grid, take part in the linear attention like all others, and the convolution leaves them alone; that is ours. The
attention that modelpress registers with transformers computes through it: see `compress.layers.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import Unsuitable
from compress.numerics.linear_attention import linear_attention

KERNEL = 5
"""The depthwise convolution sees so many rows and columns."""


@dataclass(frozen=True)
class Grid:
    """Tokens on a grid of `rows` and `columns`, row after row, behind `special` ones that lie on none."""

    rows: int
    columns: int
    special: int

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.special + self.rows * self.columns


class LinearAttention(nn.Module):
    """Linear attention with learned positions of keys, and a depthwise convolution of the values over the grid.

    positions   (heads, tokens, size), added to the keys; from zero
    local       depthwise convolution of a head's features, the same for all heads; from zero
    blend       the share of softmax attention in what is given: 1 before training, 0 after it
    """

    def __init__(self, grid: Grid, heads: int, size: int, value_size: int) -> None:
        super().__init__()
        self.grid = grid
        self.blend = 0.0
        self.positions = nn.Parameter(torch.zeros(heads, grid.count, size))
        self.local = nn.Conv2d(value_size, value_size, KERNEL, padding=KERNEL // 2, groups=value_size)
        nn.init.zeros_(self.local.weight)
        nn.init.zeros_(self.local.bias)  # type: ignore[arg-type]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, softmax: Callable[[], Tensor]) -> Tensor:
        """The mixture (batch, tokens, heads, value size) for `query` and `key` (batch, heads, tokens, size) and `value`
        (batch, heads, tokens, value size); `softmax` gives that of the attention that this takes the place of."""
        if query.shape[2] != self.grid.count:
            raise Unsuitable(
                f"The linear attention was trained for {self.grid.count} tokens, and here are {query.shape[2]}.",
                "Give pictures of the size of the model's example, or run `simplify_attention` with another example.",
            )
        if self.blend == 1:
            return softmax()
        mixed = linear_attention(query, key + self.positions, value) + self._around(value)
        mixed = mixed.transpose(1, 2)
        return self.blend * softmax() + (1 - self.blend) * mixed if self.blend else mixed.contiguous()

    def _around(self, value: Tensor) -> Tensor:
        """What the convolution makes of `value`, in its shape, with zeros for special tokens."""
        batch, heads, _, size = value.shape
        grid = self.grid
        patches = value[:, :, grid.special :].transpose(2, 3)
        made = self.local(patches.reshape(-1, size, grid.rows, grid.columns))
        made = made.reshape(batch, heads, size, -1).transpose(2, 3)
        return nn.functional.pad(made, (0, 0, grid.special, 0)) if grid.special else made


def is_linear_attention(module: nn.Module) -> bool:
    """Whether the attention `module` has a `LinearAttention` that it computes by."""
    return isinstance(getattr(module, "linear_attention", None), LinearAttention)
