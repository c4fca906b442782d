"""Clipped softmax: probabilities stretched below zero and clipped there, so that a head can look at nothing exactly.

Bondarenko et al. 2023, "Quantizable Transformers", arXiv 2306.12929: clip((1 - gamma) p + gamma, 0, 1) with
gamma = -alpha / T. The paper fixes T, the length in training. Here T is how many keys a row may look at: neither
padding nor the tokens that follow change what a row sees, and a cache gives what a whole run gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

HIDDEN = -50.0
"""A key with so much less added to its score than the best key of its row is not seen: its probability is below e^-50
of the other's. Masks add the least value of their type, or -100 (the shifted windows of Swin)."""


class SoftmaxClip(nn.Module):
    """Clips probabilities (batch, heads, queries, keys). A probability of less than about `alpha` / T becomes zero.

    alpha   how much is taken off, in uniform probabilities
    share   how much of `alpha` counts at present: a plan raises it from 0, where this is the identity, to 1
    """

    def __init__(self, alpha: float, share: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha
        self.share = share

    def forward(self, probabilities: Tensor, addends: Sequence[Tensor]) -> Tensor:
        """The clipped `probabilities`; `addends`, masks among them, are what was added to the scores."""
        gamma = -self.alpha * self.share / visible(addends, probabilities)
        return torch.clamp((1 - gamma) * probabilities + gamma, 0, 1)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}"


def visible(addends: Sequence[Tensor], probabilities: Tensor) -> Tensor | int:
    """How many keys each row of `probabilities` (..., keys) may look at, after what was added to its scores."""
    if not addends:
        return probabilities.shape[-1]
    added = reduce(torch.add, addends)
    seen = torch.gt(added, added.amax(-1, keepdim=True) + HIDDEN)
    return seen.to(probabilities.dtype).sum(-1, keepdim=True).clamp(min=1)


def clips_of(module: nn.Module) -> list[SoftmaxClip]:
    """The clips inside `module`."""
    return [part for part in module.modules() if isinstance(part, SoftmaxClip)]
