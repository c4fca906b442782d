"""How many tokens each block of a stack runs on, for a share of the model's multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from compress.errors import Unsuitable

if TYPE_CHECKING:
    from compress.graph.structure import Graph


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one example: of the whole model, and of each block by its number of tokens.

    A block of n tokens costs linear * n / count + square * (n / count)^2. Reducing n tokens to m costs the products of
    half of them with the other half, `compared` channels each, and those that add what moves: `width` channels.
    """

    total: int
    count: int
    linear: tuple[int, ...]
    square: tuple[int, ...]
    compared: int
    width: int

    def share(self, left: Sequence[int]) -> float:
        """The share of the model's cost that is left if block i runs on `left[i]` tokens, reducers included."""
        cost = float(self.total)
        for tokens, linear, square in zip(left, self.linear, self.square, strict=True):
            part = tokens / self.count
            cost -= linear * (1 - part) + square * (1 - part * part)
        for before, after in pairwise(left):
            if after < before:
                cost += before * before / 4 * self.compared + after * (before - after) * self.width
        return cost / self.total


def costs_of(graph: Graph, blocks: Sequence[str], shape: Sequence[int], compared: int) -> Costs:
    """The costs of `blocks`, neighbours in a stack, which all run on states of `shape` (batch, tokens, width) now."""
    batch, count, width = shape
    square = [
        sum(
            2 * batch * count * count * one.heads * one.head_size
            for one in graph.attentions
            if f"{one.path}.".startswith(f"{block}.")
        )
        for block in blocks
    ]
    linear = [graph.macs[block] - own for block, own in zip(blocks, square, strict=True)]
    return Costs(graph.macs[""], count, tuple(linear), tuple(square), batch * compared, batch * width)


def default_places(blocks: int) -> tuple[int, ...]:
    """Three blocks before which tokens are reduced: the second, and those a quarter and a half of the stack on."""
    return tuple(sorted({1, 1 + blocks // 4, 1 + blocks // 2} & set(range(1, blocks))))


def scheduled(
    costs: Costs, keep: float, places: Sequence[int], protected: int, multiple: int, halves: bool
) -> tuple[int, ...]:
    """The largest schedule that costs at most the share `keep`: at each of `places` the same share of tokens goes.

    Counts are multiples of `multiple` where tokens are reduced; with `halves` no step takes more than half of the
    tokens that are not protected. Raises `Unsuitable` if no schedule is that cheap.
    """
    blocks = len(costs.linear)
    tried = (
        _steps(costs.count, part / 1000, places, protected, multiple, halves, blocks)
        for part in range(1000, 0, -1)
    )
    for left in tried:
        if costs.share(left) <= keep:
            return _filled(left, costs, keep, places, multiple)
    least = costs.share(_steps(costs.count, 0.001, places, protected, multiple, halves, blocks))
    raise Unsuitable(
        f"`keep: {keep}` of the multiply-accumulates cannot be reached: reducing tokens before the blocks "
        f"{', '.join(map(str, places))} leaves {least:.2f} at the least.",
        "Keep more, or name more or earlier blocks with `at`.",
    )


def constant(count: int, remove: int, blocks: int, protected: int, halves: bool) -> tuple[int, ...]:
    """`remove` tokens fewer before each block but the first, as far as that goes."""

    def step(left: int, _: int) -> int:
        return max(left - remove, _least(left, protected, halves))

    return tuple(accumulate(range(blocks - 1), step, initial=count))


def _steps(
    count: int, part: float, places: Sequence[int], protected: int, multiple: int, halves: bool, blocks: int
) -> tuple[int, ...]:
    left, found = count, []
    for number in range(blocks):
        if number in places:
            wanted = protected + part * (left - protected)
            rounded = int(wanted // multiple) * multiple if wanted < left else left
            left = min(left, max(rounded, _least(left, protected, halves)))
        found.append(left)
    return tuple(found)


def _filled(
    left: tuple[int, ...], costs: Costs, keep: float, places: Sequence[int], multiple: int
) -> tuple[int, ...]:
    """Rounding left some of the budget: spend it on the last steps first, which cost least."""

    def with_more(place: int) -> tuple[int, ...]:
        return tuple(tokens + multiple if number >= place else tokens for number, tokens in enumerate(left))

    for place in sorted(places, reverse=True):
        while (more := with_more(place))[place] <= left[place - 1] and costs.share(more) <= keep:
            left = more
    return left


def _least(left: int, protected: int, halves: bool) -> int:
    return least_left(left, protected) if halves else protected + 1


def least_left(count: int, protected: int) -> int:
    """How many of `count` tokens one merge of two halves leaves at the least."""
    return count - (count - protected + 1) // 2
