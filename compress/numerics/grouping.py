"""Which heads share one: groups of equal size by their order or their likeness, or of sizes in proportion to norms."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]
"""The heads of each group, ascending; groups are in the order of their first heads."""

GAIN = 1e-9
"""An exchange that gains less than this is rounding."""


def in_order(sizes: Sequence[int]) -> Groups:
    """Contiguous groups of the given sizes."""
    ends = accumulate(sizes, initial=0)
    return tuple(tuple(range(start, stop)) for start, stop in pairwise(ends))


def alike(similarity: Tensor, count: int) -> Groups:
    """`count` groups of equal size whose heads are alike: similarities (heads, heads) within groups have a large sum.

    From contiguous groups on, the exchange of two heads that gains most is made, until none gains. Deterministic.
    """
    heads = len(similarity)
    likeness = similarity.double().clone().fill_diagonal_(0)
    group = torch.arange(heads) // (heads // count)
    while heads > count > 1:
        to_group = likeness @ torch.nn.functional.one_hot(group, count).double()
        own = to_group[torch.arange(heads), group]
        moved = to_group[:, group] - own[:, None]  # what head i gains in the group of head j
        gains = (moved + moved.T - 2 * likeness).masked_fill(group[:, None] == group, 0)
        best = int(gains.argmax())
        one, other = divmod(best, heads)
        if not gains[one, other] > GAIN:
            break
        group[[one, other]] = group[[other, one]]
    found = [tuple(torch.nonzero(group == number)[:, 0].tolist()) for number in range(count)]
    return tuple(sorted(found))


def proportional(norms: Sequence[float], total: int) -> tuple[int, ...]:
    """Whole shares of `total` in proportion to `norms`, by largest remainders, and none below 1.

    Equal norms give equal shares if the total allows it. Raises `ValueError` if `total` is less than the number of
    norms.
    """
    if total < len(norms):
        raise ValueError(f"{total} cannot be shared by {len(norms)} with at least 1 each")
    whole = sum(norms)
    weights = [one / whole for one in norms] if whole > 0 else [1 / len(norms)] * len(norms)
    wanted = [weight * total for weight in weights]
    shares = [max(1, int(one + 1e-9)) for one in wanted]
    while sum(shares) != total:
        step = 1 if sum(shares) < total else -1
        able = [place for place, share in enumerate(shares) if step > 0 or share > 1]
        shares[max(able, key=lambda place: step * (wanted[place] - shares[place]))] += step
    return tuple(shares)
