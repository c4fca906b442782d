"""Which tokens go: the plans of each method of token reduction.

`transform` is ours, after Token Transforming (arXiv 2506.05709), whose paper has no code: the tokens that go are those
whose merging moves the states least. `tome` is written from Token Merging (Bolya et al. 2023, arXiv 2210.09461),
`prune` from EViT (Liang et al. 2022, arXiv 2202.07800), `sample` from Adaptive Token Sampling (Fayyaz et al. 2022,
arXiv 2111.15667). The first `protected` tokens (class, distillation, registers) stay, in their places, and nothing is
merged into them. Sizes are None where every token stands for one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, pad

from compress.numerics.token_plan import FLOOR, TokenPlan, leading, precedes, ranks

FAR = 1e4
"""What a merge costs that must not be; float16 holds it."""


def transform_plan(
    hidden: Tensor, size: Tensor | None, left: int, protected: int, padded: bool = True
) -> TokenPlan:
    """Merge the pairs that cost least by Ward's criterion until `left` stay: s t / (s + t) |x - y|^2 for sizes s and t.

    `hidden` (batch, tokens, channels), compared after normalization to mean zero and norm one, `size` (batch, tokens).
    The cost is how much the squared error grows of letting one state stand for all tokens of both. Tokens of size
    zero cost nothing to merge, and take nothing in; there are none if not `padded`.
    """
    channels = hidden.shape[-1]
    scale = hidden.new_full((channels,), channels**-0.5)
    if hidden.is_cuda:
        first, second = _halves(layer_norm(hidden, (channels,), scale), protected)
    else:  # so merging can use the same copies of the halves again
        first, second = (layer_norm(half, (channels,), scale) for half in _halves(hidden, protected))
    costs = 1 - first @ second.transpose(1, 2)
    if size is not None:
        ones, others = _halves(size, protected)
        costs = costs / (_inverse(ones)[:, :, None] + _inverse(others)[:, None, :])
        if padded:
            costs = costs + (others <= 0).to(costs.dtype)[:, None, :] * FAR
    return bipartite_plan(costs, left, protected)


def tome_plan(keys: Tensor, size: Tensor | None, left: int, protected: int, padded: bool = True) -> TokenPlan:
    """Merge the pairs whose keys, `keys` (batch, heads, tokens, channels) in the mean over heads, are most alike.

    Tokens of size zero go first, as they say nothing, and take nothing in; there are none if not `padded`.
    """
    first, second = _halves(normalize(keys.float().mean(1), dim=-1), protected)
    costs = -first @ second.transpose(1, 2)
    if size is not None and padded:
        ones, others = _halves(size.float(), protected)
        costs = costs - 4 * (ones <= 0).float()[:, :, None] + FAR * (others <= 0).float()[:, None, :]
    return bipartite_plan(costs, left, protected)


def prune_plan(scores: Tensor, left: int, protected: int, fuse: bool) -> TokenPlan:
    """Keep the tokens with the highest `scores` (batch, tokens); with `fuse`, one more is the mean of the others.

    The fused token is the last, and counts among the `left`.
    """
    kept = left - fuse
    rank = ranks(-scores[:, protected:])
    place = torch.cat([leading(scores, protected), (rank + protected).clamp(max=kept)], 1)
    return TokenPlan(place, rank, _free(scores, protected), left, kept, protected)


def sample_plan(scores: Tensor, left: int, protected: int, samples: int) -> tuple[TokenPlan, Tensor]:
    """Draw `samples` quantiles of the distribution of `scores` (batch, tokens); what no quantile falls on goes.

    Also gives which tokens were drawn, (batch, tokens). Of those at most `left` stay in the plan, the highest scores
    first; if fewer were drawn, others fill their places, and must be given size zero. With the tokens in ascending
    order of their scores, c the sum of the shares up to a token and b up to the one before it, the quantiles
    (2 k - 1) / (2 `samples`) that fall on it are as many as floor(c samples + 1/2) - floor(b samples + 1/2).
    """
    free = scores[:, protected:].float()
    shares = free / free.sum(1, keepdim=True).clamp(min=FLOOR)
    before = (precedes(shares).to(shares.dtype) @ shares[..., None])[..., 0]
    counts = ((before + shares) * samples + 0.5).floor() - (before * samples + 0.5).floor()
    drawn = counts > 0
    rank = ranks(-(shares + 2 * drawn.to(shares.dtype)))
    special = leading(scores, protected)
    place = torch.cat([special, (rank + protected).clamp(max=left)], 1)
    plan = TokenPlan(place, rank, _free(scores, protected), left, left, protected)
    return plan, torch.cat([special >= 0, drawn], 1)


def bipartite_plan(costs: Tensor, left: int, protected: int) -> TokenPlan:
    """Merge the cheapest of the first half of the tokens into their nearest of the second half.

    `costs` (batch, first, second): halves are the tokens at even and at odd places behind the protected. No more than
    the first half can go. Outputs: protected, those left of the first half (cheapest first), the second half.
    """
    batch, evens, odds = costs.shape
    count = evens + odds + protected
    goes = count - left
    cost, nearest = costs.min(-1)
    order = ranks(cost)
    second = protected + evens - goes
    moves = order < goes
    own = order - goes
    even = torch.where(moves, second + nearest, protected + own)
    odd = (second + torch.arange(odds, device=costs.device)).expand(batch, -1)
    place = torch.cat([leading(cost, protected), _interleaved(even, odd)], 1)
    rank = torch.where(moves, own + evens, own)
    free, takers = (
        torch.arange(start, count, 2, device=costs.device) for start in (protected, protected + 1)
    )
    return TokenPlan(place, rank, free, left, second, protected, takers)


def _inverse(size: Tensor) -> Tensor:
    return 1 / size.clamp(min=FLOOR)


def _free(scores: Tensor, protected: int) -> Tensor:
    """All tokens of `scores` (batch, tokens) that are not protected."""
    return torch.arange(protected, scores.shape[1], device=scores.device)


def _halves(values: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Of `values` (batch, tokens, ...) those at even and at odd places behind the protected.

    On a GPU they are views. Elsewhere they are gathered: runtimes copy whole rows so, and single numbers where a slice
    has steps.
    """
    if values.is_cuda:
        return values[:, protected::2], values[:, protected + 1 :: 2]
    count = values.shape[1]
    even, odd = (torch.arange(start, count, 2) for start in (protected, protected + 1))
    return values.index_select(1, even.to(values.device)), values.index_select(1, odd.to(values.device))


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """The rows whose values at even and odd places are given, the second of them as long or one shorter."""
    missing = even.shape[1] - odd.shape[1]
    both = torch.stack([even, pad(odd, (0, missing))], 2).flatten(1)
    return both[:, : even.shape[1] + odd.shape[1]]
