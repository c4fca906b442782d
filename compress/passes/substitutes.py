"""Linear substitutes of the blocks of a stack: what the block before could do in a block's place.

The last linear map of the block before reads z; the substitute adds z M to the hidden states, where M is fitted by
ridge regression to what the block itself adds. If M is good, a refitted map makes up for the block. The first block
has none before it, and is not substituted; nor is one whose z has other positions than its hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.layers.linear import is_linear
from compress.passes.blocks import Run

RIDGE = 1e-2
"""The ridge, as a share of the mean square of z's channels."""


class Substitutes:
    """The substitutes of `layers`, neighbours in a stack, fitted by `see` and used by `stand_in`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.reads: dict[int, Tensor] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._maps: dict[int, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block `reads` holds, by the number of each layer, what its last linear map to run has read."""

        def hook(number: int) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
                self.reads[number] = args[0]

            return keep

        with ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                for linear in filter(is_linear, layer.modules()):
                    hooks.callback(linear.register_forward_pre_hook(hook(number)).remove)
            yield

    def see(self, run: Run, kept: Tensor) -> None:
        """Learn from the positions `kept` (batch, sequence) of `run`, which `reads` belongs to."""
        for place in range(1, len(self.layers)):
            read, (before, after) = self.reads.get(place - 1), run.hidden[place : place + 2]
            if read is None or read.shape[:-1] != before.shape[:-1]:
                continue
            rows, added = read[kept].double(), (after - before)[kept].double()
            gram, cross = self._sums.get(place, (torch.zeros(()), torch.zeros(())))
            self._sums[place] = gram + rows.T @ rows, cross + rows.T @ added
        self._maps.clear()

    def stand_in(self, place: int, run: Run, read: Tensor | None, kept: Tensor) -> Tensor:
        """The hidden states behind the substitute of block `place`, where the block before has read `read`.

        Positions that are not `kept` are given what the block gives. Without a substitute: the block's input.
        """
        before, after = run.hidden[place : place + 2]
        if place not in self._sums or read is None:
            return before
        if place not in self._maps:
            self._maps[place] = _ridge(*self._sums[place]).to(before)
        return torch.where(kept[..., None], before + read.to(before) @ self._maps[place], after)


def _ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """The solution M (in, out) of least squares with sums x xᵀ (in, in) and x yᵀ (in, out)."""
    ridge = (RIDGE * gram.diagonal().mean()).clamp(min=1e-12)
    return torch.linalg.solve(
        gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross
    )
