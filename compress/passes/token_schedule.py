"""How many tokens each block of a stack runs on, for a share of the model's multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from compress.errors import Unsuitable

if TYPE_CHECKING:
    from compress.graph.structure import Graph


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one example: of the whole model, and of each block by its number of tokens.

    A block of n tokens costs linear * n / count + square * (n / count)^2. `step(n, m)` is what it costs to reduce n
    tokens to m.
    """

    total: int
    count: int
    linear: tuple[int, ...]
    square: tuple[int, ...]
    step: Callable[[int, int], float]

    def share(self, left: Sequence[int]) -> float:
        """The share of the model's cost that is left if block i runs on `left[i]` tokens, reducers included."""
        cost = float(self.total)
        for tokens, linear, square in zip(left, self.linear, self.square, strict=True):
            part = tokens / self.count
            cost -= linear * (1 - part) + square * (1 - part * part)
        cost += sum(self.step(before, after) for before, after in pairwise(left) if after < before)
        return cost / self.total


def costs_of(
    graph: Graph, blocks: Sequence[str], batch: int, count: int, step: Callable[[int, int], float]
) -> Costs:
    """The costs of `blocks`, neighbours in a stack, which all run on `batch` rows of `count` tokens now."""
    square = [
        sum(
            2 * batch * count * count * one.heads * one.head_size
            for one in graph.attentions
            if f"{one.path}.".startswith(f"{block}.")
        )
        for block in blocks
    ]
    linear = [graph.macs[block] - own for block, own in zip(blocks, square, strict=True)]
    return Costs(graph.macs[""], count, tuple(linear), tuple(square), step)


@dataclass(frozen=True)
class Schedules:
    """The schedules that a stack allows: at the places where tokens are reduced the same share of them goes.

    `protected` tokens never go; counts are multiples of `multiple`; with `halves` no step takes more than half of the
    tokens that are not protected.
    """

    costs: Costs
    protected: int
    halves: bool
    multiple: int = 1

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.costs.linear)

    def largest(self, keep: float, places: Sequence[int]) -> tuple[int, ...]:
        """The largest schedule that costs at most the share `keep`. Raises `Unsuitable` if none is that cheap."""
        for part in range(1000, 0, -1):
            left = self._steps(part / 1000, places)
            if self.costs.share(left) <= keep:
                return self._filled(left, keep, places)
        raise unreachable(keep, places, self.costs.share(self._steps(0.001, places)))

    def constant(self, remove: int) -> tuple[int, ...]:
        """`remove` tokens fewer before each block but the first, as far as that goes."""

        def step(left: int, _: int) -> int:
            return max(left - remove, self.least(left))

        return tuple(accumulate(range(self.blocks - 1), step, initial=self.costs.count))

    def least(self, count: int) -> int:
        """How many of `count` tokens one reduction leaves at the least."""
        return count - (count - self.protected + 1) // 2 if self.halves else self.protected + 1

    def _steps(self, part: float, places: Sequence[int]) -> tuple[int, ...]:
        left, found = self.costs.count, []
        for number in range(self.blocks):
            if number in places:
                wanted = self.protected + part * (left - self.protected)
                rounded = int(wanted // self.multiple) * self.multiple if wanted < left else left
                left = min(left, max(rounded, self.least(left)))
            found.append(left)
        return tuple(found)

    def _filled(self, left: tuple[int, ...], keep: float, places: Sequence[int]) -> tuple[int, ...]:
        """Rounding left some of the budget: spend it on the last steps first, which cost least."""

        def with_more(place: int) -> tuple[int, ...]:
            return tuple(
                tokens + self.multiple if number >= place else tokens for number, tokens in enumerate(left)
            )

        for place in sorted(places, reverse=True):
            while (more := with_more(place))[place] <= left[place - 1] and self.costs.share(more) <= keep:
                left = more
        return left


def default_places(blocks: int) -> tuple[int, ...]:
    """Three blocks before which tokens are reduced: the second, and those a quarter and a half of the stack on."""
    return _inside({1, 1 + blocks // 4, 1 + blocks // 2}, blocks)


def candidate_places(blocks: int) -> tuple[tuple[int, ...], ...]:
    """The places among which calibration data chooses; the default is the first."""
    quarter, third, half = blocks // 4, blocks // 3, blocks // 2
    found = (
        default_places(blocks),
        _inside({1, 2, 3}, blocks),
        _inside({1, 1 + quarter // 2 + 1, 1 + half - 1}, blocks),
        _inside({2, 2 + quarter, 2 + half}, blocks),
        _inside({1, 1 + third, 1 + 2 * third}, blocks),
        _inside({1 + quarter, 1 + half}, blocks),
    )
    return tuple(dict.fromkeys(places for places in found if places))


def unreachable(keep: float, places: Sequence[int], least: float) -> Unsuitable:
    """The error that no reduction before `places` is cheap enough."""
    return Unsuitable(
        f"`keep: {keep}` of the multiply-accumulates cannot be reached: reducing tokens before the blocks "
        f"{', '.join(map(str, places))} leaves {least:.2f} at the least.",
        "Keep more, or name more or earlier blocks with `at`.",
    )


def _inside(places: set[int], blocks: int) -> tuple[int, ...]:
    return tuple(sorted(places & set(range(1, blocks))))
