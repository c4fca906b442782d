"""A causal transformer whose classes and attributes have meaningless names, written without torch's own
layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, SIZE, HIDDEN, DEPTH, WORDS = 28, 4, 7, 44, 3, 61


class Blip(nn.Module):
    """A linear map, weight (in, out)."""

    def __init__(self, reads: int, writes: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(reads, writes) * reads**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.p


class Flum(nn.Module):
    """An RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * self.z


class Grok(nn.Module):
    """An attention with one fused map for values, queries and keys, in this order, interleaved per head."""

    def __init__(self) -> None:
        super().__init__()
        self.u = Blip(WIDTH, 3 * HEADS * SIZE)
        self.e = Blip(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.u(x).view(batch, length, HEADS, 3, SIZE).permute(3, 0, 2, 1, 4)
        c, a, b = parts.unbind(0)
        scores = torch.matmul(a, b.transpose(-1, -2)) / SIZE**0.5
        ahead = torch.ones(length, length, dtype=torch.bool).tril().logical_not()
        mixed = scores.masked_fill(ahead, float("-inf")).softmax(-1) @ c
        return self.e(mixed.transpose(1, 2).reshape(batch, length, -1))


class Zork(nn.Module):
    """A block: attention and gated MLP, each after a norm, each added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a1, self.b7, self.q = Flum(), Grok(), Flum()
        self.k, self.w = Blip(WIDTH, 2 * HIDDEN), Blip(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b7(self.a1(x))
        left, right = self.k(self.q(x)).split(HIDDEN, -1)
        return x + self.w(left * right * right.sigmoid())


class Snark(nn.Module):
    """The whole: a look-up, blocks, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.m = nn.ModuleList(Zork() for _ in range(DEPTH))
        self.y = Flum()
        self.v = Blip(WIDTH, 11)

    def forward(self, r: Tensor) -> Tensor:
        x = nn.functional.embedding(r, self.t)
        for block in self.m:
            x = block(x)
        return self.v(self.y(x))
