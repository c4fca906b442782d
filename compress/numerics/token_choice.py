"""Which tokens go: the plans of each method of token reduction.

`transform` is ours, after Token Transforming (arXiv 2506.05709), whose paper has no code: the tokens that go are those
whose merging moves the states least. `tome` is written from Token Merging (Bolya et al. 2023, arXiv 2210.09461),
`prune` from EViT (Liang et al. 2022, arXiv 2202.07800). The first `protected` tokens (class, distillation,
registers) stay, in their places, and nothing is merged into them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.numerics.token_plan import TokenPlan, hard_plan

FAR = 1e30
"""The cost of a merge that must not be."""


def transform_plan(hidden: Tensor, size: Tensor, left: int, protected: int) -> TokenPlan:
    """Merge the pairs that cost least by Ward's criterion until `left` stay: s t / (s + t) |x - y|^2 for sizes s and t.

    `hidden` (batch, tokens, channels), compared after normalization to unit variance, `size` (batch, tokens). The
    cost is how much the squared error grows of letting one state stand for all tokens of both. Tokens of size zero
    cost nothing to merge.
    """
    states = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
    first, second = _halves(states, protected)
    sizes = [one.float()[..., 0] for one in _halves(size[..., None], protected)]
    products = (first @ second.transpose(1, 2)).float()
    squares = [one.float().square().sum(-1) for one in (first, second)]
    distances = (squares[0][:, :, None] + squares[1][:, None, :] - 2 * products).clamp(min=0)
    weights = sizes[0][:, :, None] * sizes[1][:, None, :]
    weights = weights / (sizes[0][:, :, None] + sizes[1][:, None, :]).clamp(min=1e-6)
    # Padding is never a destination: it costs nothing to merge, but only into a token.
    empty = (sizes[1] <= 0).float()[:, None, :] * FAR
    return bipartite_plan(weights * distances + empty, left, protected, hidden.dtype)


def tome_plan(keys: Tensor, size: Tensor, left: int, protected: int) -> TokenPlan:
    """Merge the pairs whose keys, `keys` (batch, heads, tokens, channels) in the mean over heads, are most alike."""
    metric = torch.nn.functional.normalize(keys.float().mean(1), dim=-1)
    first, second = _halves(metric, protected)
    sizes = [one[..., 0] for one in _halves(size[..., None], protected)]
    empty = (sizes[1] <= 0).float()[:, None, :] * FAR
    # Padding goes first: it says nothing.
    padding = (sizes[0] <= 0).float()[:, :, None] * 4.0
    return bipartite_plan(-first @ second.transpose(1, 2) - padding + empty, left, protected, keys.dtype)


def prune_plan(scores: Tensor, left: int, protected: int, fuse: bool, dtype: torch.dtype) -> TokenPlan:
    """Keep the tokens that the class token looks at most; with `fuse`, one more is the mean of the others.

    `scores` (batch, tokens), at least zero. The fused token is the last, and counts among the `left`.
    """
    batch, count = scores.shape
    free = left - protected - fuse
    order = scores[:, protected:].topk(count - protected, dim=1).indices + protected
    fixed = torch.arange(protected, device=scores.device).expand(batch, -1)
    kept, moved = torch.cat([fixed, order[:, :free]], 1), order[:, free:]
    shares = torch.zeros(batch, left, moved.shape[1], dtype=dtype, device=scores.device)
    if fuse:
        shares = shares + (torch.arange(left, device=scores.device)[:, None] == left - 1).to(dtype)
    return TokenPlan(kept, moved, shares)


def bipartite_plan(costs: Tensor, left: int, protected: int, dtype: torch.dtype) -> TokenPlan:
    """Merge the cheapest of the first half of the tokens into their nearest of the second half.

    `costs` (batch, first, second): halves are the tokens at even and at odd places behind the protected. No more than
    the first half can go. Outputs: protected, those left of the first half (dearest last), the second half.
    """
    batch, evens, odds = costs.shape
    goes = evens + odds + protected - left
    cost, nearest = costs.min(-1)
    order = cost.topk(evens, dim=1, largest=False).indices
    device = costs.device
    fixed = torch.arange(protected, device=device).expand(batch, -1)
    others = (protected + 1 + 2 * torch.arange(odds, device=device)).expand(batch, -1)
    kept = torch.cat([fixed, protected + 2 * order[:, goes:], others], 1)
    destination = protected + evens - goes + nearest.gather(1, order[:, :goes])
    return hard_plan(kept, protected + 2 * order[:, :goes], destination, dtype)


def _halves(values: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """The rows (batch, tokens, channels) at even and odd places behind the protected."""
    return values[:, protected::2], values[:, protected + 1 :: 2]
